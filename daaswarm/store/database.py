"""``node.db``: what a node remembers from one run to the next. Blocking; trio has :mod:`daaswarm.store.node_store`."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from daaswarm import messages
from daaswarm.core.adverts import from_bitmap, to_bitmap
from daaswarm.core.reputation import ENTRIES as STANDINGS
from daaswarm.core.reputation import Standing
from daaswarm.errors import ConfigError, StorageError
from daaswarm.store.files import Damaged, check_owner, open_readable, open_writable, translated
from daaswarm.store.records import AdvertRecord, CallSummary, Deployment, ModelRecord, PeerRecord

PEERS = 1_024  # the last seen; a routing table holds fewer than half
ADVERTS = 1_024  # those that live longest; at most 16 KiB each
MODELS = 256  # the last used
DEPLOYMENTS = 64  # models in one dtype; more are refused, as a host also advertises no more
CALLS = 50_000  # rows of the latest hours, about 5 MB: a month of 70 peers and models an hour
SEQ_MAX = (1 << 63) - 1  # what SQLite can keep; an honest seq is milliseconds since 1970


class Database:
    """One connection to ``node.db``.

    Every method that writes is one transaction: when it has returned, what it wrote survives a crash.

    Args:
        connection: from :func:`daaswarm.store.files.open_writable` or ``open_readable``.
        path: for messages.

    Attributes:
        may_commit: asked when a transaction is complete; where it says no, nothing is written.

    Raises (all methods):
        Damaged: the file is broken.
        StorageError: the disk refuses; nothing was written.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.path = path
        self.may_commit: Callable[[], bool] = lambda: True
        self._connection = connection

    @classmethod
    def open(cls, path: Path) -> Database:
        """For its one writer. Raises what :func:`~daaswarm.store.files.open_writable` does."""
        return cls(open_writable(path), path)

    def close(self) -> None:
        """Everything is written already; this moves the write-ahead log into the file."""
        with contextlib.suppress(sqlite3.Error):  # a full disk: the log stays, and is as good
            self._connection.close()

    # -- the swarm ----------------------------------------------------------------------------------------------

    def save(
        self,
        peers: Iterable[PeerRecord],
        adverts: Iterable[AdvertRecord],
        calls: Iterable[CallSummary],
        now: float,
    ) -> None:
        """Write what changes all the time, together. Calls are added to what is there.

        Args:
            now: Unix time, s; adverts that have expired then are dropped.
        """
        with self._transaction() as execute:
            for p in peers:
                execute(
                    "INSERT INTO peers (peer_id, addrs, agent, first_seen, last_seen, failures)"
                    " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (peer_id) DO UPDATE"
                    " SET addrs = excluded.addrs, last_seen = excluded.last_seen,"
                    " failures = excluded.failures, agent = iif(excluded.agent = '', agent, excluded.agent)",
                    (p.peer_id, _encode_json(p.addrs), p.agent, p.first_seen, p.last_seen, p.failures),
                )
            for a in adverts:
                if a.seq <= SEQ_MAX:
                    execute(
                        "INSERT INTO adverts (peer_id, model_root, seq, expires_at, signed) VALUES (?, ?, ?, ?, ?)"
                        " ON CONFLICT DO UPDATE SET seq = excluded.seq, expires_at = excluded.expires_at,"
                        " signed = excluded.signed WHERE excluded.seq > seq",
                        (a.peer_id, a.model_root, a.seq, a.expires_at, msgspec.msgpack.encode(a.signed)),
                    )
            for c in calls:
                execute(
                    "INSERT INTO calls (hour, direction, peer_id, model_root, calls, rows, bytes_in, bytes_out,"
                    " failures) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE"
                    " SET calls = calls + excluded.calls,"
                    " rows = rows + excluded.rows, bytes_in = bytes_in + excluded.bytes_in,"
                    " bytes_out = bytes_out + excluded.bytes_out, failures = failures + excluded.failures",
                    msgspec.structs.astuple(c),
                )
            execute("DELETE FROM adverts WHERE expires_at <= ?", (now,))
            for table, key, order, limit in (
                ("peers", "peer_id", "last_seen DESC", PEERS),
                ("adverts", "rowid", "expires_at DESC", ADVERTS),
                ("calls", "(hour, direction, peer_id, model_root)", "hour DESC", CALLS),
            ):
                columns = key.strip("()")
                execute(
                    f"DELETE FROM {table} WHERE {key} IN"
                    f" (SELECT {columns} FROM {table} ORDER BY {order} LIMIT -1 OFFSET {limit})"
                )

    def get_peers(self, limit: int = PEERS) -> list[PeerRecord]:
        """Those that answered last time first, then the last seen."""
        rows = self._read(
            "SELECT peer_id, addrs, agent, first_seen, last_seen, failures FROM peers"
            " ORDER BY failures > 0, last_seen DESC, peer_id LIMIT ?",
            (limit,),
        )
        return list(_decode(PeerRecord, rows, addrs=msgspec.json.decode))

    def get_adverts(self, now: float) -> list[AdvertRecord]:
        """Those that have not expired at ``now`` (Unix time, s)."""
        rows = self._read(
            "SELECT peer_id, model_root, seq, expires_at, signed FROM adverts WHERE expires_at > ?"
            " ORDER BY model_root, peer_id",
            (now,),
        )
        return list(_decode(AdvertRecord, rows, signed=lambda data: messages.decode(messages.Signed, data)))

    def get_calls(self, since_hour: int = 0) -> list[CallSummary]:
        """The sums of each hour from ``since_hour`` (Unix time / 3600) on, oldest first."""
        rows = self._read(
            "SELECT hour, direction, peer_id, model_root, calls, rows, bytes_in, bytes_out, failures FROM calls"
            " WHERE hour >= ? ORDER BY hour, direction, peer_id, model_root",
            (since_hour,),
        )
        return list(_decode(CallSummary, rows))

    # -- models -------------------------------------------------------------------------------------------------

    def put_model(self, model: ModelRecord) -> None:
        """Remember a folder of the user's own. The longest unused ones beyond :data:`MODELS` are forgotten."""
        with self._transaction() as execute:
            execute(
                "INSERT INTO models (folder, model_root, name, kind, used_at) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (folder) DO UPDATE SET model_root = excluded.model_root, name = excluded.name,"
                " kind = excluded.kind, used_at = excluded.used_at",
                (_check_text(model.folder), model.model_root, _check_text(model.name), model.kind, model.used_at),
            )
            execute(
                "DELETE FROM models WHERE folder IN"
                f" (SELECT folder FROM models ORDER BY used_at DESC LIMIT -1 OFFSET {MODELS})"
            )

    def remove_model(self, folder: str) -> None:
        """Forget a folder; not an error where it is not known."""
        with self._transaction() as execute:
            execute("DELETE FROM models WHERE folder = ?", (folder,))

    def get_models(self) -> list[ModelRecord]:
        """The last used first."""
        rows = self._read("SELECT folder, model_root, name, kind, used_at FROM models ORDER BY used_at DESC, folder")
        return list(_decode(ModelRecord, rows))

    # -- deployments --------------------------------------------------------------------------------------------

    def put_deployment(self, deployment: Deployment) -> None:
        """Serve these experts from now on: layers named take the place of what was there, others stay.

        A layer named without experts goes, and with the last layer the deployment.

        Raises:
            ConfigError: there are :data:`DEPLOYMENTS` others.
        """
        d = deployment
        with self._transaction() as execute:
            (count,) = execute(
                "SELECT count(*) FROM deployments WHERE (model_root, dtype) IS NOT (?, ?)", (d.model_root, d.dtype)
            ).fetchone()
            if count >= DEPLOYMENTS:
                raise ConfigError(f"{DEPLOYMENTS} models are deployed already", hint="remove one: expert remove")
            (number,) = execute(
                "INSERT INTO deployments (model_root, dtype, name, source, created_at) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (model_root, dtype) DO UPDATE SET name = excluded.name, source = excluded.source"
                " RETURNING id",
                (d.model_root, d.dtype, _check_text(d.name), _check_text(d.source), d.created_at),
            ).fetchone()
            for layer, experts in d.held.items():
                execute("DELETE FROM deployed_layers WHERE deployment_id = ? AND layer = ?", (number, layer))
                if experts:
                    execute(
                        "INSERT INTO deployed_layers (deployment_id, layer, experts) VALUES (?, ?, ?)",
                        (number, layer, to_bitmap(experts)),
                    )
            execute("DELETE FROM deployments WHERE id NOT IN (SELECT deployment_id FROM deployed_layers)")

    def get_deployments(self) -> list[Deployment]:
        """In the order in which they were made."""
        with translated(self.path):
            found = self._read("SELECT id, model_root, dtype, name, source, created_at FROM deployments ORDER BY id")
            layers = self._read("SELECT deployment_id, layer, experts FROM deployed_layers ORDER BY layer")
        held: dict[int, dict[int, list[int]]] = {}
        for row in layers:
            held.setdefault(row["deployment_id"], {})[row["layer"]] = from_bitmap(row["experts"])
        return list(_decode(Deployment, [{**row, "held": held.get(row["id"], {})} for row in found]))

    # -- trust --------------------------------------------------------------------------------------------------

    def put_standings(self, standings: Iterable[Standing]) -> None:
        """Write what audits have shown of peers, in the place of what was there. The longest unchanged ones beyond
        :data:`STANDINGS` are forgotten, those of banned peers last.
        """
        with self._transaction() as execute:
            for standing in standings:
                execute(
                    "INSERT OR REPLACE INTO standings (peer_id, model_root, passed, failed, suspicion, updated_at,"
                    " banned_at, reason) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    msgspec.structs.astuple(standing),
                )
            execute(
                "DELETE FROM standings WHERE (peer_id, model_root) IN (SELECT peer_id, model_root FROM standings"
                f" ORDER BY banned_at > 0 DESC, updated_at DESC LIMIT -1 OFFSET {STANDINGS})"
            )

    def get_standings(self) -> list[Standing]:
        """The last changed first."""
        rows = self._read(
            "SELECT peer_id, model_root, passed, failed, suspicion, updated_at, banned_at, reason FROM standings"
            " ORDER BY updated_at DESC, peer_id, model_root"
        )
        return list(_decode(Standing, rows))

    # -- in common ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Any]:
        """``execute`` in one transaction, which ends with the block: written and on the disk, or as if never begun."""
        with translated(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection.execute
                if not self.may_commit():
                    raise StorageError(f"{self.path}: given up before it was written", hint="check the disk")
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # a full disk has rolled it back by itself
                    self._connection.execute("ROLLBACK")
                raise

    def _read(self, query: str, arguments: tuple[object, ...] = ()) -> list[dict[str, Any]]:
        with translated(self.path):
            cursor = self._connection.execute(query, arguments)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor]


@contextlib.contextmanager
def read_database(path: Path) -> Iterator[Database | None]:
    """The database for a command that runs beside a node, or without one; ``None`` where there is none.

    Nothing is changed, whatever is found.

    Raises:
        StorageError: it can't be read. If it is damaged, the next node sets it aside.
        ConfigError: a newer program wrote it.
    """
    try:
        if not path.is_file() or path.stat().st_size == 0:
            yield None
            return
        with translated(path), open_readable(path) as connection:
            check_owner(connection, path)
            yield Database(connection, path)
    except (Damaged, StorageError) as error:
        raise StorageError(
            f"{path} can't be read: {error}", hint="daaswarm join mends it or says what is wrong"
        ) from error


def _decode(kind: Any, rows: Iterable[dict[str, Any]], **columns: Any) -> Iterator[Any]:
    """Rows as structs. One that isn't what its column promises is left out: it costs itself, not the others."""
    for row in rows:
        try:
            yield msgspec.convert({**row, **{name: parse(row[name]) for name, parse in columns.items()}}, kind)
        except msgspec.MsgspecError:
            continue


def _encode_json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _check_text(text: str) -> str:
    """Raises:
    ConfigError: a path whose bytes are not UTF-8; SQLite keeps none.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{text!r} is not UTF-8", hint="rename the folder") from None
    return text
