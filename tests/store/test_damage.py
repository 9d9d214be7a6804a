"""Damaged files are set aside, whatever is wrong with them, and nothing is ever written over."""

from __future__ import annotations

import logging
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from daaswarm.errors import ConfigError, StorageError
from daaswarm.store.database import Database, read_database
from daaswarm.store.files import Damaged, set_aside
from daaswarm.store.node_store import REPLACED, NodeStore, open_node_store
from tests.store.store_helpers import NOW, fill, make_deployment, make_peer, read_all

PAGE = 4096


def write_garbage(path: Path) -> None:
    path.write_bytes(b"not a database, but somebody's letter\n" * 100)


def cut_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def cut_in_the_middle(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: 2 * PAGE + 100])


def overwrite_a_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[PAGE : 2 * PAGE] = b"\xff" * PAGE
    path.write_bytes(data)


def overwrite_the_schema(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100:PAGE] = bytes(PAGE - 100)
    path.write_bytes(data)


def take_a_table(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE calls")
    connection.close()


def put_another_programs(path: Path) -> None:
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE bookmarks (url TEXT)")
    connection.close()


def empty_but_for_its_log(path: Path) -> None:
    path.write_bytes(b"")
    path.with_name("node.db-wal").write_bytes(b"\x37\x7f\x06\x82" + bytes(4000))


def only_its_log(path: Path) -> None:
    path.unlink()
    path.with_name("node.db-wal").write_bytes(b"\x37\x7f\x06\x82" + bytes(4000))


def set_an_unknown_format(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[44:48] = b"\x00\x00\x00\x63"
    path.write_bytes(data)


DAMAGE: list[Callable[[Path], None]] = [
    write_garbage,
    cut_the_header,
    cut_in_the_middle,
    overwrite_a_page,
    overwrite_the_schema,
    take_a_table,
    put_another_programs,
    empty_but_for_its_log,
    only_its_log,
    set_an_unknown_format,
]


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_file_is_set_aside(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "node.db"
    fill(path)
    damage(path)
    before = {file.name.removeprefix("node.db"): file.read_bytes() for file in tmp_path.iterdir()}
    with caplog.at_level(logging.WARNING):
        async with open_node_store(path) as store:
            assert await store.get_peers(9) == []
            assert await store.save([make_peer(1)], [])
    (record,) = caplog.records
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir() if ".corrupt-" in file.name}
    base = min(kept, key=len).removesuffix("-wal")
    assert base in record.getMessage() and "damaged" in record.getMessage()
    assert {name.removeprefix(base): data for name, data in kept.items() if not name.endswith("-shm")} == before
    async with open_node_store(path) as store:
        assert await store.get_peers(9) == [make_peer(1)]


async def test_only_the_owner_sets_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "node.db"
    write_garbage(path)
    before = path.read_bytes()
    async with open_node_store(path, is_owner=False) as store:
        assert not await store.save([], [])
        with pytest.raises(StorageError, match="is damaged"):
            await store.put_deployment(make_deployment())
    with pytest.raises(StorageError, match="can't be read"), read_database(path):
        pass
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["node.db"]
    assert not caplog.records


async def test_damage_under_a_running_node(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "node.db"
    async with open_node_store(path) as store:
        assert await store.save([make_peer(n) for n in range(30)], [])
        assert store._database is not None
        store._database._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        overwrite_a_page(path)
        store._database._connection.execute("PRAGMA shrink_memory")  # it would answer from its cache for a while
        await store.put_deployment(make_deployment())
        await store.get_peers(9)
        assert await store.save([make_peer(1)], [])
    assert any("is kept as node.db.corrupt-" in record.getMessage() for record in caplog.records)
    async with open_node_store(path) as store:
        assert await store.get_peers(9) == [make_peer(1)]


async def test_a_file_removed_under_a_running_node(tmp_path: Path) -> None:
    path = tmp_path / "node.db"
    async with open_node_store(path) as store:
        assert await store.save([make_peer(1)], [])
        for file in tmp_path.iterdir():
            file.unlink()
        await store.put_deployment(make_deployment())
    async with open_node_store(path) as store:
        assert await store.get_deployments() == [make_deployment()] and await store.get_peers(9) == []


def test_a_file_that_was_being_made_is_no_damage(tmp_path: Path) -> None:
    """What a process leaves that is killed just then: an empty file, and the journal of an empty file."""
    path = tmp_path / "node.db"
    path.write_bytes(b"")
    path.with_name("node.db-journal").write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + bytes(504))
    database = Database.open(path)
    database.save([make_peer(1)], [], [], NOW)
    database.close()
    assert [file.name for file in tmp_path.iterdir()] == ["node.db"]


def test_two_in_one_second_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "node.db"
    names: set[str] = set()
    for n in range(3):
        path.write_bytes(b"%d" % n)
        path.with_name("node.db-wal").write_bytes(b"wal%d" % n)
        target = set_aside(path)
        names.add(target.name)
        assert target.read_bytes() == b"%d" % n
        assert target.with_name(target.name + "-wal").read_bytes() == b"wal%d" % n
    assert len(names) == 3 and not path.exists()


def test_bytes_changed_at_random(tmp_path: Path) -> None:
    """Whatever is changed: it opens, or is called damaged; nothing else is ever raised."""
    whole = tmp_path / "whole.db"
    fill(whole)
    original = whole.read_bytes()
    rng = random.Random(4)
    damaged = 0
    for _ in range(300):
        data = bytearray(original)
        for _ in range(rng.choice((1, 4, 64))):
            data[rng.randrange(100) if rng.random() < 0.5 else rng.randrange(len(data))] = rng.randrange(256)
        path = tmp_path / "node.db"
        for file in tmp_path.glob("node.db*"):
            file.unlink()
        path.write_bytes(data)
        try:
            database = Database.open(path)
        except (Damaged, StorageError, ConfigError):  # ConfigError: the version was hit
            damaged += 1
            continue
        try:
            read_all(database)
            database.save([make_peer(99)], [], [], NOW)
        except (Damaged, StorageError):
            damaged += 1
        database.close()
    assert 20 < damaged < 300


async def test_a_disk_that_breaks_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Database:
        raise Damaged("as always")

    monkeypatch.setattr(Database, "open", refuse)
    (tmp_path / "node.db").write_bytes(b"x")
    store = NodeStore(tmp_path / "node.db", is_owner=True)
    for _ in range(9):
        (tmp_path / "node.db").write_bytes(b"x")
        assert not await store.save([], [])
    assert len(list(tmp_path.glob("*.corrupt-*"))) == REPLACED
