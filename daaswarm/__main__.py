"""The program's first moments: Ctrl-C must end it quietly also while Python still imports the rest of it."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Entry point of the console script and of ``python -m daaswarm``."""
    signal.signal(signal.SIGINT, leave)
    from daaswarm.cli.app import main as run

    run()


def leave(number: int, frame: object) -> None:
    """Nothing has been started yet, so there is nothing to clean up: 130, as after any Ctrl-C."""
    os._exit(128 + number)


if __name__ == "__main__":
    main()
