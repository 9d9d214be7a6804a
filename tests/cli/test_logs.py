"""The log file of a node: written from a thread, rotated, never the node's end; and ``daaswarm logs``."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from daaswarm.cli import log_setup
from daaswarm.cli.app import run
from daaswarm.cli.log_setup import log_to_file
from daaswarm.store.data_dir import DataDir
from daaswarm.store.log_file import LOG_FILES, LogReader, get_log_files
from tests.store.test_log_file import line, write
from tests.store.test_node_store import full_disk

logger = logging.getLogger("daaswarm.test")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DAASWARM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def path(home: Path) -> Path:
    return DataDir(home).log_path


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """As in a command whose standard error shows warnings only."""
    root = logging.getLogger("daaswarm")
    before = root.level
    root.setLevel(logging.WARNING)
    yield
    root.setLevel(before)


def read(path: Path) -> list[str]:
    with LogReader(path) as reader:
        return [record.text for record in reader.read_last(10_000)]


# -- writing ------------------------------------------------------------------------------------------------------


def test_the_file_has_its_own_level(path: Path) -> None:
    with log_to_file(path, "info"):
        logger.debug("no")
        logger.info("yes %d", 1)
        logging.getLogger("elsewhere").error("and %s", "others")
    logger.info("not any more")
    assert read(path) == ["yes 1", "and others"] and logging.getLogger("daaswarm").level == logging.WARNING
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_it_rotates(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_setup, "LOG_FILE_BYTES", 1_000)
    with log_to_file(path, "info"):
        for number in range(200):
            logger.info("record %d", number)
    files = get_log_files(path)
    assert len(files) == LOG_FILES and all(file.stat().st_size <= 1_000 for file in files)
    found = read(path)
    assert found[-1] == "record 199" and found == [f"record {n}" for n in range(200 - len(found), 200)]


def test_half_a_line_of_a_killed_process_stays_alone(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(line(1) + line(2)[:40])
    with log_to_file(path, "info"):
        logger.info("after")
    assert read(path)[-1] == "after"


def test_a_full_disk_is_said_once_and_waited_for(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with log_to_file(path, "info"):
        logger.info("one %s", "x" * 20_000)  # longer than what is said, which goes to a file too
        wait_until_written(path)
        with full_disk(path.stat().st_size + 10):
            for _ in range(5):
                logger.info("lost")
            wait_until_said(capfd)
        logger.info("two")
    found = read(path)
    assert found[0].startswith("one") and found[-1] == "two"
    assert "can't be written" not in capfd.readouterr().err


def wait_until_written(path: Path) -> None:
    for _ in range(500):
        if path.exists() and path.stat().st_size:
            return
        threading.Event().wait(0.01)
    raise AssertionError("nothing was written")


def wait_until_said(capfd: pytest.CaptureFixture[str]) -> None:
    said = ""
    for _ in range(500):
        said += capfd.readouterr().err
        if "the node goes on" in said:
            assert said.count("can't be written") == 1
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"nothing was said: {said}")


def test_a_folder_that_can_not_be_made(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").write_text("a file")
    with log_to_file(tmp_path / "logs" / "node.log", "info"):
        logger.info("one")
        logger.info("two")
    assert capfd.readouterr().err.count("can't be written, the node goes on") == 1


def test_a_slow_disk_drops_records_and_holds_nobody_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(log_setup, "BACKLOG", 3)
    original = log_setup._LogFile.emit
    monkeypatch.setattr(log_setup._LogFile, "emit", lambda self, record: gate.wait(10) and original(self, record))
    with log_to_file(path, "info"):
        for number in range(100):
            logger.info("record %d", number)
        gate.set()
    assert 1 <= len(read(path)) < 100


# -- reading ------------------------------------------------------------------------------------------------------


def test_no_log_yet(home: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["logs"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and str(path) in err.replace("\n", "")
    assert run(["logs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(path), "records": 0}
    assert not home.exists()


def test_logs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.parent.mkdir(parents=True)
    write(path, *range(60))
    write(path, 60, level="ERROR")
    assert run(["logs"]) == 0
    assert capsys.readouterr().out == "".join(map(line, range(11, 60))) + line(60, "ERROR")
    assert run(["logs", "--lines", "1", "--level", "warning", "--json"]) == 0
    record, end = map(json.loads, capsys.readouterr().out.splitlines())
    assert record == {
        "event": "log",
        "time": "2026-05-01T12:00:00.060Z",
        "level": "error",
        "logger": "daaswarm.test",
        "text": "number 60",
    }
    assert end == {"path": str(path), "records": 1}


@pytest.mark.parametrize(
    "arguments", [["--level", "loud"], ["--lines", "-1"], ["--lines", "many"], ["--lines", "1000001"], ["more"]]
)
def test_bad_input(arguments: list[str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["logs", *arguments, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "bad_input" and error["hint"] and "\n" not in error["message"]


def test_a_log_that_is_a_folder_is_no_log(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.mkdir(parents=True)
    assert run(["logs"]) == 0 and "no log yet" in capsys.readouterr().err


def test_following_until_ctrl_c(path: Path) -> None:
    path.parent.mkdir(parents=True)
    write(path, 1)
    command = [sys.executable, "-m", "daaswarm", "logs", "-f", "--data-dir", str(path.parent.parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    lines: queue.Queue[str] = queue.Queue()
    assert process.stdout is not None
    with process, process.stdout as out:
        reader = threading.Thread(target=lambda: [lines.put(text) for text in out])
        reader.start()
        assert lines.get(timeout=60) == line(1)
        path.rename(path.with_name("node.log.1"))
        write(path, 2)
        assert lines.get(timeout=60) == line(2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        reader.join()
        assert process.stderr is not None and process.stderr.read() == ""
