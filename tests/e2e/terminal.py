"""A command in a real pseudo-terminal, as a person has it: what it shows, what is typed, and Ctrl-C."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

from tests.e2e.processes import get_environment

SHOW_S = 120.0  # a machine with two cores that imports torch
READ_BYTES = 65_536

CTRL_C, CTRL_D, ENTER, ESCAPE = "\x03", "\x04", "\r", "\x1b"
STEERING = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>78]|\x1b\][^\x07]*\x07|\r")


class Terminal:
    """A command whose controlling terminal is ours.

    Args:
        command: defaults to ``python -m daaswarm``.
    """

    def __init__(
        self, *arguments: str, columns: int = 80, lines: int = 30, command: list[str] | None = None, **extra: str
    ) -> None:
        self._side, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.raw = b""
        self._seen = 0  # characters of shown text that were waited for
        environment = {
            "TERM": "xterm-256color",
            "LC_ALL": "C.UTF-8",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            **get_environment(),
            **extra,
        }
        environment = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [*(command or [sys.executable, "-m", "daaswarm"]), *arguments],
            stdin=other,
            stdout=other,
            stderr=other,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(other)

    @property
    def text(self) -> str:
        """All that was shown, without what steers the terminal."""
        return STEERING.sub("", self.raw.decode("utf-8", "replace"))

    def read(self, timeout: float) -> bool:
        """Take what is shown within ``timeout``; ``False`` at the end."""
        if not select.select([self._side], [], [], timeout)[0]:
            return True
        try:
            data = os.read(self._side, READ_BYTES)
        except OSError:  # Linux says so when the other side is closed
            data = b""
        self.raw += data
        return bool(data)

    def wait_for(self, expected: str, timeout: float = SHOW_S) -> str:
        """Until a text is shown that was not waited for before; returns what came with it."""
        until = time.monotonic() + timeout
        while expected not in self.text[self._seen :]:
            left = until - time.monotonic()
            if left <= 0 or not self.read(left):
                raise AssertionError(f"{expected!r} was not shown:\n{self.text[-3000:]}")
        start = self._seen
        self._seen = self.text.index(expected, start) + len(expected)
        return self.text[start : self._seen]

    def type(self, text: str) -> None:
        os.write(self._side, text.encode())

    def wait(self, timeout: float = SHOW_S) -> int:
        """To the end of the command, showing the rest; the exit code."""
        until = time.monotonic() + timeout
        while self.process.poll() is None:
            assert time.monotonic() < until, f"still running:\n{self.text[-3000:]}"
            self.read(0.02)
        while select.select([self._side], [], [], 0)[0] and self.read(0):
            pass
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
        os.close(self._side)


@contextlib.contextmanager
def terminal(*arguments: str, **options: object) -> Iterator[Terminal]:
    """A command until the end of the block, then SIGKILL if it still runs."""
    opened = Terminal(*arguments, **options)  # type: ignore[arg-type]
    try:
        yield opened
    finally:
        opened.close()
