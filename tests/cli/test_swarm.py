"""``daaswarm swarm``, and where the key of a node's swarm comes from."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from daaswarm.api.control import Emit, serve_control
from daaswarm.cli import swarm as swarm_command
from daaswarm.cli.app import run
from daaswarm.config import ENV_SWARM_KEY, Config, NetworkConfig, load_config
from daaswarm.core.signing import get_peer_id, get_swarm_id
from daaswarm.core.swarm_keys import SwarmKey
from daaswarm.errors import ConfigError, DeadlineExceeded
from daaswarm.node.identity import load_identity
from daaswarm.store.data_dir import DataDir
from daaswarm.store.swarm_keys import list_stored, load_swarm_key, read_key_file, store_swarm_key

KEY = SwarmKey("home", bytes(range(32)))
PEERS = [get_peer_id(bytes([n]) * 32) for n in range(3)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataDir:
    monkeypatch.setenv("DAASWARM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(ENV_SWARM_KEY, raising=False)
    return DataDir(tmp_path / "home")


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def ask(*arguments: str, code: int = 0) -> Any:
        assert run([*arguments, "--json"]) == code, capsys.readouterr()
        (line,) = capsys.readouterr().out.splitlines()
        return json.loads(line)

    return ask


def configure(**network: Any) -> Config:
    return Config(network=NetworkConfig(**network))


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_create(ask: Callable[..., Any], home: DataDir, capsys: pytest.CaptureFixture[str]) -> None:
    made = ask("swarm", "create", "home")
    path = Path(made["key_file"])
    assert path.parent == home.path and read_key_file(path).swarm_id == made["swarm_id"]
    assert os.name != "posix" or path.stat().st_mode & 0o777 == 0o600
    assert path.read_text().strip() not in str(made)
    assert ask("swarm", "create", "home")["swarm_id"] != made["swarm_id"]
    assert made["swarm_id"] in [swarm["swarm_id"] for swarm in ask("swarm", "list")["swarms"]]
    assert ask("swarm", "show", made["swarm_id"])["private"] is True
    assert run(["swarm", "show", made["swarm_id"], "--key"]) == 0
    assert capsys.readouterr().out == path.read_text()
    assert not [path for path in home.path.iterdir() if path.name.startswith(".swarm")]


@pytest.mark.parametrize("name", ["main", "", "a/b", "x" * 33])
def test_names_that_are_refused(ask: Callable[..., Any], home: DataDir, name: str) -> None:
    assert ask("swarm", "create", name, code=2)["error"]["hint"]
    assert list_stored(home) == []


def test_a_key_moves_to_another_folder(ask: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    file = write(tmp_path / "key", KEY.text)
    assert ask("swarm", "add", str(file))["swarm_id"] == KEY.swarm_id
    assert ask("swarm", "add", str(file))["swarm_id"] == KEY.swarm_id
    monkeypatch.setattr("sys.stdin", io.StringIO(KEY.text + "\nmore\n"))
    other = tmp_path / "other"
    assert ask("swarm", "add", "-", "--data-dir", str(other))["swarm_id"] == KEY.swarm_id
    assert list_stored(DataDir(other)) == [KEY.swarm_id]
    assert "--yes" in ask("swarm", "remove", KEY.swarm_id, code=2)["error"]["hint"]
    assert ask("swarm", "remove", KEY.swarm_id, "--yes")["swarm_id"] == KEY.swarm_id
    assert ask("swarm", "list")["swarms"] == []


def test_a_typo_and_a_file_that_others_read(ask: Callable[..., Any], tmp_path: Path) -> None:
    wrong = write(tmp_path / "wrong", KEY.text[:-1] + ("a" if KEY.text[-1] != "a" else "b"))
    assert "typo" in ask("swarm", "add", str(wrong), code=2)["error"]["message"]
    for path in (tmp_path / "absent", tmp_path):
        assert "can't be read" in ask("swarm", "add", str(path), code=2)["error"]["message"]
    if os.name == "posix":
        error = ask("swarm", "add", str(write(tmp_path / "open", KEY.text, 0o644)), code=2)["error"]
        assert "chmod 600" in error["hint"]


def test_where_the_key_comes_from(home: DataDir, tmp_path: Path) -> None:
    file, named = str(write(tmp_path / "key", KEY.text)), configure(swarm=KEY.swarm_id)
    assert load_swarm_key(home, Config(), {}) is None
    with pytest.raises(ConfigError, match="its key is not here"):
        load_swarm_key(home, named, {})
    assert load_swarm_key(home, named, {ENV_SWARM_KEY: KEY.text}) == KEY
    for swarm in ("main", "home", KEY.swarm_id):
        assert load_swarm_key(home, configure(swarm=swarm, swarm_key_file=file), {}) == KEY
    with pytest.raises(ConfigError, match="not of work"):
        load_swarm_key(home, configure(swarm="work", swarm_key_file=file), {})
    store_swarm_key(home, KEY)
    assert load_swarm_key(home, named, {}) == KEY
    assert load_swarm_key(home, configure(swarm="work"), {}) is None


def test_a_private_swarm_is_not_taken_for_a_public_one(home: DataDir) -> None:
    store_swarm_key(home, KEY)
    with pytest.raises(ConfigError, match="anybody may join") as caught:
        load_swarm_key(home, configure(swarm="home"), {})
    assert KEY.swarm_id in caught.value.hint


def test_a_stored_key_of_another_swarm(home: DataDir) -> None:
    path = store_swarm_key(home, KEY)
    other = SwarmKey("home", bytes(32))
    path.rename(home.path / f"{other.swarm_id}.swarm-key")
    with pytest.raises(ConfigError, match=KEY.swarm_id):
        load_swarm_key(home, configure(swarm=other.swarm_id), {})


def test_who_a_node_is(home: DataDir) -> None:
    store_swarm_key(home, KEY)
    private = load_identity(home, configure(swarm=KEY.swarm_id, allow=PEERS[:1]))
    assert private.swarm == KEY.realm and private.swarm_name == get_swarm_id("home")
    assert private.allowed.peers == PEERS[:1]
    public = load_identity(home, Config())
    assert public.swarm == public.swarm_name == get_swarm_id("main") and public.swarm_key is None
    with pytest.raises(ConfigError, match=r"network\.allow"):
        load_identity(home, configure(allow=["12D3KooW" + "1" * 44]))


def test_the_key_from_standard_input(monkeypatch: pytest.MonkeyPatch, home: DataDir) -> None:
    from daaswarm.cli.options import read_config

    monkeypatch.setenv(ENV_SWARM_KEY, "")  # so that what follows is undone
    monkeypatch.setattr("sys.stdin", io.StringIO(KEY.text + "\n"))
    home.create()
    home.config_path.write_text('[network]\nswarm_key_file = "absent"\n')
    config = read_config(home, swarm_id=KEY.swarm_id, swarm_key="-")
    assert load_swarm_key(home, config) == KEY
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\n"))
    with pytest.raises(ConfigError, match="standard input"):
        read_config(home, swarm_key="-")


def test_the_allow_list(ask: Callable[..., Any], home: DataDir) -> None:
    assert ask("swarm", "allow", *PEERS[:2]) == {"allow": PEERS[:2], "running": False, "closed": []}
    assert ask("swarm", "allow", PEERS[1], PEERS[2])["allow"] == PEERS
    assert ask("swarm", "disallow", PEERS[0], PEERS[1])["allow"] == PEERS[2:]
    assert load_config(home.config_path, environ={}).network.allow == PEERS[2:]
    assert "empty" in ask("swarm", "disallow", PEERS[2], code=2)["error"]["message"]
    assert "not on the list" in ask("swarm", "disallow", PEERS[0], code=2)["error"]["message"]
    assert ask("swarm", "allow", "12D3KooWnobody", code=2)["error"]["hint"]
    assert ask("swarm", "show")["allow"] == PEERS[2:]
    assert ask("config", "set", "network.allow", "me", code=2)["error"]["hint"]


async def test_a_running_node_is_told(home: DataDir, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    async def handle(method: str, params: dict[str, Any], emit: Emit) -> dict[str, Any]:
        asked.append((method, params))
        return {"closed": [PEERS[2]]}

    home.create()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, home.socket_path, handle)
        assert await trio.to_thread.run_sync(run, ["swarm", "allow", PEERS[0]]) == 0
        nursery.cancel_scope.cancel()
    assert asked == [("allow", {"peers": PEERS[:1]})]
    out, err = capsys.readouterr()
    assert PEERS[0] in out and PEERS[2] in err


def test_a_reset_leaves_keys_alone(home: DataDir) -> None:
    home.load_key()
    path = store_swarm_key(home, KEY)
    (home.path / ".swarm-0123abcd").write_text("x")
    assert run(["reset", "--yes"]) == 0 and path.exists() and not (home.path / ".swarm-0123abcd").exists()
    assert run(["reset", "--yes", "--all"]) == 0 and not path.exists()


async def test_show_asks_the_running_node(home: DataDir, capsys: pytest.CaptureFixture[str]) -> None:
    """It may be in a swarm that the settings don't name, and errors say to compare what this shows."""

    async def handle(method: str, params: dict[str, Any], emit: Emit) -> dict[str, Any]:
        assert method == "status"
        return {"swarm": {"id": KEY.swarm_id, "private": True}}

    async def show(*options: str, code: int = 0) -> str:
        assert await trio.to_thread.run_sync(run, ["swarm", "show", *options]) == code
        out, err = capsys.readouterr()
        return out if code == 0 else err

    home.create()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, home.socket_path, handle)
        shown = await show()
        assert KEY.swarm_id in shown and "who has the key" in shown
        assert json.loads(await show("--json")) == {"swarm_id": KEY.swarm_id, "private": True, "allow": []}
        assert f"the key of {KEY.swarm_id} is not here" in await show("--key", code=2)  # it came from --swarm-key FILE
        store_swarm_key(home, KEY)
        assert (await show("--key")).strip() == KEY.text
        nursery.cancel_scope.cancel()


def test_a_key_in_place_of_its_file_is_not_repeated(ask: Callable[..., Any]) -> None:
    error = ask("swarm", "add", f" {KEY.text}", code=2)["error"]
    assert KEY.text.rpartition(":")[2] not in str(error) and "swarm add -" in error["hint"]


@pytest.mark.parametrize(("path", "said"), [("~nobody-of-that-name/key", "can't be read"), ("a\0b", "is no path")])
def test_a_path_that_is_none(ask: Callable[..., Any], home: DataDir, path: str, said: str) -> None:
    assert said in ask("swarm", "add", path, code=2)["error"]["message"]
    with pytest.raises(ConfigError, match=said):
        load_swarm_key(home, configure(swarm_key_file=path), {})


def test_a_kept_key_that_was_damaged_can_be_replaced(ask: Callable[..., Any], home: DataDir, tmp_path: Path) -> None:
    path = store_swarm_key(home, KEY)
    file = write(tmp_path / "key", KEY.text)
    for content in ("garbage", SwarmKey("work", bytes(32)).text):
        write(path, content)
        for command in (["swarm", "show", KEY.swarm_id], ["swarm", "add", str(file)]):
            assert f"swarm remove {KEY.swarm_id} --yes" in ask(*command, code=2)["error"]["hint"]
        ask("swarm", "remove", KEY.swarm_id, "--yes")
        ask("swarm", "add", str(file))
        assert read_key_file(path) == KEY


def test_what_to_do_next_names_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = str(tmp_path / "of its own"), write(tmp_path / "key", KEY.text)
    for command, hints in ((["create", "home"], 2), (["add", str(file)], 1)):
        assert run(["swarm", *command, "--data-dir", folder]) == 0
        assert capsys.readouterr().err.count(f" --data-dir '{folder}'\n") == hints
        assert run(["swarm", *command]) == 0
        assert "--data-dir" not in capsys.readouterr().err


def test_a_node_that_does_not_hear_of_the_list(
    home: DataDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def attach(*arguments: Any) -> dict[str, Any]:
        raise DeadlineExceeded("it has not answered")

    monkeypatch.setattr(swarm_command, "is_node_running", lambda folder: True)
    monkeypatch.setattr(swarm_command, "attach", attach)
    assert run(["swarm", "allow", PEERS[0]]) == 1
    assert "the list is written" in capsys.readouterr().err
    assert load_config(home.config_path).network.allow == PEERS[:1]
