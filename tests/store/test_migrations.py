"""The schema: made at once, or step by step from each earlier version, with the data; never from a newer one."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from daaswarm.errors import ConfigError
from daaswarm.store.database import Database
from daaswarm.store.files import TABLES, open_writable
from daaswarm.store.migrations import MIGRATIONS, SCHEMA_VERSION, get_tables, get_version, migrate, split_statements
from tests.store.store_helpers import fill, read_all

SCHEMAS = Path(__file__).parent / "schemas"

FURTHER = """
ALTER TABLE peers ADD COLUMN score REAL NOT NULL DEFAULT 0.5;
CREATE TABLE receipts (id INTEGER PRIMARY KEY, text TEXT NOT NULL) STRICT;
"""


def get_schema(connection: sqlite3.Connection) -> set[tuple[str, str]]:
    found = connection.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL")
    return {(name, " ".join(sql.split())) for name, sql in found}


def make_from(version: int, path: Path) -> None:
    """A file as a program of that version left it."""
    connection = sqlite3.connect(path)
    connection.executescript((SCHEMAS / f"v{version}.sql").read_text("utf-8"))
    connection.close()


def test_there_is_a_file_of_each_version() -> None:
    assert sorted(p.name for p in SCHEMAS.iterdir()) == sorted(f"v{n}.sql" for n in range(1, SCHEMA_VERSION + 1))


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION + 1))
def test_from_each_version(version: int, tmp_path: Path) -> None:
    make_from(version, tmp_path / "old.db")
    fill(tmp_path / "new.db")
    old, new = Database.open(tmp_path / "old.db"), Database.open(tmp_path / "new.db")
    assert get_schema(old._connection) == get_schema(new._connection)
    assert get_tables(new._connection) == TABLES and get_version(old._connection) == SCHEMA_VERSION
    assert read_all(old) == read_all(new) and all(read_all(old))
    old.close()
    new.close()


def test_a_further_step_keeps_the_data(tmp_path: Path) -> None:
    path = tmp_path / "node.db"
    fill(path)
    connection = open_writable(path, (*MIGRATIONS, FURTHER))
    assert get_version(connection) == SCHEMA_VERSION + 1
    assert connection.execute("SELECT count(*), max(score) FROM peers").fetchone() == (29, 0.5)
    assert "receipts" in get_tables(connection)
    connection.close()
    connection = open_writable(path, (*MIGRATIONS, FURTHER))  # and it is taken once
    connection.close()


def test_a_step_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "node.db"
    fill(path)
    connection = sqlite3.connect(path, isolation_level=None)
    before = get_schema(connection)
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        migrate(connection, (*MIGRATIONS, FURTHER + "DROP TABLE absent;"))
    assert not connection.in_transaction
    assert get_schema(connection) == before and get_version(connection) == SCHEMA_VERSION
    connection.close()


def test_a_newer_file_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "node.db"
    fill(path)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="newer daaswarm") as info:
        Database.open(path)
    assert "upgrade" in info.value.hint
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["node.db"]


def test_a_newer_file_that_was_not_closed(tmp_path: Path) -> None:
    """Its version may stand in the write-ahead log alone."""
    path = tmp_path / "node.db"
    fill(path)
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    before = path.read_bytes(), (tmp_path / "node.db-wal").read_bytes()
    with pytest.raises(ConfigError, match="newer daaswarm"):
        Database.open(path)
    assert (path.read_bytes(), (tmp_path / "node.db-wal").read_bytes()) == before
    writer.close()


def test_statements_are_told_apart() -> None:
    script = (
        "CREATE TABLE a (x TEXT DEFAULT ';'); -- one; two\nCREATE TRIGGER t AFTER INSERT ON a BEGIN SELECT 1; END;\n"
    )
    first, second = split_statements(script)
    assert first.startswith("CREATE TABLE a") and second.endswith("BEGIN SELECT 1; END;")
