"""The schema of ``node.db``, as the steps that lead to it.

``PRAGMA user_version`` counts the steps that a file has taken. A change of the schema is a new step at the end, never a
change of an old one, from the first release on; ``tests/store/schemas`` keeps a file of each version to try it on.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

APPLICATION_ID = 0x64616173  # "daas" in the file's header: this database is ours

# STRICT: SQLite refuses a value of the wrong type instead of keeping it, so what is read back has the type written.
CREATE = """
CREATE TABLE peers (
    peer_id TEXT PRIMARY KEY,
    addrs TEXT NOT NULL,                -- JSON array of multiaddresses
    agent TEXT NOT NULL,
    first_seen REAL NOT NULL,           -- Unix time, s; so are all times here
    last_seen REAL NOT NULL,
    failures INTEGER NOT NULL           -- in a row, at the time of writing
) STRICT, WITHOUT ROWID;
CREATE INDEX peers_by_age ON peers (last_seen);

CREATE TABLE adverts (
    peer_id TEXT NOT NULL,
    model_root TEXT NOT NULL,
    seq INTEGER NOT NULL,
    expires_at REAL NOT NULL,
    signed BLOB NOT NULL,               -- msgpack of messages.Signed, checked again when it is read
    PRIMARY KEY (peer_id, model_root)
) STRICT;
CREATE INDEX adverts_by_expiry ON adverts (expires_at);

CREATE TABLE models (
    folder TEXT PRIMARY KEY,
    model_root TEXT NOT NULL,
    name TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('moe', 'dense')),
    used_at REAL NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE deployments (
    id INTEGER PRIMARY KEY,
    model_root TEXT NOT NULL,
    dtype TEXT NOT NULL CHECK (dtype IN ('f32', 'bf16', 'f16')),
    name TEXT NOT NULL,
    source TEXT NOT NULL,               -- what the model is found by again: a name or a folder
    created_at REAL NOT NULL,
    UNIQUE (model_root, dtype)
) STRICT;
CREATE TABLE deployed_layers (
    deployment_id INTEGER NOT NULL REFERENCES deployments (id) ON DELETE CASCADE,
    layer INTEGER NOT NULL,
    experts BLOB NOT NULL,              -- bitmap, as in messages.Advert
    PRIMARY KEY (deployment_id, layer)
) STRICT, WITHOUT ROWID;

CREATE TABLE calls (
    hour INTEGER NOT NULL,              -- Unix time / 3600
    direction TEXT NOT NULL CHECK (direction IN ('served', 'asked')),
    peer_id TEXT NOT NULL,              -- empty: all those beyond the limit together
    model_root TEXT NOT NULL,
    calls INTEGER NOT NULL,
    rows INTEGER NOT NULL,
    bytes_in INTEGER NOT NULL,          -- of bodies, as this node received them
    bytes_out INTEGER NOT NULL,
    failures INTEGER NOT NULL,
    PRIMARY KEY (hour, direction, peer_id, model_root)
) STRICT, WITHOUT ROWID;

CREATE TABLE standings (
    peer_id TEXT NOT NULL,
    model_root TEXT NOT NULL,
    passed REAL NOT NULL,               -- audited calls; they decay, see core/reputation.py
    failed REAL NOT NULL,
    suspicion REAL NOT NULL,
    updated_at REAL NOT NULL,
    banned_at REAL NOT NULL,            -- 0: it isn't
    reason TEXT NOT NULL,
    PRIMARY KEY (peer_id, model_root)
) STRICT, WITHOUT ROWID;
"""

MIGRATIONS: tuple[str, ...] = (CREATE,)
SCHEMA_VERSION = len(MIGRATIONS)


def get_version(connection: sqlite3.Connection) -> int:
    """How many steps a file has taken; 0 for an empty one."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def migrate(connection: sqlite3.Connection, migrations: Sequence[str] = MIGRATIONS) -> None:
    """Take the steps that are missing, each in one transaction: a crash leaves the version before or after it."""
    while True:
        # The lock first, then the version: another process may be taking the same step.
        connection.execute("BEGIN IMMEDIATE")
        try:
            version = get_version(connection)
            if version >= len(migrations):
                connection.execute("ROLLBACK")
                return
            for statement in split_statements(migrations[version]):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {version + 1}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def split_statements(script: str) -> list[str]:
    """The statements of a script. ``executescript`` would commit the transaction that they belong to."""
    found: list[str] = []
    pending = ""
    for part in script.split(";"):
        pending += part + ";"
        if sqlite3.complete_statement(pending):
            found.append(pending.strip())
            pending = ""
    return [statement for statement in found if statement != ";"]


def get_tables(connection: sqlite3.Connection) -> set[str]:
    """The names of all tables."""
    found = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    return {row[0] for row in found}
