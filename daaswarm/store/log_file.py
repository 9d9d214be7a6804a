"""``logs/node.log``: the format of a line, and reading it across rotation, once or for ever.

A line is ``2026-05-01T12:00:00.123Z WARNING daaswarm.net.session: text``. Further lines of the same record (a
traceback) are indented, so that no text from outside can pass for a record.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

LOG_FILE_BYTES = 5_000_000  # of one file; about 40,000 lines, a week of a node at level info
LOG_FILES = 5  # kept, the current one included: 25 MB at most
INDENT = "    "
LINE_BYTES = 64_000  # read of one line at most; a file that isn't a log may have no line ends at all
RECORD_CHARS = 256_000  # of one record; a deep traceback has a tenth

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_LINE = re.compile(r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (DEBUG|INFO|WARNING|ERROR|CRITICAL) ([\w.]+): (.*)$")


class LogRecord(msgspec.Struct):
    """One record as it was read; ``text`` may have several lines."""

    time: str
    level: str
    logger: str
    text: str

    @property
    def severity(self) -> int:
        """As in :mod:`logging`."""
        return logging.getLevelName(self.level)

    def format(self) -> str:
        return f"{self.time} {self.level} {self.logger}: " + self.text.replace("\n", f"\n{INDENT}")


class LogFormatter(logging.Formatter):
    """Time in UTC with its zone, level, logger, text; further lines indented, control characters escaped."""

    converter = time.gmtime
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).rstrip("\n").split("\n")
        return f"\n{INDENT}".join(map(_escape, lines))


def _escape(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)


def get_log_files(path: Path) -> list[Path]:
    """``[node.log.4, …, node.log.1, node.log]`` as far as they exist: oldest first."""
    rotated = [path.with_name(f"{path.name}.{number}") for number in range(LOG_FILES - 1, 0, -1)]
    return [file for file in [*rotated, path] if file.is_file()]


class LogReader:
    """Reads the records of a log that is being written and rotated meanwhile.

    Args:
        path: the current file.
        level: records below it are left out, as in :mod:`logging`.

    Raises (all methods):
        OSError: a file can't be read.
    """

    def __init__(self, path: Path, level: int = logging.NOTSET) -> None:
        self._path = path
        self._level = level
        self._file: BinaryIO | None = None
        self._partial = b""
        self._pending: LogRecord | None = None

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._close()

    def read_last(self, count: int) -> list[LogRecord]:
        """The last ``count`` records; what is written later is for :meth:`read_new`."""
        last: deque[LogRecord] = deque(maxlen=count)
        files = get_log_files(self._path)
        for file in files:
            self._open(file)
            last.extend(self._read_open())
        # The rest of a record that is just being written comes with the next look.
        return list(last)

    def read_new(self) -> Iterator[LogRecord]:
        """What has been written since the last look, in as many files as it went to."""
        while True:
            if self._file is None:
                files = get_log_files(self._path)
                if not files:
                    return
                self._open(files[0])
            newer = self._get_newer()  # before reading: what is in this file by then is all there will be
            yield from self._read_open()
            if newer is None:
                break
            self._open(newer)
        yield from self._take_pending()

    def _get_newer(self) -> Path | None:
        """The file after the open one; ``None`` while that is the current one."""
        assert self._file is not None
        mine = os.fstat(self._file.fileno())
        files = get_log_files(self._path)
        for at, file in enumerate(files):
            try:
                found = file.stat()
            except OSError:  # renamed just now: the next look finds it
                return None
            if (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino):
                if found.st_size < self._file.tell():  # emptied from outside
                    self._file.seek(0)
                return files[at + 1] if at + 1 < len(files) else None
        return files[0] if files else None  # rotated out of existence: the oldest one left

    def _open(self, file: Path) -> None:
        try:
            opened = file.open("rb")
        except FileNotFoundError:  # rotated meanwhile
            return
        self._close()
        self._file = opened

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._partial = b""

    def _read_open(self) -> Iterator[LogRecord]:
        if self._file is None:
            return
        while line := self._file.readline(LINE_BYTES):
            self._partial += line
            if line.endswith(b"\n") or len(self._partial) >= LINE_BYTES:
                whole, self._partial = self._partial, b""
                yield from self._add(whole.decode("utf-8", "replace").rstrip("\r\n"))
        yield from self._take_pending()

    def _add(self, line: str) -> Iterator[LogRecord]:
        """A line; yields the record before it when it begins another."""
        match = _LINE.match(line)
        if match:
            yield from self._take_pending()
            self._pending = LogRecord(*match.groups())
        elif self._pending is not None and len(self._pending.text) < RECORD_CHARS:
            self._pending.text += "\n" + line.removeprefix(INDENT)

    def _take_pending(self) -> Iterator[LogRecord]:
        pending, self._pending = self._pending, None
        if pending is not None and pending.severity >= self._level:
            yield pending
