"""``daaswarm reset``: what goes, what stays, and when it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from daaswarm.cli.app import run
from daaswarm.store.data_dir import DataDir
from daaswarm.store.log_file import LOG_FILES
from tests.store.store_helpers import fill
from tests.store.test_log_file import write


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataDir:
    """A folder with everything that a node leaves in it, and something of its owner's."""
    monkeypatch.setenv("DAASWARM_HOME", str(tmp_path / "home"))
    home = DataDir(tmp_path / "home")
    home.load_key()
    home.config_path.write_text("[network]\n")
    home.lock_path.write_text("")
    home.socket_path.write_text("")
    fill(home.database_path)
    for name in (
        "node.db-wal",
        "node.db-shm",
        "node.db.corrupt-20260501T120000Z",
        "node.db.corrupt-20260501T120000Z-wal",
    ):
        (home.path / name).write_text("x")
    home.log_path.parent.mkdir()
    write(home.log_path, 1)
    write(home.log_path.with_name(f"node.log.{LOG_FILES - 1}"), 1)
    home.history_path.write_text("hello")
    (home.path / "diary.txt").write_text("mine")
    return home


def get_left(home: DataDir) -> set[str]:
    return {str(path.relative_to(home.path)) for path in home.path.rglob("*")}


def test_the_key_and_the_settings_stay(home: DataDir, capsys: pytest.CaptureFixture[str]) -> None:
    key = home.key_path.read_bytes()
    assert run(["reset", "--yes"]) == 0
    assert get_left(home) == {"identity.key", "config.toml", "node.lock", "diary.txt"}
    assert home.key_path.read_bytes() == key
    out, err = capsys.readouterr()
    assert out == "" and "node.db.corrupt-20260501T120000Z-wal" in err and "in all" in err and "diary.txt" in err
    assert run(["reset", "--yes"]) == 0
    assert "nothing to remove" in capsys.readouterr().err


def test_all(home: DataDir, capsys: pytest.CaptureFixture[str]) -> None:
    size = home.database_path.stat().st_size
    assert run(["reset", "--yes", "--all", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert get_left(home) == {"node.lock", "diary.txt"}
    assert {"path": str(home.database_path), "bytes": size} in result["removed"]
    assert result["bytes"] == sum(item["bytes"] for item in result["removed"]) > size
    assert result["kept"] == [] and result["foreign"] == [str(home.path / "diary.txt")]


@pytest.mark.parametrize("arguments", [["reset"], ["reset", "--all"], ["reset", "--json"]])
def test_nobody_to_ask(
    arguments: list[str], home: DataDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    before = get_left(home)
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert "--yes" in out + err and get_left(home) == before


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("YES\n", 0), ("n\n", 1), ("\n", 1), ("", 1)])
def test_asking(
    answer: str, code: int, home: DataDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    monkeypatch.setattr("sys.stderr", shown)
    assert run(["reset"]) == code
    assert home.database_path.exists() == bool(code) and home.key_path.exists()
    assert "[y/N]" in shown.getvalue()
    assert ("nothing was removed" in shown.getvalue()) == bool(code)


def test_not_under_a_running_node(home: DataDir, capsys: pytest.CaptureFixture[str]) -> None:
    before = get_left(home)
    with home.lock():
        assert run(["reset", "--yes", "--all"]) == 2
    assert "already runs" in capsys.readouterr().err and get_left(home) == before


def test_not_somebody_elses_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "node.log").write_text("of another program")
    (tmp_path / "node.db").write_text("likewise")
    assert run(["reset", "--yes", "--all", "--data-dir", str(tmp_path)]) == 2
    assert "is not the folder of a node" in capsys.readouterr().err
    assert (tmp_path / "logs" / "node.log").exists() and (tmp_path / "node.db").exists()
    assert not (tmp_path / "node.lock").exists()


def test_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reset", "--yes", "--json", "--data-dir", str(tmp_path / "absent")]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == [] and not (tmp_path / "absent").exists()


def test_a_folder_of_logs_with_something_else_in_it(home: DataDir) -> None:
    (home.log_path.parent / "notes").write_text("mine")
    assert run(["reset", "--yes"]) == 0
    assert "logs/notes" in get_left(home) and "logs/node.log" not in get_left(home)


def test_what_only_looks_like_ours_stays(home: DataDir) -> None:
    mine = ["node.db-backup-of-mine", "node.db.corrupt-old", "chat-history.txt", ".identity-card", "control.sock.txt"]
    for name in [*mine, "logs/node.log.bak", "logs/node.log.9"]:
        (home.path / name).write_text("mine")
    (home.path / "config.toml.new").mkdir()
    assert run(["reset", "--yes"]) == 0
    left = get_left(home) - {"identity.key", "config.toml", "node.lock", "diary.txt", "logs"}
    assert left == {*mine, "logs/node.log.bak", "logs/node.log.9", "config.toml.new"}


def test_of_a_link_the_link_goes(home: DataDir, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    home.log_path.parent.rename(elsewhere)
    home.log_path.parent.symlink_to(elsewhere)
    home.history_path.rename(tmp_path / "history")
    home.history_path.symlink_to(tmp_path / "history")
    before = {path.name for path in elsewhere.iterdir()}
    assert run(["reset", "--yes"]) == 0
    assert get_left(home) == {"identity.key", "config.toml", "node.lock", "diary.txt"}
    assert {path.name for path in elsewhere.iterdir()} == before and (tmp_path / "history").read_text() == "hello"


def test_of_a_relative_folder(home: DataDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home.path.parent)
    assert run(["reset", "--yes", "--data-dir", home.path.name]) == 0
    assert get_left(home) == {"identity.key", "config.toml", "node.lock", "diary.txt"}
