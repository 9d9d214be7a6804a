"""Sets logging up: to standard error in every command, and to a file where a node runs."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import queue
import sys
import threading
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

from daaswarm.store.log_file import LOG_FILE_BYTES, LOG_FILES, LogFormatter

FLUSH_S = 2.0  # for the last records to be written; a disk that hangs must not hold the prompt back
BACKLOG = 10_000  # records that a slow disk may be behind; then they are dropped, not the node held up

logger = logging.getLogger("daaswarm")


def set_up_logging(level: str) -> None:
    """Log to standard error; third parties only when something is wrong."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    handler.setLevel(level.upper())
    logging.basicConfig(handlers=[handler], level=logging.ERROR)
    logger.setLevel(level.upper())


@contextlib.contextmanager
def log_to_file(path: Path, level: str) -> Iterator[None]:
    """Log to ``path`` as well during the block, from a thread of its own: a slow or full disk never stops a node.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``; that of standard error stays as it is.
    """
    records: queue.Queue[logging.LogRecord | None] = queue.Queue(BACKLOG)
    sender = _Sender(records)
    sender.setLevel(level.upper())
    writer = threading.Thread(target=_write, args=(records, _LogFile(path)), name="log file", daemon=True)
    before = logger.level
    logger.setLevel(min(before or logging.CRITICAL, sender.level))
    root = logging.getLogger()
    root.addHandler(sender)
    writer.start()
    try:
        yield
    finally:
        root.removeHandler(sender)
        logger.setLevel(before)
        with contextlib.suppress(queue.Full):
            records.put(None, timeout=FLUSH_S)
        writer.join(FLUSH_S)


def _write(records: queue.Queue[logging.LogRecord | None], file: logging.Handler) -> None:
    """In a thread: until there is a ``None``."""
    while (record := records.get()) is not None:
        file.handle(record)
    file.close()


class _Sender(logging.handlers.QueueHandler):
    def enqueue(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(record)

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """As it is: the record stays in this process, and the formatter needs its traceback."""
        record.message = record.getMessage()  # now: what the arguments say may change
        record.msg, record.args = record.message, None
        return record


class _LogFile(logging.handlers.RotatingFileHandler):
    """The file; while it can't be written, one line on standard error says so. Used by one thread."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            path, maxBytes=LOG_FILE_BYTES, backupCount=LOG_FILES - 1, encoding="utf-8", errors="replace", delay=True
        )
        self.setFormatter(LogFormatter())
        self._path = path
        self._is_failing = False
        self._has_warned = False

    def emit(self, record: logging.LogRecord) -> None:
        self._is_failing = False
        super().emit(record)
        if not self._is_failing:
            self._has_warned = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._is_failing = True
        if not self._has_warned:
            self._has_warned = True
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"warning: {self._path} can't be written, the node goes on: {error.strerror}\n")
        if self.stream is not None:
            with contextlib.suppress(OSError):
                self.stream.close()
            self.stream = None  # type: ignore[assignment] - opened anew with the next record

    def _open(self) -> TextIOWrapper:
        """The file, at the start of a line: a full disk or a killed process may have left half of one."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        opened = super()._open()
        if opened.tell():
            with self._path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    opened.write("\n")
        return opened
