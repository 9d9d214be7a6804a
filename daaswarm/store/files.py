"""Opening ``node.db``: for the one node that writes it, for anybody who only reads, and when it is damaged.

A damaged file is set aside with its write-ahead log under a name that says when, and a new one is begun: what is in it
may still be worth something to its owner, so it is never written over.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from daaswarm.errors import ConfigError, StorageError
from daaswarm.store.migrations import APPLICATION_ID, MIGRATIONS, SCHEMA_VERSION, get_tables, get_version, migrate

BUSY_MS = 2_000  # a lock held longer than this is not another command's short write
JOURNAL_BYTES = 8 << 20  # what the write-ahead log is cut back to; a checkpoint comes every 4 MiB
SIDE_FILES = ("-wal", "-shm", "-journal")  # the last where there is no write-ahead log
SQLITE_MIN = (3, 37, 0)  # STRICT tables; December 2021

TABLES = frozenset({"peers", "adverts", "models", "deployments", "deployed_layers", "calls", "standings"})

logger = logging.getLogger(__name__)


class Damaged(Exception):
    """The file is no database, not ours, or broken. Whoever owns it sets it aside."""


def open_writable(path: Path, migrations: Sequence[str] = MIGRATIONS) -> sqlite3.Connection:
    """The database for its one writer, with the current schema.

    ``synchronous=FULL``: each commit of the write-ahead log is on the disk when it returns. ``NORMAL`` would be
    consistent after a power cut too, but without the last commits, and what was acknowledged (an expert that is to be
    served from now on) must not be lost. A node commits about once in thirty seconds, so the cost is nothing.

    Raises:
        Damaged: nothing was changed.
        ConfigError: a newer program's file, which is not touched, or an SQLite that is too old.
        StorageError: the disk is full, read-only or otherwise refuses.
    """
    if sqlite3.sqlite_version_info < SQLITE_MIN:
        raise ConfigError(
            f"SQLite {sqlite3.sqlite_version} is too old; {'.'.join(map(str, SQLITE_MIN))} is needed",
            hint="use a newer Python, it brings its own",
        )
    with translated(path):
        if path.exists():
            _check_before_writing(path, len(migrations))
        elif path.with_name(path.name + "-wal").exists():
            raise Damaged("its write-ahead log is there, but it isn't")
        connection = _connect(path, "rwc")
        try:
            check_owner(connection, path, len(migrations))
            _set_up(connection)
            migrate(connection, migrations)
            missing = TABLES - get_tables(connection)
            if missing:
                raise Damaged(f"it lacks {', '.join(sorted(missing))}")
            check(connection)
        except BaseException:
            connection.close()
            raise
    return connection


def _check_before_writing(path: Path, version: int) -> None:
    """Refuse a file that isn't to be written, without a change to it."""
    if path.stat().st_size == 0:  # just made, or killed while it was
        log = path.with_name(path.name + "-wal")
        if log.exists() and log.stat().st_size:
            raise Damaged("it is empty, but its write-ahead log isn't")
        return
    if path.with_name(path.name + "-journal").exists():
        return  # what is to be undone first can't be by looking
    with open_readable(path) as connection:
        check_owner(connection, path, version)


def check_owner(connection: sqlite3.Connection, path: Path, version: int = SCHEMA_VERSION) -> None:
    """Raises:
    Damaged: it is another program's.
    ConfigError: it is a newer daaswarm's.
    """
    found = get_version(connection)
    owner = connection.execute("PRAGMA application_id").fetchone()[0]
    if owner != APPLICATION_ID and (found or get_tables(connection)):
        raise Damaged("it is another program's database")
    if found < 0:
        raise Damaged(f"its schema has version {found}")
    if found > version:
        raise ConfigError(
            f"{path} was written by a newer daaswarm (its schema is {found}, this program knows {version})",
            hint="upgrade daaswarm, or use another --data-dir; the file was not changed",
        )


def _set_up(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA fullfsync = ON")  # for macOS, see systems.sync; no other system knows it
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute(f"PRAGMA journal_size_limit = {JOURNAL_BYTES}")
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":  # a file system without shared memory (some network drives); a rollback journal is as safe
        logger.info("node.db uses a %s journal: its file system has no write-ahead log", mode)


@contextlib.contextmanager
def open_readable(path: Path) -> Iterator[sqlite3.Connection]:
    """The database for somebody who only looks: neither waits for a writer, nor holds one up, nor changes a file.

    Raises:
        sqlite3.Error: as it comes; :func:`translated` names it.
    """
    # Without a write-ahead log nobody has the file open, and SQLite would leave one behind just for looking.
    is_closed = not get_side_files(path)
    connection = _connect(path, "ro&immutable=1" if is_closed else "ro")
    try:
        connection.execute("PRAGMA query_only = ON")
        yield connection
    finally:
        connection.close()


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    # trio lends a worker thread for each call: not always the same one, but one at a time.
    connection = sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False
    )
    connection.text_factory = _read_text
    connection.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
    return connection


def _read_text(data: bytes) -> str:
    """A column whose bytes were altered is one bad value, not a query that fails."""
    return data.decode("utf-8", "replace")


def check(connection: sqlite3.Connection) -> None:
    """Raises:
    Damaged: SQLite's quick check finds something.
    """
    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise Damaged(str(found).splitlines()[-1])


def get_side_files(path: Path) -> list[Path]:
    """The write-ahead log, its index and the journal, as far as they exist."""
    found = [path.with_name(path.name + suffix) for suffix in SIDE_FILES]
    return [side for side in found if side.exists()]


def set_aside(path: Path) -> Path:
    """Rename a damaged database and what belongs to it to ``node.db.corrupt-<UTC time>``; the new path.

    SQLite still finds its log by its name. The log goes first: one that stayed alone would be applied to the next file.

    Raises:
        StorageError: it can't be renamed; then it stays where it is.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    target = path.with_name(f"{path.name}.corrupt-{stamp}")
    number = 1
    while any(target.with_name(target.name + suffix).exists() for suffix in ("", *SIDE_FILES)):
        number += 1
        target = path.with_name(f"{path.name}.corrupt-{stamp}-{number}")
    try:
        for side in get_side_files(path):
            side.rename(target.with_name(target.name + side.name.removeprefix(path.name)))
        if path.exists():
            path.rename(target)
    except OSError as error:
        raise StorageError(
            f"{path} is damaged and can't be set aside: {error.strerror}", hint="check the folder's owner and mode"
        ) from error
    return target


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """SQLite's errors as ours: :class:`Damaged` or ``StorageError``."""
    try:
        yield
    except sqlite3.Error as error:
        # Exactly this class is what Python makes of SQLITE_CORRUPT and SQLITE_NOTADB; its error codes came with 3.11.
        if type(error) is sqlite3.DatabaseError or "unsupported file format" in str(error):
            raise Damaged(str(error)) from error
        raise StorageError(f"{path}: {error}", hint="check the disk: free space, owner and mode of the file") from error
    except UnicodeDecodeError as error:  # SQLite quotes a broken name in its message, and Python can't read that
        raise Damaged("a name in it is no text") from error
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}", hint="check the folder's owner and mode") from error
