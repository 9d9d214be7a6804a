"""What is written is read back; rows are bounded; a write is whole or not at all."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from daaswarm.errors import ConfigError, StorageError
from daaswarm.store import database as rooms
from daaswarm.store.database import SEQ_MAX, Database, read_database
from tests.store.store_helpers import (
    NOW,
    fill,
    make_advert,
    make_calls,
    make_deployment,
    make_model,
    make_peer,
    make_peer_id,
    read_all,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "node.db"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    opened = Database.open(path)
    yield opened
    opened.close()


def test_peers(database: Database) -> None:
    database.save([make_peer(1, failures=2), make_peer(2)], [], [], NOW)
    assert database.get_peers() == [make_peer(2), make_peer(1, failures=2)]  # those that answer come first
    later = make_peer(1, first_seen=NOW + 50, last_seen=NOW + 60, agent="")
    database.save([later], [], [], NOW)
    assert database.get_peers(1) == [make_peer(1, last_seen=NOW + 60)]  # known since, and as what, stays


def test_adverts_last_writer_wins_and_expired_ones_go(database: Database) -> None:
    database.save([], [make_advert(1, seq=5), make_advert(2, expires_at=NOW + 1)], [], NOW)
    assert len(database.get_adverts(NOW)) == 2
    database.save([], [make_advert(1, seq=4), make_advert(3, seq=SEQ_MAX + 1)], [], NOW + 2)
    assert database.get_adverts(0.0) == [make_advert(1, seq=5)]


def test_calls_add_up(database: Database) -> None:
    database.save([], [], [make_calls(), make_calls(direction="asked")], NOW)
    database.save([], [], [make_calls(calls=10), make_calls(hour=500_001)], NOW)
    assert database.get_calls(500_001) == [make_calls(hour=500_001)]
    asked, served, _ = database.get_calls()
    assert asked == make_calls(direction="asked")
    assert served == make_calls(calls=11, rows=4, bytes_in=6, bytes_out=8, failures=10)


def test_models(database: Database) -> None:
    database.put_model(make_model("/a", NOW))
    database.put_model(make_model("/b", NOW + 1))
    database.put_model(make_model("/a", NOW + 2))
    assert database.get_models() == [make_model("/a", NOW + 2), make_model("/b", NOW + 1)]
    database.remove_model("/a")
    database.remove_model("/absent")
    assert database.get_models() == [make_model("/b", NOW + 1)]


def test_deployments(database: Database) -> None:
    database.put_deployment(make_deployment())
    database.put_deployment(make_deployment(dtype="bf16", held={1: [1]}))
    database.put_deployment(make_deployment(held={3: [2, 5], 4: [65_535]}))
    first, second = database.get_deployments()
    assert first == make_deployment(held={0: [0, 9], 3: [2, 5], 4: [65_535]}) and second.dtype == "bf16"
    database.put_deployment(make_deployment(held={0: [9], 3: [], 7: []}))  # parts of layers and whole ones, at once
    assert database.get_deployments()[0].held == {0: [9], 4: [65_535]}
    database.put_deployment(make_deployment(held={0: [], 4: []}))
    assert database.get_deployments() == [second]  # nothing left of it: gone
    database.put_deployment(make_deployment(dtype="bf16", held={1: []}))
    assert database.get_deployments() == []


def test_a_removal_is_whole_or_not_at_all(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    database.put_deployment(make_deployment())
    with monkeypatch.context() as patch:
        patch.setattr(rooms, "to_bitmap", lambda experts: "the disk refuses")  # for layer 3, when 0 is gone already
        with pytest.raises(StorageError):
            database.put_deployment(make_deployment(held={0: [], 3: [2]}))
    assert database.get_deployments() == [make_deployment()]


def test_rows_are_bounded(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PEERS", "ADVERTS", "CALLS", "MODELS", "DEPLOYMENTS"):
        monkeypatch.setattr(rooms, name, 2)
    adverts = [make_advert(n, expires_at=NOW + n) for n in (1, 2, 3)]
    database.save([make_peer(n) for n in (1, 2, 3)], adverts, [make_calls(hour=n) for n in (1, 2, 3)], NOW)
    assert [p.peer_id for p in database.get_peers(9)] == [make_peer_id(3), make_peer_id(2)]
    assert {a.peer_id for a in database.get_adverts(NOW)} == {make_peer_id(3), make_peer_id(2)}
    assert [c.hour for c in database.get_calls()] == [2, 3]
    for n in (1, 2, 3):
        database.put_model(make_model(f"/{n}", NOW + n))
    assert [m.folder for m in database.get_models()] == ["/3", "/2"]
    for root in ("00" * 32, "11" * 32, "11" * 32):
        database.put_deployment(make_deployment(model_root=root))
    with pytest.raises(ConfigError, match="2 models are deployed already"):
        database.put_deployment(make_deployment(model_root="22" * 32))
    assert len(database.get_deployments()) == 2


def test_a_write_that_fails_leaves_nothing_behind(database: Database) -> None:
    bad = make_calls(direction="sideways")
    with pytest.raises(StorageError, match="CHECK constraint"):
        database.save([make_peer(1)], [make_advert(1)], [bad], NOW)
    assert database.get_peers() == [] and database.get_adverts(NOW) == []
    database.save([make_peer(1)], [], [], NOW)  # and the next one works


def test_a_folder_that_is_not_utf8_is_refused(database: Database) -> None:
    with pytest.raises(ConfigError, match="not UTF-8"):
        database.put_model(make_model("/models/\udcff"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        database.put_deployment(make_deployment(source="/models/\udcff"))
    assert database.get_models() == [] and database.get_deployments() == []


def test_a_row_that_makes_no_sense_costs_itself(path: Path) -> None:
    fill(path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE peers SET addrs = '{' WHERE peer_id = ?", (make_peer_id(1),))
        connection.execute("UPDATE adverts SET signed = x'00' WHERE peer_id = ?", (make_peer_id(1),))
    connection.close()
    database = Database.open(path)
    assert len(database.get_peers()) == 28 and database.get_adverts(NOW) == [make_advert(2)]
    database.close()


# -- somebody who only looks --------------------------------------------------------------------------------------


def test_a_reader_beside_a_writer(path: Path, database: Database) -> None:
    database.save([make_peer(1)], [], [], NOW)
    with read_database(path) as reader:
        assert reader is not None and reader.get_peers() == [make_peer(1)]
        database.save([make_peer(2)], [], [], NOW)  # not held up
        database._connection.execute("BEGIN IMMEDIATE")
        assert len(reader.get_peers()) == 2  # not held up either
        with pytest.raises(StorageError, match="readonly"):
            reader.put_model(make_model())
        database._connection.execute("ROLLBACK")


def test_a_reader_alone_changes_nothing(path: Path) -> None:
    with read_database(path) as reader:
        assert reader is None
    assert not path.exists()
    fill(path)
    before = path.read_bytes()
    with read_database(path) as reader:
        assert reader is not None and len(read_all(reader)) == 6
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["node.db"]


def test_a_crash_without_a_write_ahead_log(path: Path) -> None:
    """Where the file system has no shared memory, a half-written change is undone from the journal."""
    fill(path)
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in ("PRAGMA journal_mode = DELETE", "PRAGMA cache_size = 1", "BEGIN", "UPDATE peers SET agent = 'x'"):
        connection.execute(statement)
    connection.execute("INSERT INTO models SELECT peer_id, hex(zeroblob(9000)), '', 'moe', 0 FROM peers")
    journal = path.with_name("node.db-journal")
    crashed = path.read_bytes(), journal.read_bytes()
    connection.close()
    assert crashed[0] != path.read_bytes()
    path.write_bytes(crashed[0])
    journal.write_bytes(crashed[1])
    with pytest.raises(StorageError), read_database(path) as reader:
        assert reader is not None and reader.get_peers()
    assert (path.read_bytes(), journal.read_bytes()) == crashed
    database = Database.open(path)
    assert database.get_models() == [make_model()] and make_peer(1) in database.get_peers()
    database.close()


def test_a_reader_of_a_folder_that_can_not_be_written(path: Path) -> None:
    fill(path)
    path.parent.chmod(0o500)
    try:
        with read_database(path) as reader:
            assert reader is not None and len(reader.get_peers()) == 29
    finally:
        path.parent.chmod(0o700)
