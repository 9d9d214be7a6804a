"""A node and its store: what one run learns, the next one knows."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from daaswarm import __version__
from daaswarm.config import Config, NetworkConfig
from daaswarm.errors import ConfigError, ExpertError, unwrap_groups
from daaswarm.messages import ExpertCall, ExpertReply
from daaswarm.node.life import open_node, run_node
from daaswarm.store.data_dir import DataDir
from daaswarm.store.database import Database
from daaswarm.store.files import Damaged
from daaswarm.types import ModelRoot, PeerId
from tests.store.store_helpers import ROOT, make_peer, make_peer_id


def open_owner(folder: Path) -> Any:
    return open_node(DataDir(folder), Config(), listen=True, libp2p=False, is_owner=True)


async def test_the_swarm_is_found_again_without_a_bootstrap_address(tmp_path: Path) -> None:
    async with open_owner(tmp_path / "a") as a:
        a.discovery.advertise(ROOT, "m", "moe", {0: [0, 1]}, "f32")
        async with open_owner(tmp_path / "b") as b:
            await b.bootstrap([a.addrs[0]])
            assert len(await b.discovery.find_adverts(ROOT)) == 1
            key = b.peer_id
        async with open_owner(tmp_path / "b") as b:
            assert b.peer_id == key
            (seed,) = await b.memory.recall()
            assert seed == a.network.contact
            assert [known.advert.peer_id for known in b.discovery.book.get_adverts(ROOT, 0.0)] == [a.peer_id]
            b.discovery.restore([seed])
            with trio.fail_after(10):
                await b.discovery.lookup(bytes(32), "nodes")
                assert b.network.is_connected(a.peer_id)
    database = Database.open(DataDir(tmp_path / "b").database_path)
    (peer,) = database.get_peers()
    assert peer.peer_id == a.peer_id and peer.agent == f"daaswarm/{__version__}"
    database.close()


async def test_an_altered_advert_is_not_believed(tmp_path: Path) -> None:
    async with open_owner(tmp_path / "a") as a, open_owner(tmp_path / "b") as b:
        a.discovery.advertise(ROOT, "m", "moe", {0: [0, 1]}, "f32")
        await b.bootstrap([a.addrs[0]])
        await b.discovery.find_adverts(ROOT)
    path = DataDir(tmp_path / "b").database_path
    database = Database.open(path)
    (signed,) = database._connection.execute("SELECT signed FROM adverts").fetchone()
    assert b"moe" in signed
    database._connection.execute("UPDATE adverts SET signed = ?", (signed.replace(b"moe", b"eom"),))
    database.close()
    async with open_owner(tmp_path / "b") as b:
        await b.memory.recall()
        assert b.discovery.book.get_adverts(ROOT, 0.0) == []


async def test_calls_are_counted(tmp_path: Path) -> None:
    call = ExpertCall(model_root=ROOT, layer=0, experts=[0], dtype="f32", rows=3, hidden=1)
    other = ExpertCall(model_root="00" * 32, layer=0, experts=[0], dtype="f32", rows=3, hidden=1)
    answers: list[Any] = []

    def answer(*args: object) -> Any:
        found = answers.pop()
        if isinstance(found, Exception):
            raise found
        return found

    async def answer_later(*args: object) -> Any:
        return answer()

    good = ExpertReply(rows=3, hidden=1), [b"12345", memoryview(bytes(7))]
    peer, host = make_peer_id(1), make_peer_id(2)
    async with open_owner(tmp_path) as node:
        service: Any = SimpleNamespace(serve_inline=answer, serve=answer_later, models={(ROOT, "f32"): None})
        node.hosting.service = service
        for found in (good, None, ExpertError("no")):
            answers.append(found)
            with suppress(ExpertError):
                assert node.handle_inline(peer, call, memoryview(bytes(12)), 1.0) is found
        for request, found in ((call, good), (call, ExpertError("no")), (other, ExpertError("not held"))):
            answers.append(found)
            with suppress(ExpertError):
                assert await node.handle(peer, None, request, memoryview(bytes(12)), 1.0) is found
        hosts = [
            {"peer_id": host, "calls": 2, "rows": 2.6, "bytes_sent": 3.2, "bytes_received": 4.0},
            {"peer_id": node.peer_id, "calls": 9, "rows": 9, "bytes_sent": 0, "bytes_received": 0},
        ]
        node.memory.note_asked({"model_root": ROOT, "hosts": hosts})
    database = Database.open(DataDir(tmp_path).database_path)
    asked, unknown, served = sorted(database.get_calls(), key=lambda row: (row.direction, row.model_root))
    database.close()
    assert (asked.peer_id, asked.calls, asked.rows, asked.bytes_in, asked.bytes_out) == (host, 2, 3, 4, 3)
    assert (served.peer_id, served.calls, served.rows, served.bytes_in, served.bytes_out) == (peer, 2, 6, 24, 24)
    assert served.failures == 2 and served.model_root == ROOT
    assert (unknown.model_root, unknown.calls, unknown.failures) == ("", 0, 1)


async def test_folders_outside_the_cache_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAASWARM_CACHE", str(tmp_path / "cache"))
    async with open_owner(tmp_path / "node") as node:
        for folder in (tmp_path / "cache" / "m", tmp_path / "mine", Path("/\udcff")):
            model: Any = SimpleNamespace(folder=folder, root=ModelRoot(ROOT), name="m", kind="moe")
            await node.memory.note_model(model)
        assert [model.folder for model in await node.memory.store.get_models()] == [str(tmp_path / "mine")]


async def test_one_answer_leaves_the_peers_alone(tmp_path: Path) -> None:
    """Its hosts may be processes of that answer only."""
    async with open_owner(tmp_path / "a") as a:
        opened = open_node(DataDir(tmp_path / "b"), Config(), listen=True, libp2p=False)
        async with opened as b:
            await b.memory.store.save([make_peer(1)], [])
            await b.bootstrap([a.addrs[0]])
            assert b.discovery.get_known()
    database = Database.open(DataDir(tmp_path / "b").database_path)
    assert database.get_peers() == [make_peer(1)]
    database.close()


async def run_until_ready(folder: Path, *bootstrap: str) -> list[PeerId]:
    """``join`` on a folder; the peer that was ready."""
    ready: list[PeerId] = []

    async def emit(event: dict[str, Any]) -> None:
        ready.append(event["peer_id"])
        nursery.cancel_scope.cancel()

    config = Config(network=NetworkConfig(bootstrap=list(bootstrap)))
    async with trio.open_nursery() as nursery:
        await run_node(DataDir(folder), config, emit)
    return ready


async def test_a_clean_end_leaves_one_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "daaswarm.node"):
        (peer,) = await run_until_ready(tmp_path)
    assert [path.name for path in tmp_path.glob("node.db*")] == ["node.db"]
    assert f"starts as {peer}" in caplog.text and f"{peer} has left" in caplog.text


async def test_a_database_of_a_newer_program_stops_the_node(tmp_path: Path) -> None:
    path = DataDir(tmp_path).database_path
    database = Database.open(path)
    database._connection.execute("PRAGMA user_version = 99")
    database.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="newer daaswarm"), unwrap_groups():
        await run_until_ready(tmp_path)
    assert path.read_bytes() == before


async def test_a_damaged_database_does_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = DataDir(tmp_path).database_path
    path.write_bytes(b"garbage" * 1000)
    with pytest.raises(Damaged):
        Database.open(path)
    assert await run_until_ready(tmp_path)
    assert "is kept as node.db.corrupt-" in caplog.text
    assert [file.read_bytes() for file in tmp_path.glob("*.corrupt-*")] == [b"garbage" * 1000]


async def test_a_restart_needs_no_bootstrap_peer_that_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_owner(tmp_path / "gone") as gone:
        address = gone.addrs[0]
    with pytest.raises(ConfigError, match="no bootstrap address"), unwrap_groups():
        await run_until_ready(tmp_path / "b", address)
    async with open_owner(tmp_path / "a") as a:
        async with open_owner(tmp_path / "b") as b:
            await b.bootstrap([a.addrs[0]])
        (peer,) = await run_until_ready(tmp_path / "b", address)
        assert peer == b.peer_id and "peers of an earlier run are there" in caplog.text
