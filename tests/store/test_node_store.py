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

from daaswarm.core.adverts import to_bitmap
from daaswarm.errors import ConfigError, OutcomeUnknown, StorageError
from daaswarm.store import database as database_module
from daaswarm.store import node_store
from daaswarm.store.database import Database
from daaswarm.store.files import Damaged
from daaswarm.store.node_store import open_node_store
from daaswarm.store.records import Deployment
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
        await store.put_deployment(make_deployment(held={0: [], 3: []}))
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


async def test_a_write_given_up_does_not_happen_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was told to have failed, and the disk answers after all."""
    go_on = threading.Event()

    def hang(held: list[int]) -> bytes:
        go_on.wait(10)
        return to_bitmap(held)

    async with open_node_store(tmp_path / "node.db") as store:
        store.tally.note("served", make_peer_id(1), ROOT, NOW, calls=1)
        with monkeypatch.context() as patch:
            patch.setattr(node_store, "ACCESS_S", 0.05)
            patch.setattr(database_module, "to_bitmap", hang)
            with pytest.raises(StorageError, match="nothing was written") as info:
                await store.put_deployment(make_deployment())
            assert not isinstance(info.value, OutcomeUnknown)
            assert not await store.save([], []) and len(store.tally)
        go_on.set()
        assert await store.get_deployments() == []  # reads when that write has ended
        await store.put_deployment(make_deployment())
        assert await store.save([], []) and not len(store.tally)


async def test_a_write_that_may_still_happen_is_not_said_to_have_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk hangs in the commit, which nobody can take back."""
    go_on = threading.Event()

    class Hanging:
        def __init__(self, connection: sqlite3.Connection) -> None:
            self.connection = connection

        def execute(self, statement: str, *arguments: object) -> object:
            if statement == "COMMIT":
                go_on.wait(10)
            return self.connection.execute(statement, *arguments)  # type: ignore[arg-type]

    async with open_node_store(tmp_path / "node.db") as store:
        assert store._database is not None
        connection = store._database._connection
        for write in ("deployment", "calls"):
            go_on.clear()
            monkeypatch.setattr(node_store, "ACCESS_S", 0.05)
            monkeypatch.setattr(store._database, "_connection", Hanging(connection))
            if write == "deployment":
                with pytest.raises(OutcomeUnknown, match="may still write"):
                    await store.put_deployment(make_deployment())
            else:
                store.tally.note("served", make_peer_id(1), ROOT, NOW, calls=1)
                assert not await store.save([], []) and not len(store.tally)  # or they could be counted twice
            go_on.set()
            monkeypatch.setattr(node_store, "ACCESS_S", 5.0)
            assert await store.get_deployments() == [make_deployment()]  # reads when that write has ended
            monkeypatch.setattr(store._database, "_connection", connection)
        assert [calls.calls for calls in store._database.get_calls()] == [1]


async def test_a_disk_that_breaks_in_a_commit_gets_a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_node_store(tmp_path / "node.db") as store:
        put = Database.put_deployment
        broken: list[bool] = []

        def break_once(database: Database, deployment: Deployment) -> None:
            put(database, deployment)
            if not broken:
                broken.append(True)
                raise Damaged("database disk image is malformed")

        monkeypatch.setattr(Database, "put_deployment", break_once)
        await store.put_deployment(make_deployment())
        assert await store.get_deployments() == [make_deployment()] and list(tmp_path.glob("*corrupt*"))


async def test_deployments_that_can_not_be_read_are_not_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(database: Database) -> None:
        raise StorageError("node.db: disk I/O error", hint="check the disk")

    async with open_node_store(tmp_path / "node.db") as store:
        monkeypatch.setattr(Database, "get_deployments", refuse)
        with pytest.raises(StorageError):
            await store.get_deployments()


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
