"""The commands that need no network: init, config, status; and what starting the program costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from daaswarm import __version__
from daaswarm.api.control import Emit, serve_control
from daaswarm.cli.app import run
from daaswarm.cli.output import Output
from daaswarm.config import get_keys
from daaswarm.models.sources import DEFAULT_MODEL
from daaswarm.store.data_dir import DataDir
from daaswarm.store.database import Database
from daaswarm.store.records import PeerRecord
from daaswarm.types import PeerId

PEER = "12D3KooWH3uVF6wv47WnArKHk5p6cvgCJEb74UTmxztmQDc298L3"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DAASWARM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DAASWARM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "home"


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A command that succeeds; its standard output."""

    def ask(*arguments: str) -> str:
        assert run(list(arguments)) == 0, capsys.readouterr()
        return capsys.readouterr().out

    return ask


@pytest.fixture
def ask_json(ask: Callable[..., str]) -> Callable[..., Any]:
    def ask_json(*arguments: str) -> Any:
        (line,) = ask(*arguments, "--json").splitlines()
        return json.loads(line)

    return ask_json


# -- init ---------------------------------------------------------------------------------------------------------


def test_init_twice_changes_nothing(ask_json: Callable[..., Any], home: Path) -> None:
    first = ask_json("init")
    assert first["created"] is True and first["data_dir"] == str(home)
    key = (home / "identity.key").read_bytes()
    second = ask_json("init")
    assert second == {**first, "created": False}
    assert (home / "identity.key").read_bytes() == key
    assert first["peer_id"].startswith("12D3Koo")


def test_init_where_it_is_told(ask_json: Callable[..., Any], tmp_path: Path, home: Path) -> None:
    assert ask_json("init", "--data-dir", str(tmp_path / "other"))["data_dir"] == str(tmp_path / "other")
    assert not home.exists()


def test_init_for_people(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    assert run(["init"]) == 0
    out, err = capsys.readouterr()
    peer_id, folder, settings = out.splitlines()  # the result, and nothing else
    assert "12D3Koo" in peer_id and folder.endswith(str(home)) and settings.endswith(str(home / "config.toml"))
    assert "made a new identity" in err and "next: daaswarm join" in err


# -- config -------------------------------------------------------------------------------------------------------


def test_config(
    ask: Callable[..., str], ask_json: Callable[..., Any], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask("config", "path") == f"{home / 'config.toml'}\n"
    assert ask_json("config", "path") == {"path": str(home / "config.toml")}
    assert ask("config", "get", "host.memory") == "2GB\n"
    assert list(ask_json("config", "get")) == list(get_keys())
    assert len(ask("config", "get").splitlines()) == len(get_keys())
    assert not home.exists()  # reading writes nothing

    assert ask_json("config", "set", "infer.max_tokens", "12") == {"infer.max_tokens": 12}
    addresses = [f"/ip4/192.0.2.{n}/tcp/4001/p2p/{PEER}" for n in (1, 2)]
    assert ask_json("config", "set", "network.bootstrap", ",".join(addresses)) == {"network.bootstrap": addresses}
    assert json.loads(ask("config", "get", "network.bootstrap")) == addresses
    assert ask_json("config", "get", "infer.max_tokens") == {"infer.max_tokens": 12}
    monkeypatch.setenv("DAASWARM_INFER_MAX_TOKENS", "13")
    assert ask("config", "get", "infer.max_tokens") == "13\n"


# -- status -------------------------------------------------------------------------------------------------------


def test_status_of_nothing(ask_json: Callable[..., Any], ask: Callable[..., str], home: Path) -> None:
    found = ask_json("status")
    assert found == {
        "running": False,
        "peer_id": None,
        "data_dir": str(home),
        "addrs": [],
        "known_peers": [],
        "hosted": [],
        "models": [],
    }
    assert not home.exists()
    assert "not running" in ask("status")


def test_status_from_disk(ask_json: Callable[..., Any], home: Path) -> None:
    peer_id = ask_json("init")["peer_id"]
    path = DataDir(home).database_path
    database = Database.open(path)
    database.save([PeerRecord(peer_id=PeerId(PEER), addrs=[], first_seen=1.0, last_seen=2.0)], [], [], 3.0)
    database.close()
    found = ask_json("status")
    assert found["peer_id"] == peer_id and found["known_peers"] == [PEER] and not found["running"]
    assert [file.name for file in home.glob("node.db*")] == ["node.db"]  # looking leaves nothing behind
    path.write_bytes(b"garbage" * 1000)
    assert ask_json("status")["known_peers"] == [] and path.read_bytes() == b"garbage" * 1000


async def test_status_of_a_running_node(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    hosted = {
        "name": "m",
        "root": "ab" * 32,
        "dtype": "f32",
        "bytes": 12_600_000,
        "calls": 7,
        "rows": 9,
        "held": {"0": [0, 1], "1": [0, 1], "2": [3]},
    }
    status = {
        "running": True,
        "pid": 42,
        "peer_id": PEER,
        "data_dir": str(home),
        "addrs": ["/ip4/127.0.0.1/tcp/1"],
        "known_peers": [PEER],
        "hosted": [hosted],
        "models": [],
    }

    async def handle(method: str, params: dict[str, Any], emit: Emit) -> dict[str, Any]:
        assert (method, params) == ("status", {})
        return status

    DataDir(home).create()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, DataDir(home).socket_path, handle)
        assert await trio.to_thread.run_sync(run, ["status", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == status
        assert await trio.to_thread.run_sync(run, ["status"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        nursery.cancel_scope.cancel()
    assert "running (process 42)" in shown and "m f32, 12.6 MB, layers 0-1: 0-1, 2: 3; 7 calls" in shown


def test_status_keeps_an_address_on_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from daaswarm.cli.status import render

    monkeypatch.setenv("COLUMNS", "40")
    address = f"/ip4/127.0.0.1/tcp/12345/p2p/{PEER}"
    found = {"running": True, "pid": 1, "peer_id": PEER, "data_dir": "/x" * 40, "addrs": [address], "known_peers": []}
    render({**found, "hosted": [], "models": []}, Output(as_json=False))
    lines = capsys.readouterr().out.splitlines()
    assert f"address  {address}" in lines and "folder   " + "/x" * 40 in lines


# -- output -------------------------------------------------------------------------------------------------------


def test_a_terminal_without_utf8_gets_ascii_json(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, "latin-1", write_through=True))
    Output(as_json=True).json({"text": "é 😀"})
    assert json.loads(raw.getvalue()) == {"text": "é 😀"} and raw.getvalue().isascii()


def test_messages_start_on_a_line_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(as_json=False)
    output.text("half a line")
    output.message("[b]not markup[/b] :x:")
    out, err = capsys.readouterr()
    assert out == "half a line\n" and err == "[b]not markup[/b] :x:\n"


# -- starting -----------------------------------------------------------------------------------------------------

HEAVY = (
    "torch",
    "prompt_toolkit",
    "transformers",
    "libp2p",
    "safetensors",
    "accelerate",
    "numpy",
    "daaswarm.node.life",
)


def get_imports(*arguments: str) -> set[str]:
    """The modules that one command line imports."""
    code = (
        "import sys, json, io, contextlib\n"
        "from daaswarm.cli.app import run\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        f"    assert run({list(arguments)!r}) == 0\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["status"], ["logs"], ["--version"], ["init"], ["config", "get"], ["infer", "--help"]]
)
def test_what_needs_no_model_imports_nothing_heavy(arguments: list[str]) -> None:
    imported = get_imports(*arguments)
    assert not imported & set(HEAVY)


def test_help_and_version(ask: Callable[..., str]) -> None:
    shown = ask("--help")
    for command in ("init", "join", "host-expert", "infer", "status", "logs", "reset", "bench", "config"):
        assert command in shown
    assert ask("--version") == f"daaswarm {__version__}\n"
    assert "serve-expert" not in ask("bench", "--help")


def test_completion_knows_keys_and_models() -> None:
    from daaswarm.cli.config import get_completions
    from daaswarm.cli.host_expert import complete_models

    assert get_completions("network.l") == ["network.listen", "network.libp2p", "network.lan"]
    assert complete_models("smol") == [DEFAULT_MODEL]


def test_a_model_in_this_folder_becomes_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from daaswarm.cli.host_expert import locate_model

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / DEFAULT_MODEL).mkdir()
    assert locate_model("mine") == str(tmp_path / "mine")
    assert locate_model(DEFAULT_MODEL) == DEFAULT_MODEL and locate_model("absent") == "absent"


def test_status_of_a_folder_with_an_odd_name(ask: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "[/x] :x:").mkdir(parents=True)
    assert str(tmp_path / "[/x] :x:") in ask("status", "--data-dir", str(tmp_path / "[/x] :x:"))


def test_a_terminal_is_not_steered_by_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shown in ((Terminal(), "a\ufffd[2J\té\n"), (io.StringIO(), "a\x1b[2J\té\n")):
        monkeypatch.setattr("sys.stdout", stream)
        Output(as_json=False).text("a\x1b[2J\té\n")
        assert stream.getvalue() == shown
