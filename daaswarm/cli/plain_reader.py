"""Reads a chat's questions from a terminal that can't move its cursor: a line each, no history."""

from __future__ import annotations

import os
import sys

import trio


def is_plain() -> bool:
    """Whether the terminal is one of those, by its name."""
    return os.environ.get("TERM", "dumb") in ("dumb", "unknown", "")


class PlainReader:
    """One person at such a terminal. Ctrl-C is a signal here, so it leaves the chat at once."""

    async def read(self) -> str:
        """What was typed; a backslash at the end of a line goes on in the next one.

        Raises:
            EOFError: Ctrl-D.
        """
        return await trio.to_thread.run_sync(self._read, abandon_on_cancel=True)

    def _read(self) -> str:
        text, mark = "", "> "
        while True:
            sys.stdout.write(mark)
            sys.stdout.flush()
            try:
                line = sys.stdin.readline()
            except UnicodeDecodeError:
                line = "\udcff\n"  # refused as a question that is no text
            if not line:
                raise EOFError
            text += line.rstrip("\n")
            if not text.endswith("\\"):
                return text
            text, mark = text[:-1] + "\n", "  "
