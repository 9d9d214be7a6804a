"""The standard streams as this program needs them: a write that fails is an error of ours, whoever wrote."""

from __future__ import annotations

import errno
import io
import os
import sys

from daaswarm.errors import OutputLost

BUFFER_BYTES = 64 * 1024  # as pipes hold; every event flushes


class StandardOutput(io.FileIO):
    """File descriptor 1. Below print, typer and rich, so that none of them turns a full disk into a traceback."""

    def __init__(self) -> None:
        super().__init__(1, "w", closefd=False)

    def write(self, data: object, /) -> int:
        """Raises:
        OutputLost: with the cause.
        """
        try:
            return super().write(data)  # pyright: ignore[reportArgumentType]
        except OSError as error:
            raise OutputLost(
                f"can't write to standard output: {error.strerror}", is_closed=error.errno == errno.EPIPE
            ) from error


class StandardError(io.FileIO):
    """File descriptor 2. What can't be said there is lost, and no reason to end an answer."""

    def __init__(self) -> None:
        super().__init__(2, "w", closefd=False)

    def write(self, data: object, /) -> int:
        try:
            return super().write(data)  # pyright: ignore[reportArgumentType]
        except OSError:
            return memoryview(data).nbytes  # pyright: ignore[reportArgumentType]


def set_up_streams() -> None:
    """Replace the three standard streams. One that was closed is /dev/null: else the next socket gets its number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison] - it is where it was closed
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    encodings = [getattr(stream, "encoding", None) or "utf-8" for stream in (sys.stdout, sys.stderr)]
    # A terminal that lacks a character must not end an answer: errors="replace".
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(StandardOutput(), BUFFER_BYTES), encodings[0], "replace", line_buffering=os.isatty(1)
    )
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(StandardError(), BUFFER_BYTES), encodings[1], "replace", line_buffering=True
    )
