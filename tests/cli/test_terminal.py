"""Terminals as they are: narrow, without colour, without UTF-8, without a cursor that moves; and questions on them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from daaswarm.cli.app import run
from daaswarm.cli.output import Output
from daaswarm.cli.progress import Bars
from daaswarm.store.data_dir import DataDir
from daaswarm.store.database import Database
from daaswarm.store.records import Deployment, ModelRecord, PeerRecord
from daaswarm.types import ModelRoot, PeerId
from tests.e2e.terminal import CTRL_C, CTRL_D, ENTER, terminal

COLOR = "\x1b[1m"  # names of status are bold


def make_bars(**options: object) -> tuple[Bars, Console, io.StringIO]:
    shown = io.StringIO()
    return Bars(), Console(file=shown, force_terminal=True, **options), shown  # type: ignore[arg-type]


def test_bars_come_and_go() -> None:
    bars, console, shown = make_bars(width=80)
    bars.show(console, "loading", 1, 4)
    bars.show(console, "waiting", 0, 0)
    bars.show(console, "loading", 4, 4)  # full, so it goes; the other one stays
    bars.print(console, "a line in between")
    assert shown.getvalue().count("\x1b[?25l") == 1 and "\x1b[?25h" not in shown.getvalue()
    bars.end()
    assert "25%" in shown.getvalue() and "a line in between\n" in shown.getvalue()
    assert shown.getvalue().endswith("\x1b[2K") or "\x1b[?25h" in shown.getvalue()  # the cursor is back
    bars.end()


def test_a_narrow_terminal_keeps_the_words() -> None:
    bars, console, shown = make_bars(width=40)
    bars.show(console, "waiting for the answer", 0, 0)
    bars.end()
    assert "waiting for the answer" in shown.getvalue()


def test_no_bars_where_the_cursor_can_not_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    bars, console, shown = make_bars()
    bars.show(console, "loading", 1, 2)
    bars.end()
    assert shown.getvalue() == ""


PEER = "12D3KooWH3uVF6wv47WnArKHk5p6cvgCJEb74UTmxztmQDc298L3"
HEAD = ["peer", "", "round trip", "addresses"]
ROWS = [(PEER, "connected", "1.0 ms", "/ip4/1.2.3.4/tcp/1 /ip4/5.6.7.8/tcp/2"), ("x\x1b[2J[b]", "", "", "")]


def make_output(*, width: int, is_terminal: bool) -> tuple[Output, io.StringIO]:
    output, shown = Output(as_json=False), io.StringIO()
    output.answers = Console(file=shown, width=width, force_terminal=is_terminal, color_system=None)
    return output, shown


@pytest.mark.parametrize(("width", "is_terminal"), [(40, False), (200, True)])
def test_a_line_for_a_row_where_there_is_room_or_no_terminal(width: int, is_terminal: bool) -> None:
    output, shown = make_output(width=width, is_terminal=is_terminal)
    output.table(HEAD, ROWS)
    head, first, second = shown.getvalue().splitlines()
    assert head.split() == ["peer", "round", "trip", "addresses"] and second == "x\\x1b[2J[b]"
    assert first.index("/ip4/1.2.3.4") == head.index("addresses") and first.startswith(f"{PEER}  connected")


def test_columns_below_each_other_on_a_narrow_terminal() -> None:
    output, shown = make_output(width=40, is_terminal=True)
    output.table(HEAD, ROWS)
    assert shown.getvalue().splitlines() == [
        f"peer        {PEER}",  # the terminal breaks it, so that it is copied whole
        "            connected",
        "round trip  1.0 ms",
        "addresses   /ip4/1.2.3.4/tcp/1",
        "            /ip4/5.6.7.8/tcp/2",
        "",
        "peer        x\\x1b[2J[b]",
    ]


@pytest.mark.e2e
@pytest.mark.parametrize("command", ["peers list", "expert list", "model list"])
def test_tables_in_a_narrow_terminal(command: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    database = Database.open(DataDir(home).database_path)
    known = PeerRecord(peer_id=PeerId(PEER), addrs=["/ip4/1.2.3.4/tcp/1"], first_seen=1.0, last_seen=2.0)
    database.save([known], [], [], 3.0)
    root = ModelRoot("ab" * 32)
    held = {layer: list(range(layer, layer + 9, 2)) for layer in range(4)}
    database.put_deployment(
        Deployment(model_root=root, dtype="f32", name="tiny", source="/models/tiny", held=held, created_at=1.0)
    )
    database.put_model(ModelRecord(folder="/models/tiny", model_root=root, name="tiny", kind="moe", used_at=1.0))
    database.close()
    options = ["--data-dir", str(home)]
    with terminal(*command.split(), *options, columns=40, DAASWARM_CACHE=str(tmp_path / "cache")) as shown:
        assert shown.wait() == 0
    lines = [line for line in shown.text.splitlines() if "no node runs" not in line]
    assert len(lines) >= 3 and all(len(line) <= 40 or PEER in line for line in lines), lines


@pytest.mark.parametrize(
    ("extra", "has_color"), [({}, True), ({"NO_COLOR": "1"}, True), ({"TERM": "dumb"}, False)], ids=str
)
def test_colours(tmp_path: Path, extra: dict[str, str], has_color: bool) -> None:
    """NO_COLOR forbids colours; bold is none."""
    with terminal("status", "--data-dir", str(tmp_path), columns=40, **extra) as shown:
        assert shown.wait() == 0
        assert (COLOR in shown.raw.decode()) is has_color
        assert f"folder   {tmp_path}" in shown.text  # in one piece, as narrow as it is
    with terminal("status", "--bogus", **extra) as shown:
        assert shown.wait() == 2
        assert ("\x1b[1;31m" in shown.raw.decode()) is (extra == {})
        assert "error: No such option: --bogus" in shown.text


@pytest.mark.parametrize("arguments", [["--help"], ["infer", "--help"], ["status"], ["status", "--json"]], ids=" ".join)
def test_a_terminal_without_utf8(tmp_path: Path, arguments: list[str]) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "40"}
    environment["DAASWARM_HOME"] = str(tmp_path / "é")
    done = subprocess.run([sys.executable, "-m", "daaswarm", *arguments], capture_output=True, env=environment)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    if "--json" in arguments:
        assert json.loads(done.stdout.decode("ascii"))["running"] is False
    else:
        assert done.stdout.isascii() and b"\x1b" not in done.stdout


# -- init ---------------------------------------------------------------------------------------------------------


def test_init_asks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "my node"
    with terminal("init", HOME=str(tmp_path)) as shown:
        shown.wait_for("Folder of this node")
        shown.wait_for("] ")
        shown.type(f"{home}\n")
        shown.wait_for("[main] ")
        shown.type("mine\n")
        shown.wait_for("tcp/0] ")
        shown.type("here\n")
        shown.wait_for("error: --listen 'here'")
        shown.wait_for("tcp/0] ")
        shown.type(ENTER)
        shown.wait_for("[2GB] ")
        shown.type("4GB\n")
        shown.wait_for("instruct] ")
        shown.type(ENTER)
        assert shown.wait() == 0
        assert f"next: daaswarm join --data-dir '{home}'" in shown.text and "or:   daaswarm infer" in shown.text
    key = DataDir(home).key_path.read_bytes()
    settings = DataDir(home).config_path.read_text()
    assert 'swarm = "mine"' in settings and 'memory = "4GB"' in settings and "listen" not in settings
    with terminal("init", "--data-dir", str(home)) as shown:  # everything accepted: nothing changes
        for proposed in ("[mine] ", "tcp/0] ", "[4GB] ", "instruct] "):
            shown.wait_for(proposed)
            shown.type(ENTER)
        assert shown.wait() == 0 and "has an identity already" in shown.text
    assert (DataDir(home).key_path.read_bytes(), DataDir(home).config_path.read_text()) == (key, settings)
    assert run(["init", "--data-dir", str(home)]) == 0  # no terminal: no questions
    assert "[mine]" not in capsys.readouterr().err


@pytest.mark.parametrize(("key", "said"), [(CTRL_C, ""), (CTRL_D, "interrupted")], ids=["Ctrl-C", "Ctrl-D"])
def test_init_is_left(tmp_path: Path, key: str, said: str) -> None:
    with terminal("init", HOME=str(tmp_path)) as shown:
        shown.wait_for("] ")
        shown.type(key)
        assert shown.wait() == 130 and said in shown.text and "Traceback" not in shown.text
    assert list(tmp_path.iterdir()) == []
