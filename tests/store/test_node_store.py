"""The store of a running node: never in the event loop, never the node's end, nothing acknowledged lost."""

from __future__ import annotations

import logging
import resource
import signal
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from daaswarm.errors import ConfigError, StorageError
from daaswarm.store import node_store
from daaswarm.store.database import Database
from daaswarm.store.node_store import open_node_store
from daaswarm.store.tally import CallTally
from tests.store.store_helpers import (
    NOW,
    ROOT,
    make_advert,
    make_calls,
    make_deployment,
    make_model,
    make_peer,
    make_peer_id,
)


@contextmanager
def full_disk(nbytes: int) -> Iterator[None]:
    """No file may grow beyond ``nbytes`` during the block: a write then fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


async def test_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: NOW)
    path = tmp_path / "below" / "node.db"
    async with open_node_store(path) as store:
        store.tally.note("served", make_peer_id(1), ROOT, NOW, calls=1, rows=2, bytes_in=3, bytes_out=4, failures=5)
        assert await store.save([make_peer(1)], [make_advert(1)]) and not len(store.tally)
        await store.put_model(make_model())
        await store.put_deployment(make_deployment())
    async with open_node_store(path) as store:
        assert await store.get_peers(9) == [make_peer(1)]
        assert await store.get_adverts() == [make_advert(1)]
        assert await store.get_models() == [make_model()]
        assert await store.get_deployments() == [make_deployment()]
        await store.remove_model("/models/m")
        await store.remove_deployment(ROOT, "f32")
        assert await store.get_models() == [] and await store.get_deployments() == []
    database = Database.open(path)
    assert database.get_calls() == [make_calls()]
    database.close()


async def test_the_event_loop_is_not_held_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that hangs costs a save its deadline, and the others nothing."""
    hang = threading.Event()
    async with open_node_store(tmp_path / "node.db") as store:
        monkeypatch.setattr(node_store, "ACCESS_S", 0.01)
        monkeypatch.setattr(Database, "save", lambda *args: hang.wait(10))
        assert not await store.save([], [])
        with pytest.raises(StorageError, match="no answer from the disk"):
            await store.put_deployment(make_deployment())  # waits its turn, not for ever
        hang.set()
        monkeypatch.setattr(node_store, "ACCESS_S", 5.0)


async def test_a_cancelled_write_is_whole(tmp_path: Path) -> None:
    async with open_node_store(tmp_path / "node.db") as store:
        with trio.CancelScope() as scope:
            scope.cancel()
            await store.put_deployment(make_deployment())
        assert await store.get_deployments() == [make_deployment()]


async def test_a_full_disk_is_said_once_and_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "node.db"
    peers = [make_peer(n) for n in range(1, 400)]
    async with open_node_store(path) as store:
        await store.put_deployment(make_deployment())
        with full_disk(60_000):
            for _ in range(3):
                store.tally.note("asked", make_peer_id(1), ROOT, NOW, calls=1)
                assert not await store.save(peers, [])
        assert len(caplog.records) == 1 and "until the disk allows it" in caplog.text
        assert await store.get_deployments() == [make_deployment()]
        assert await store.save(peers, [])
        assert "is written again" in caplog.text
        assert len(await store.get_peers(999)) == len(peers)
    database = Database.open(path)
    assert [calls.calls for calls in database.get_calls()] == [3]  # all three times
    assert database._connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    database.close()


async def test_a_disk_that_was_full_from_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with full_disk(100):
        async with open_node_store(tmp_path / "node.db") as store:
            assert await store.get_peers(9) == [] and not await store.save([make_peer(1)], [])
            with pytest.raises(StorageError):
                await store.put_deployment(make_deployment())
    assert len(caplog.records) == 1
    async with open_node_store(tmp_path / "node.db") as store:  # what it left behind is no obstacle
        assert await store.save([make_peer(1)], [])
    assert not list(tmp_path.glob("*corrupt*"))


async def test_a_folder_that_can_not_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    async with open_node_store(tmp_path / "file" / "node.db") as store:
        assert not await store.save([make_peer(1)], []) and await store.get_models() == []
    assert len(caplog.records) == 1


async def test_a_newer_file_stops_the_node(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "node.db")
    connection.execute("PRAGMA application_id = 0x64616173")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ConfigError, match="newer daaswarm"):
        async with open_node_store(tmp_path / "node.db"):
            pass


async def test_a_lock_that_another_process_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("daaswarm.store.files.BUSY_MS", 10)
    path = tmp_path / "node.db"
    async with open_node_store(path) as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        assert not await store.save([make_peer(1)], [])
        other.execute("ROLLBACK")
        other.close()
        with caplog.at_level(logging.WARNING):
            assert await store.save([make_peer(1)], [])


def test_the_tally_is_bounded() -> None:
    tally = CallTally(limit=2)
    for n in range(1, 6):
        tally.note("served", make_peer_id(n), ROOT, NOW, calls=1, rows=n)
    tally.note("served", make_peer_id(1), ROOT, NOW, calls=1)
    taken = tally.take()
    assert [(s.peer_id, s.calls, s.rows) for s in taken] == [
        (make_peer_id(1), 2, 1),
        (make_peer_id(2), 1, 2),
        ("", 3, 12),
    ]
    assert tally.take() == []
    tally.note("served", make_peer_id(1), ROOT, NOW, calls=1)
    tally.give_back(taken)
    assert [s.calls for s in tally.take()] == [3, 1, 3]
