"""The commands expert and peers: what they refuse, and what they say where no node runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from daaswarm.cli.app import run
from daaswarm.cli.expert import describe_held
from daaswarm.cli.peers import format_age
from daaswarm.store.data_dir import DataDir
from daaswarm.store.database import Database
from daaswarm.store.records import Deployment, PeerRecord
from daaswarm.types import ModelRoot, PeerId

PEER = "12D3KooWH3uVF6wv47WnArKHk5p6cvgCJEb74UTmxztmQDc298L3"
ROOT = ModelRoot("ab" * 32)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DAASWARM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DAASWARM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "home"


@pytest.fixture
def remembering(home: Path) -> Path:
    home.mkdir()
    database = Database.open(DataDir(home).database_path)
    database.save(
        [PeerRecord(peer_id=PeerId(PEER), addrs=["/ip4/1.2.3.4/tcp/1"], first_seen=1.0, last_seen=2.0)], [], [], 3.0
    )
    database.put_deployment(
        Deployment(
            model_root=ROOT, dtype="f32", name="tiny", source="/models/tiny", held={0: [0, 1], 1: [0, 1], 4: [2]},
            created_at=1.0,
        )
    )  # fmt: skip
    database.close()
    return home


BAD: list[tuple[list[str], int, str]] = [
    (["expert", "deploy", "m"], 2, "no node runs on"),
    (["expert", "remove", "m"], 2, "no node runs on"),
    (["expert", "deploy", "m", "--layers", "x"], 2, "--layers 'x' is not a range"),
    (["expert", "deploy", "m", "--experts", "0", "--slices", "0"], 2, "--experts and --slices exclude each other"),
    (["expert", "deploy", "m", "--dtype", "int8"], 2, "--dtype 'int8' is not served"),
    (["expert", "deploy", "m", "--memory", "lots"], 2, "--memory 'lots' is not an amount"),
    (["expert", "deploy", "m", "--memory", "1GB", "--layers", "0"], 2, "--memory and ranges exclude each other"),
    (["expert", "remove", "m", "--layers", "3-1"], 2, "--layers '3-1': 3 is greater than 1"),
    (["expert", "list", "--model", "m"], 2, "--model goes with --available"),
    (["expert", "list", "--bootstrap", "/ip4/127.0.0.1/tcp/1"], 2, "--bootstrap goes with --available"),
    (["expert", "list", "--available"], 2, "no address of the swarm is given"),
    (["expert", "list", "--available", "--bootstrap", "nonsense"], 2, "nonsense"),
    (["expert", "verify", "m"], 2, "no address of the swarm is given"),
    (["expert", "verify", "m", "--peer", "nobody"], 2, "'nobody' is not the PeerId"),
    (["expert", "verify", "m", "--samples", "0"], 2, "--samples"),
    (["expert", "verify"], 2, "Missing argument"),
    (["peers"], 2, ""),
    (["join", "--quiet-hours", "8-18"], 2, "host.quiet_hours '8-18' is not a time of the day"),
    (["join", "--pause-when-busy", "2"], 2, "--pause-when-busy"),
    (["join", "--nice", "20"], 2, "--nice"),
    (["join", "--upload", "fast"], 2, "host.upload 'fast' is not an amount"),
    (["host-expert", "m", "--threads", "-1"], 2, "--threads"),
    (["config", "set", "host.quiet_hours", "25:00-26:00"], 2, "is not a time of the day"),
    (["config", "set", "host.pause_when_busy", "nan"], 2, "host.pause_when_busy"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), BAD, ids=[" ".join(words) for words, _, _ in BAD])
def test_bad_input(arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == code
    out, err = capsys.readouterr()
    assert said in err and "Traceback" not in out + err
    if arguments != ["peers"]:
        assert run([*arguments, "--json"]) == code
        out = capsys.readouterr().out
        error = json.loads(out.splitlines()[-1])["error"]
        assert error["message"] and error["hint"]


def test_what_a_node_will_serve_is_shown_from_disk(remembering: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["expert", "list"]) == 0
    out, err = capsys.readouterr()
    assert "tiny" in out and "0-1: 0-1; 4: 2" in out and "no node runs here" in err
    assert run(["expert", "list", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["running"] is False and found["hosted"][0]["root"] == ROOT


def test_peers_are_shown_from_disk(remembering: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["peers", "list"]) == 0
    out, err = capsys.readouterr()
    assert PEER in out and "/ip4/1.2.3.4/tcp/1" in out and "no node runs here" in err
    assert run(["peers", "list", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    (peer,) = json.loads(line)["peers"]
    assert (peer["peer_id"], peer["connected"], peer["rtt_ms"]) == (PEER, False, None)


def test_nothing_known(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["peers", "list"], ["expert", "list"]):
        assert run(words) == 0
        assert capsys.readouterr().out == ""
        assert run([*words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["running"] is False


def test_settings_of_a_good_neighbour(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["init"]) == 0
    values: dict[str, Any] = {
        "host.quiet_hours": "08:00-12:00,22:00-06:00",
        "host.upload": "50MB",
        "host.nice": "10",
        "host.pause_when_busy": "0.5",
    }
    for key, value in values.items():
        assert run(["config", "set", key, value]) == 0
        capsys.readouterr()
        assert run(["config", "get", key]) == 0
        assert capsys.readouterr().out.strip()


def test_how_things_are_written() -> None:
    assert describe_held({"0": [0, 1], "1": [0, 1], "4": [2]}) == "0-1: 0-1; 4: 2"
    ages: list[tuple[float, str]] = [(-1, "0 s ago"), (59, "59 s ago"), (300, "5 min ago"), (7200, "2 h ago")]
    for seconds, text in ages:
        assert format_age(seconds) == text
