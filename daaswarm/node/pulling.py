"""Gets a whole model from those who host it. Nobody is believed: the root that was asked for decides what is right.

The manifest is checked against the root, each part of a tensor against the manifest. A part is asked of one peer at a
time, so that a wrong one has a culprit: it is asked nothing more, and what it was at is asked elsewhere. The same goes
for who is too slow, until nobody else is left.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import trio

from daaswarm.config import get_cache_dir
from daaswarm.errors import ConfigError, DaaswarmError, DeadlineExceeded, ModelError, unwrap_groups
from daaswarm.limits import KIB
from daaswarm.models.assembly import Assembly, Unit, get_bytes, get_pulled_folder
from daaswarm.models.cache import LOCK_POLL_S, WAITING, try_lock
from daaswarm.models.files import SMALL_FILE_BYTES
from daaswarm.models.manifest import MANIFEST_BYTES, Manifest, parse_manifest
from daaswarm.models.manifest_file import MANIFEST_NAME, load_manifest
from daaswarm.models.sources import KnownModel, find_known
from daaswarm.net.dataplane import TcpNetwork
from daaswarm.net.discovery import Discovery
from daaswarm.node.givers import BUSY_FOR_S, Givers, Liar, Source
from daaswarm.node.reporting import PROGRESS_S, Emit, Event, make_progress
from daaswarm.types import ModelRoot

PIECE_BYTES = 512 * KIB  # of one request: a moment of a slow link
PEERS = 8  # asked at the same time
UNITS_PER_PEER = 3  # at the same time, so that a round trip costs nothing
UNIT_S = BUSY_FOR_S  # for one unit, and then as long as its bytes take at the slowest
SLOWEST_BYTES_PER_S = 50_000  # of one unit: that of its pieces
TURNS_S = (15.0, 60.0, 240.0, 960.0)  # for a whole small thing, each peer in turn: 50 kB/s bring the largest tokenizer
IDLE_LOOK_S = 0.5  # of peers that wait for others to end
PATIENCE_S = 5.0  # with a unit at least, before an idle peer takes it over
SLOWER = 4  # times as long as the idle peer's average: more than the chance of a link
ROUNDS_WITHOUT = 2  # looks for peers without anything gained in between; then it is given up

T = TypeVar("T")


@dataclass(eq=False)
class Flight:
    """A unit that a peer is asked for now. Cancelling the scope takes it away from it."""

    source: Source
    unit: Unit
    began: float
    scope: trio.CancelScope


class Pulling:
    """Args:

    network: carries the requests.
    discovery: finds who hosts a model.
    """

    def __init__(self, network: TcpNetwork, discovery: Discovery) -> None:
        self._network = network
        self._discovery = discovery

    async def pull(self, params: Event, emit: Emit) -> Event:
        """Have the model of ``params["root"]`` in the cache. What was pulled before a stop is kept and used again.

        Raises:
            NoPeerCouldServe: nobody who hosts it has what is missing.
            ConfigError: the cache can't be written, or is too small.
        """
        root, cache = ModelRoot(params["root"]), get_cache_dir()
        known = await trio.to_thread.run_sync(find_known, root, cache, abandon_on_cancel=True)
        if known is not None:
            return describe(known, 0, [], 0.0)
        try:
            folder = get_pulled_folder(cache, root)
            await trio.to_thread.run_sync(lambda: folder.parent.mkdir(parents=True, exist_ok=True))
            lock = await wait_for_lock(folder.with_name(f".{folder.name}.lock"), emit)
            try:
                if not await trio.to_thread.run_sync(folder.is_dir):
                    return await _Pull(self._network, self._discovery, root, cache, emit).run()
            finally:
                os.close(lock)
        except OSError as error:
            raise ConfigError(
                f"the cache {cache} can't be written: {error}", hint="make room or choose another cache"
            ) from None
        # Another process made it meanwhile.
        manifest = await trio.to_thread.run_sync(load_manifest, folder / MANIFEST_NAME, abandon_on_cancel=True)
        return describe(KnownModel(folder.name, folder, ModelRoot(manifest.root)), 0, [], 0.0)


class _Pull:
    """One pull."""

    def __init__(self, network: TcpNetwork, discovery: Discovery, root: ModelRoot, cache: Path, emit: Emit) -> None:
        self._givers = Givers(network, discovery, root, self._say)
        self._root = root
        self._cache = cache
        self._emit = emit
        self._progress = make_progress(emit)
        self._flights: list[Flight] = []
        self._disk = trio.CapacityLimiter(1)  # where there is no pwrite, a write is two calls
        self._told = 0.0
        self._done = 0  # bytes that are right
        self._under_way = 0  # bytes of parts that are not whole yet

    async def run(self) -> Event:
        began = trio.current_time()
        await self._givers.find()
        manifest = await self._get_manifest()
        assembly = await self._on_disk(lambda: Assembly(manifest, self._cache))
        try:
            for name in await self._on_disk(assembly.get_missing_files):
                await self._get_file(assembly, name)
            missing = deque(await self._on_disk(lambda: assembly.find_missing(self._check_and_tell)))
            self._done = assembly.total - sum(unit.nbytes for unit in missing)
            if self._done:
                await self._say(
                    f"going on where an earlier pull ended: {self._done} of {assembly.total} bytes are here"
                )
            await self._get_all(assembly, missing)
            folder = await self._on_disk(assembly.finish)
        finally:
            assembly.close()
        received = sum(source.nbytes for source in self._givers.all)
        seconds = trio.current_time() - began
        known = KnownModel(folder.name, folder, self._root)
        return describe(known, received, self._givers.all, seconds)

    # -- what there is to get -----------------------------------------------------------------------------------

    async def _get_manifest(self) -> Manifest:
        def check(data: bytes) -> Manifest:
            try:
                manifest = parse_manifest(data, what="what it sent", hint="")
            except ModelError as error:
                raise Liar(error.message) from None
            if manifest.root != self._root:
                raise Liar(f"it sent the manifest of another model, {manifest.root[:12]}")
            return manifest

        return await self._ask_any("manifest", "", MANIFEST_BYTES, check)

    async def _get_file(self, assembly: Assembly, name: str) -> None:
        def check(data: bytes) -> None:
            if not assembly.put_file(name, data):
                raise Liar(f"its {name} is not the model's")

        await self._ask_any("file", name, SMALL_FILE_BYTES, check)

    async def _ask_any(self, kind: str, name: str, limit: int, check: Callable[[bytes], T]) -> T:
        """A small thing, whole, from the first who gives the right one. How large it is only the peer says, so that a
        slow one can't be told from a large thing: each has its turn before anybody gets a longer one."""
        for turn_s in TURNS_S:
            for source in self._givers.rank():
                data: bytes | None = None
                try:
                    with trio.move_on_after(turn_s):
                        data = await self._get_whole(source, kind, name, limit)
                    if data is not None:
                        return await self._on_disk(lambda data=data: check(data))
                    source.late += 1
                except DaaswarmError as error:
                    if isinstance(error, ConfigError):
                        raise
                    await self._givers.drop(source, error)
        raise self._givers.give_up(f"its {name or kind}")

    async def _get_whole(self, source: Source, kind: str, name: str, limit: int) -> bytes:
        data = bytearray()
        total = -1
        while total < 0 or len(data) < total:
            size, piece = await self._givers.ask(source, kind, name, len(data), PIECE_BYTES)
            if total < 0 and size > limit:
                raise Liar(f"its {name or kind} has {size} bytes; {limit} is the limit")
            if total >= 0 and size != total:
                raise Liar(f"its {name or kind} changed its size")
            total = size
            if len(piece) != min(PIECE_BYTES, total - len(data)):
                raise Liar(f"{len(piece)} bytes came that were not asked for")
            data += piece
        return bytes(data)

    # -- tensors ------------------------------------------------------------------------------------------------

    async def _get_all(self, assembly: Assembly, missing: deque[Unit]) -> None:
        fruitless = 0
        while missing:
            before = self._done
            with unwrap_groups(OSError):
                async with trio.open_nursery() as nursery:
                    for _ in range(PEERS):
                        nursery.start_soon(self._use_peers, assembly, missing)
            if not missing:
                break
            fruitless = 0 if self._done > before else fruitless + 1
            if fruitless >= ROUNDS_WITHOUT:
                raise self._givers.give_up(f"{len(missing)} parts of its tensors")
            await self._givers.find()

    async def _use_peers(self, assembly: Assembly, missing: deque[Unit]) -> None:
        """Ask one peer after the other, until nothing is missing or no peer is left."""
        while missing or self._flights:
            source = next((source for source in self._givers.rank() if not source.in_use), None)
            if source is None:
                return
            source.in_use = True
            try:
                await self._use(source, assembly, missing)
            finally:
                source.in_use = False

    async def _use(self, source: Source, assembly: Assembly, missing: deque[Unit]) -> None:
        """Ask one peer until nothing is missing or it is dropped."""

        async def work() -> None:
            while missing or self._flights:
                if not missing:  # but what others are at may come back
                    self._take_over(source)
                    await trio.sleep(IDLE_LOOK_S)
                    continue
                try:
                    await self._fly(source, assembly, missing)
                except DaaswarmError as error:
                    if isinstance(error, ConfigError):
                        raise
                    await self._givers.drop(source, error)
                    scope.cancel()

        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                for _ in range(1 if source.late else UNITS_PER_PEER):  # they share one line
                    nursery.start_soon(work)

    async def _fly(self, source: Source, assembly: Assembly, missing: deque[Unit]) -> None:
        """Get the first missing unit from a peer; it is missing again if that fails.

        Raises:
            DeadlineExceeded: the peer is too slow.
            DaaswarmError: the peer failed otherwise.
        """
        unit, now, is_right = missing.popleft(), trio.current_time(), False
        # Who was too slow is asked again only if nobody else is left, so then it has more time.
        seconds = (1 + source.late) * (UNIT_S + unit.nbytes / SLOWEST_BYTES_PER_S)
        scope = trio.CancelScope(deadline=now + seconds)
        flight = Flight(source, unit, now, scope)
        self._flights.append(flight)
        try:
            with scope:
                await self._get_unit(source, assembly, unit)
                is_right = True
            if not is_right:
                raise DeadlineExceeded(f"tensor {unit.entry.name} took it too long")
        finally:
            self._flights.remove(flight)
            if not is_right:
                missing.appendleft(unit)
        source.right_bytes += unit.nbytes
        source.right_s += trio.current_time() - now
        await self._tell(assembly.total)

    def _take_over(self, idle: Source) -> None:
        """What others are far slower at than an idle peer would be is taken away from them."""
        if not idle.right_bytes:
            return
        for flight in self._flights:
            due_s = flight.unit.nbytes * idle.right_s / idle.right_bytes
            if flight.source is not idle and trio.current_time() - flight.began > max(SLOWER * due_s, PATIENCE_S):
                flight.scope.cancel()

    async def _get_unit(self, source: Source, assembly: Assembly, unit: Unit) -> None:
        name, due, at = unit.entry.name, get_bytes(unit.entry), 0
        try:
            while at < unit.nbytes:
                size = min(PIECE_BYTES, unit.nbytes - at)
                total, piece = await self._givers.ask(source, "tensor", name, unit.offset + at, size)
                if total != due or len(piece) != size:
                    raise Liar(f"tensor {name}: {len(piece)} of {total} bytes came, {size} of {due} were due")
                await self._on_disk(lambda at=at, piece=piece: assembly.write(unit, at, piece))
                at += size
                self._under_way += size
                await self._tell(assembly.total)
            if not await self._on_disk(lambda: assembly.verify(unit)):
                raise Liar(f"its tensor {name} is not the model's")
        finally:
            self._under_way -= at
        self._done += unit.nbytes  # and nothing that can be cancelled after it

    # -- parts --------------------------------------------------------------------------------------------------

    async def _on_disk(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work, limiter=self._disk)

    def _check_and_tell(self, what: str, done: int, total: int) -> None:
        trio.from_thread.check_cancelled()
        self._progress(what, done, total)

    async def _tell(self, total: int) -> None:
        now = time.monotonic()
        if now - self._told >= PROGRESS_S or self._done == total:
            self._told = now
            done = self._done + self._under_way
            await self._emit({"event": "progress", "what": "pulling", "done": done, "total": total, "unit": "bytes"})

    async def _say(self, text: str) -> None:
        await self._emit({"event": "message", "text": text})


async def wait_for_lock(path: Path, emit: Emit) -> int:
    """The lock's descriptor, as soon as no other process holds it."""
    while (lock := await trio.to_thread.run_sync(try_lock, path)) is None:
        await emit({"event": "progress", "what": WAITING, "done": 0, "total": 0})
        await trio.sleep(LOCK_POLL_S)
    return lock


def describe(model: KnownModel, received: int, sources: list[Source], seconds: float) -> Event:
    """The result of a pull."""
    peers = [{"peer_id": s.contact.peer_id, "bytes": s.nbytes, "dropped": s.dropped} for s in sources]
    return {
        "model": model.name,
        "model_root": model.root,
        "folder": str(model.folder),
        "bytes_received": received,
        "seconds": round(seconds, 3),
        "peers": peers,
    }
