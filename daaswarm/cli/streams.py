"""The standard streams as this program needs them: a write that fails is an error of ours, whoever wrote."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import queue
import sys
import threading

from daaswarm.errors import OutputLost

BUFFER_BYTES = 64 * 1024  # as pipes hold; every event flushes
BACKLOG = 10_000  # writes that the reader of a node may be behind; then they are dropped, not the node held up
PATIENCE_S = 0.2  # that a node waits for a reader, once; its peers hardly notice
FLUSH_S = 2.0  # for the last words of a node whose reader is behind; nobody may be there


class Aside:
    """Writes to a file descriptor in a thread of its own. A reader who has stopped reading (a pager, Ctrl-S on a
    terminal) holds nobody up for longer than :data:`PATIENCE_S`.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._waiting: queue.Queue[bytes] = queue.Queue(BACKLOG)
        self._error: OSError | None = None
        threading.Thread(target=self._work, name=f"file descriptor {number}", daemon=True).start()

    def write(self, data: bytes) -> None:
        """Raises:
        OSError: of this write, or of one that the reader had kept waiting.
        """
        is_behind = not self.wait(0.0)
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(data)
        if not is_behind:
            self.wait(PATIENCE_S)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self, seconds: float) -> bool:
        """Whether all is written by then."""
        with self._waiting.all_tasks_done:
            return self._waiting.all_tasks_done.wait_for(lambda: not self._waiting.unfinished_tasks, seconds)

    def _work(self) -> None:
        while True:
            left = memoryview(self._waiting.get())
            try:
                while left:
                    left = left[os.write(self._number, left) :]
            except OSError as error:
                self._error = error
            self._waiting.task_done()


class _Standard(io.FileIO):
    """A file descriptor that this process began with."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self.aside: Aside | None = None

    def put(self, data: object) -> int:
        """Raises:
        OSError: with the cause.
        """
        if self.aside is None:
            return super().write(data)  # pyright: ignore[reportArgumentType]
        self.aside.write(bytes(data))  # pyright: ignore[reportArgumentType]
        return memoryview(data).nbytes  # pyright: ignore[reportArgumentType]


class StandardOutput(_Standard):
    """File descriptor 1. Below print, typer and rich, so that none of them turns a full disk into a traceback."""

    def write(self, data: object, /) -> int:
        """Raises:
        OutputLost: with the cause.
        """
        try:
            return self.put(data)
        except OSError as error:
            raise OutputLost(
                f"can't write to standard output: {error.strerror}", is_closed=error.errno == errno.EPIPE
            ) from error


class StandardError(_Standard):
    """File descriptor 2. What can't be said there is lost, and no reason to end an answer."""

    def write(self, data: object, /) -> int:
        try:
            return self.put(data)
        except OSError:
            return memoryview(data).nbytes  # pyright: ignore[reportArgumentType]


def never_wait_for_readers() -> None:
    """From now on this process serves others: nobody who reads what it writes may hold it up."""
    for stream in _get_standard():
        stream.aside = stream.aside or Aside(stream.fileno())


def finish_writing() -> None:
    """Before this process ends: what is still to be read, if anybody does, has :data:`FLUSH_S`."""
    for stream in _get_standard():
        if stream.aside is not None:
            stream.aside.wait(FLUSH_S)


def _get_standard() -> list[_Standard]:
    """None where a test put others in their place."""
    raws = [getattr(getattr(stream, "buffer", None), "raw", None) for stream in (sys.stdout, sys.stderr)]
    return [raw for raw in raws if isinstance(raw, _Standard)]


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
        io.BufferedWriter(StandardOutput(1), BUFFER_BYTES), encodings[0], "replace", line_buffering=os.isatty(1)
    )
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(StandardError(2), BUFFER_BYTES), encodings[1], "replace", line_buffering=True
    )
