"""The log's format, and reading it while it is written and rotated."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from daaswarm.store import log_file
from daaswarm.store.log_file import LogFormatter, LogReader, get_log_files


def line(number: int, level: str = "INFO") -> str:
    return f"2026-05-01T12:00:00.{number:03d}Z {level} daaswarm.test: number {number}\n"


def write(path: Path, *numbers: int, level: str = "INFO") -> None:
    with path.open("a") as file:
        file.writelines(line(number, level) for number in numbers)


def rotate(path: Path) -> None:
    """As ``logging.handlers.RotatingFileHandler`` does."""
    for number in range(log_file.LOG_FILES - 2, 0, -1):
        source = path.with_name(f"{path.name}.{number}")
        if source.exists():
            source.rename(path.with_name(f"{path.name}.{number + 1}"))
    path.rename(path.with_name(f"{path.name}.1"))


def read_new(reader: LogReader) -> list[int]:
    return [int(record.text.split()[-1]) for record in reader.read_new()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "node.log"


def format_one(text: str, *args: object, error: Exception | None = None) -> str:
    info = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord("daaswarm.test", logging.WARNING, "", 0, text, args, info)
    return LogFormatter().format(record)


def test_a_line() -> None:
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z WARNING daaswarm\.test: peer é said hi",
        format_one("peer %s said hi", "é"),
    )


def test_the_time_is_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    record = logging.LogRecord("daaswarm.test", logging.WARNING, "", 0, "x", (), None)
    record.created, record.msecs = 1_800_000_000.25, 250.0
    assert LogFormatter().format(record) == "2027-01-15T08:00:00.250Z WARNING daaswarm.test: x"


def test_nothing_from_outside_looks_like_a_record(path: Path) -> None:
    forged = f"hello\r\n{line(1)}\x1b[2J\x00"
    path.write_text(format_one("a peer said %s", forged) + "\n")
    with LogReader(path) as reader:
        (record,) = reader.read_last(9)
    assert "\x1b" not in record.text and "\\x1b[2J\\x00" in record.text and "number 1" in record.text
    assert record.level == "WARNING" and len(record.text.split("\n")) == 3


def test_a_traceback_belongs_to_its_record(path: Path) -> None:
    try:
        raise ValueError("no")
    except ValueError as error:
        text = format_one("it failed", error=error)
    path.write_text(text + "\n" + line(2))
    with LogReader(path, logging.WARNING) as reader:
        (record,) = reader.read_last(9)
    assert record.text.startswith("it failed\nTraceback") and record.text.endswith("ValueError: no")
    assert record.format() == text


def test_the_last_ones_across_files(path: Path) -> None:
    for numbers in ((1, 2), (3, 4), (5, 6)):
        write(path, *numbers)
        if numbers != (5, 6):
            rotate(path)
    assert [file.name for file in get_log_files(path)] == ["node.log.2", "node.log.1", "node.log"]
    for count, expected in ((0, []), (3, [4, 5, 6]), (99, [1, 2, 3, 4, 5, 6])):
        with LogReader(path) as reader:
            assert [int(record.text.split()[-1]) for record in reader.read_last(count)] == expected


def test_levels(path: Path) -> None:
    write(path, 1, level="DEBUG")
    write(path, 2, level="WARNING")
    write(path, 3)
    write(path, 4, level="CRITICAL")
    with LogReader(path, logging.WARNING) as reader:
        assert [record.level for record in reader.read_last(9)] == ["WARNING", "CRITICAL"]
        write(path, 5)
        write(path, 6, level="ERROR")
        assert read_new(reader) == [6]


def test_following_across_rotations(path: Path) -> None:
    with LogReader(path) as reader:
        assert reader.read_last(9) == [] and read_new(reader) == []  # there is no file yet
        write(path, 1)
        assert read_new(reader) == [1] and read_new(reader) == []
        write(path, 2)
        rotate(path)
        assert read_new(reader) == [2]  # the rest of the old file, the new one isn't there yet
        write(path, 3)
        assert read_new(reader) == [3]
        write(path, 4)
        rotate(path)
        write(path, 5)
        rotate(path)
        write(path, 6)
        assert read_new(reader) == [4, 5, 6]
        for number in range(7, 7 + 2 * log_file.LOG_FILES):  # more than are kept, between two looks
            rotate(path)
            path.with_name(f"node.log.{log_file.LOG_FILES}").unlink(missing_ok=True)
            write(path, number)
        found = read_new(reader)
        assert found == sorted(found) and found[-1] == 6 + 2 * log_file.LOG_FILES
        assert read_new(reader) == []


def test_following_a_file_that_is_emptied(path: Path) -> None:
    write(path, 1, 2, 3)
    with LogReader(path) as reader:
        assert len(reader.read_last(9)) == 3
        path.write_text("")
        write(path, 4)
        assert read_new(reader) == [4]


def test_half_a_line_is_waited_for(path: Path) -> None:
    whole = line(1)
    path.write_text(whole[:30])
    with LogReader(path) as reader:
        assert reader.read_last(9) == []
        with path.open("a") as file:
            file.write(whole[30:])
        assert read_new(reader) == [1]


def test_a_file_that_is_no_log(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 4000)
    with LogReader(path) as reader:
        assert reader.read_last(9) == []
        write(path, 1)
        read_new(reader)
        write(path, 2)
        assert read_new(reader) == [2]
