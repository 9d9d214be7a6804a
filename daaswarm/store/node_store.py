"""The database of a running node, for trio: one thread, writes in batches, and a disk that fails costs no node."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, TypeVar

import trio

from daaswarm.core.reputation import Standing
from daaswarm.errors import OutcomeUnknown, StorageError
from daaswarm.store.database import Database
from daaswarm.store.files import Damaged, set_aside, translated
from daaswarm.store.records import AdvertRecord, Deployment, ModelRecord, PeerRecord
from daaswarm.store.tally import CallTally

ACCESS_S = 5.0  # one access; a disk that takes longer hangs, and must not hold the node (or its leaving) up
REPLACED = 3  # damaged databases set aside in one run: a disk that breaks each of them shouldn't be filled with them

logger = logging.getLogger(__name__)

T = TypeVar("T")


class NodeStore:
    """What a node remembers. Made by :func:`open_node_store`.

    Reading gives what there is; where there is no database that can be read, nothing. Writing either has happened when
    it returns, or raises :class:`StorageError`: then it has not, nor will it later, unless it is an
    :class:`OutcomeUnknown`. :meth:`save`, which is called again and again, warns once instead.

    Attributes:
        tally: counts calls until the next :meth:`save`.
    """

    def __init__(self, path: Path, *, is_owner: bool) -> None:
        self.path = path
        self._is_owner = is_owner
        self.tally = CallTally()
        self._database: Database | None = None
        self._limiter = trio.CapacityLimiter(1)  # so that SQLite is used by one thread at a time, and no other waits
        self._has_warned = False
        self._replaced = 0  # databases set aside in this run

    # -- what changes all the time ------------------------------------------------------------------------------

    async def save(self, peers: Sequence[PeerRecord], adverts: Sequence[AdvertRecord]) -> bool:
        """Write these and the calls counted since. False if the disk refuses: the calls are kept for the next time."""
        calls = self.tally.take()
        try:
            await self._access(lambda database: database.save(peers, adverts, calls, time.time()))
        except StorageError as error:
            if not isinstance(error, OutcomeUnknown):  # perhaps counted already: once too few rather than twice
                self.tally.give_back(calls)
            self._warn(error)
            return False
        if self._has_warned:
            self._has_warned = False
            logger.warning("%s is written again", self.path)
        return True

    async def get_peers(self, limit: int) -> list[PeerRecord]:
        """Peers of earlier runs, the most promising first."""
        return await self._read(lambda database: database.get_peers(limit))

    async def get_adverts(self) -> list[AdvertRecord]:
        """Adverts of an earlier run that have not expired; their signatures are yet to be checked."""
        return await self._read(lambda database: database.get_adverts(time.time()))

    # -- what must not be lost ----------------------------------------------------------------------------------

    async def put_model(self, model: ModelRecord) -> None:
        """Remember a folder outside the cache. Raises what :meth:`Database.put_model` does."""
        await self._access(lambda database: database.put_model(model))

    async def remove_model(self, folder: str) -> None:
        await self._access(lambda database: database.remove_model(folder))

    async def get_models(self) -> list[ModelRecord]:
        return await self._read(lambda database: database.get_models())

    async def put_deployment(self, deployment: Deployment) -> None:
        """Serve these experts after every start, or no more. When this returns, no crash undoes it.

        Raises what :meth:`Database.put_deployment` does."""
        await self._access(lambda database: database.put_deployment(deployment))

    async def get_deployments(self) -> list[Deployment]:
        """Raises:
        StorageError: they can't be read, which is not to be taken for none: others would be put in their place.
        """
        return await self._access(lambda database: database.get_deployments())

    # -- trust --------------------------------------------------------------------------------------------------

    async def put_standings(self, standings: Sequence[Standing]) -> None:
        """Raises what :meth:`Database.put_standings` does."""
        await self._access(lambda database: database.put_standings(standings))

    async def get_standings(self) -> list[Standing]:
        return await self._read(lambda database: database.get_standings())

    # -- in common ----------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open it now rather than at the first use, to learn of what stops a node from starting.

        Raises:
            ConfigError: it was written by a newer program.
        """
        try:
            await self._access(lambda database: None)
        except StorageError as error:
            self._warn(error)

    async def close(self) -> None:
        """After the last save."""

        def close() -> None:
            if self._database is not None:
                self._database.close()
                self._database = None

        with trio.move_on_after(ACCESS_S, shield=True):
            await trio.to_thread.run_sync(close, limiter=self._limiter, abandon_on_cancel=True)

    def _warn(self, error: StorageError) -> None:
        """Once, until it works again. For one answer it hardly matters."""
        if not self._has_warned:
            level = logging.WARNING if self._is_owner else logging.INFO
            logger.log(level, "nothing is remembered for the next start until the disk allows it: %s", error)
        self._has_warned = True

    async def _read(self, work: Callable[[Database], list[T]]) -> list[T]:
        try:
            return await self._access(work)
        except StorageError as error:
            logger.debug("%s", error)  # said aloud by what writes
            return []

    async def _access(self, work: Callable[[Database], T]) -> T:
        """Run ``work`` in the thread. Cancelling doesn't cut it short, as then nobody would know what was written."""
        decision = _Decision()
        with trio.move_on_after(ACCESS_S, shield=True):
            return await trio.to_thread.run_sync(
                self._work, work, decision, limiter=self._limiter, abandon_on_cancel=True
            )
        text = f"{self.path}: no answer from the disk for {ACCESS_S:g} s"
        if decision.take("given up"):
            raise StorageError(f"{text}; nothing was written", hint="check the disk")
        raise OutcomeUnknown(
            f"{text}, and it may still write what it was given", hint="check the disk, then do it again: that is safe"
        )

    def _work(self, work: Callable[[Database], T], decision: _Decision) -> T:
        """In the thread: open what isn't open, and begin anew where the file turns out to be damaged."""
        try:
            return work(self._open(decision))
        except Damaged as error:
            if not self._is_owner:
                raise StorageError(f"{self.path} is damaged: {error}", hint="daaswarm join sets it aside") from error
            if self._replaced >= REPLACED:
                raise StorageError(f"{self.path} is damaged again and again: {error}", hint="check the disk") from error
            self._replaced += 1
            logger.warning("%s", self._replace(error))
            try:
                return work(self._open(decision))
            except Damaged as again:  # a disk that breaks what has just been written
                raise StorageError(f"{self.path} is damaged again: {again}", hint="check the disk") from again

    def _open(self, decision: _Decision) -> Database:
        if self._database is not None and not self.path.exists():
            self._database.close()  # somebody removed the file: what is written to it now would be lost
            self._database = None
        if self._database is None:
            with translated(self.path):
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._database = Database.open(self.path)
        self._database.may_commit = lambda: decision.take("committed")
        return self._database

    def _replace(self, error: Damaged) -> str:
        if self._database is not None:
            self._database.close()
            self._database = None
        kept = set_aside(self.path)
        return f"{self.path} is damaged ({error}): it is kept as {kept.name}, and a new one is begun"


class _Decision:
    """Of one write: the thread commits it, or the loop gives it up. Whoever is first has decided, for good."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = ""

    def take(self, decision: Literal["committed", "given up"]) -> bool:
        """Whether this is the decision."""
        with self._lock:
            self._taken = self._taken or decision
            return self._taken == decision


@asynccontextmanager
async def open_node_store(path: Path, *, is_owner: bool = True) -> AsyncIterator[NodeStore]:
    """The store of a node, closed at the end of the block.

    Args:
        is_owner: the data directory is locked for this node. Others may write too, but set nothing aside.

    Raises:
        ConfigError: it was written by a newer program, and is left as it is.
    """
    store = NodeStore(path, is_owner=is_owner)
    await store.open()
    try:
        yield store
    finally:
        await store.close()
