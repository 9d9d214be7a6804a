"""Gets a whole model from those who host it. Nobody is believed: the root that was asked for decides what is right.

The manifest is checked against the root, each part of a tensor against the manifest. A part is asked of one peer at a
time, so that a wrong one has a culprit: it is asked nothing more, and what it was at is asked elsewhere.
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
from daaswarm.errors import Busy, ConfigError, DaaswarmError, ModelError, NoPeerCouldServe, unwrap_groups
from daaswarm.limits import KIB
from daaswarm.messages import Contact, GetModelPart, ModelPart
from daaswarm.models.assembly import Assembly, Unit, get_bytes, get_pulled_folder
from daaswarm.models.cache import LOCK_POLL_S, WAITING, try_lock
from daaswarm.models.files import SMALL_FILE_BYTES
from daaswarm.models.manifest import MANIFEST_BYTES, Manifest, parse_manifest
from daaswarm.models.manifest_file import MANIFEST_NAME, load_manifest
from daaswarm.models.sources import KnownModel, find_known
from daaswarm.net.dataplane import TcpNetwork
from daaswarm.net.discovery import Discovery
from daaswarm.node.reporting import PROGRESS_S, Emit, Event, make_progress
from daaswarm.types import ModelRoot, PeerId

PIECE_BYTES = 512 * KIB  # of one request: a moment of a slow link
PIECE_S = 10.0  # for one: who is slower than 50 kB/s is of no help
PEERS = 8  # asked at the same time
UNITS_PER_PEER = 3  # at the same time, so that a round trip costs nothing
BUSY_RETRIES = 30  # of one piece
BUSY_S = 2.0  # between two of them, at most
ROUNDS_WITHOUT = 2  # looks for peers without anything gained in between; then it is given up

T = TypeVar("T")


@dataclass
class Source:
    """A peer that says it hosts the model.

    Attributes:
        dropped: why it is asked nothing more.
        lied: it is not asked again in this pull.
    """

    contact: Contact
    nbytes: int = 0
    dropped: str = ""
    lied: bool = False


class Liar(DaaswarmError):
    """A peer sent what is not of the model."""


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
                if not folder.is_dir():
                    return await _Pull(self._network, self._discovery, root, cache, emit).run()
            finally:
                os.close(lock)
        except OSError as error:
            raise ConfigError(
                f"the cache {cache} can't be written: {error}", hint="make room or choose another cache"
            ) from None
        manifest = load_manifest(folder / MANIFEST_NAME)  # another process made it meanwhile
        return describe(KnownModel(folder.name, folder, ModelRoot(manifest.root)), 0, [], 0.0)


class _Pull:
    """One pull."""

    def __init__(self, network: TcpNetwork, discovery: Discovery, root: ModelRoot, cache: Path, emit: Emit) -> None:
        self._network = network
        self._discovery = discovery
        self._root = root
        self._cache = cache
        self._emit = emit
        self._progress = make_progress(emit)
        self._sources: dict[PeerId, Source] = {}
        self._disk = trio.CapacityLimiter(1)  # where there is no pwrite, a write is two calls
        self._told = 0.0
        self._done = 0  # bytes that are right
        self._under_way = 0  # bytes of parts that are not whole yet

    async def run(self) -> Event:
        began = trio.current_time()
        await self._find_sources()
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
        received = sum(source.nbytes for source in self._sources.values())
        seconds = trio.current_time() - began
        known = KnownModel(folder.name, folder, self._root)
        return describe(known, received, list(self._sources.values()), seconds)

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
        """A small thing, whole, from the first who gives the right one."""
        while True:
            source = next((s for s in self._sources.values() if not s.dropped), None)
            if source is None:
                raise self._give_up(f"its {name or kind}")
            try:
                data = await self._get_whole(source, kind, name, limit)
                return await self._on_disk(lambda data=data: check(data))
            except DaaswarmError as error:
                if isinstance(error, ConfigError):
                    raise
                await self._drop(source, error)

    async def _get_whole(self, source: Source, kind: str, name: str, limit: int) -> bytes:
        data = bytearray()
        total = -1
        while total < 0 or len(data) < total:
            size, piece = await self._ask(source, kind, name, len(data), PIECE_BYTES)
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
            usable = [source for source in self._sources.values() if not source.dropped][:PEERS]
            with unwrap_groups(OSError):
                async with trio.open_nursery() as nursery:
                    for source in usable:
                        nursery.start_soon(self._use, source, assembly, missing)
            if not missing:
                break
            fruitless = 0 if self._done > before else fruitless + 1
            if fruitless >= ROUNDS_WITHOUT:
                raise self._give_up(f"{len(missing)} parts of its tensors")
            await self._find_sources()

    async def _use(self, source: Source, assembly: Assembly, missing: deque[Unit]) -> None:
        """Ask one peer until nothing is missing or it is dropped."""

        async def work() -> None:
            while missing:
                unit = missing.popleft()
                is_right = False
                try:
                    await self._get_unit(source, assembly, unit)
                    is_right = True
                except DaaswarmError as error:
                    if isinstance(error, ConfigError):
                        raise
                    await self._drop(source, error)
                    scope.cancel()
                finally:
                    if not is_right:
                        missing.appendleft(unit)

        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                for _ in range(UNITS_PER_PEER):
                    nursery.start_soon(work)

    async def _get_unit(self, source: Source, assembly: Assembly, unit: Unit) -> None:
        name, due, at = unit.entry.name, get_bytes(unit.entry), 0
        try:
            while at < unit.nbytes:
                size = min(PIECE_BYTES, unit.nbytes - at)
                total, piece = await self._ask(source, "tensor", name, unit.offset + at, size)
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
        self._done += unit.nbytes
        await self._tell(assembly.total)

    # -- peers --------------------------------------------------------------------------------------------------

    async def _find_sources(self) -> None:
        """Those who host the model now. One that was merely slow or gone gets another chance if nobody else is left."""
        again: list[Source] = []
        for known in await self._discovery.find_adverts(self._root):
            peer = PeerId(known.advert.peer_id)
            source = self._sources.get(peer)
            if source is not None and source.dropped and not source.lied:
                again.append(source)
            elif source is None and peer != self._network.peer_id:
                self._sources[peer] = Source(Contact(peer_id=peer, addrs=known.advert.addrs))
        if all(source.dropped for source in self._sources.values()):
            for source in again:
                source.dropped = ""

    async def _ask(self, source: Source, kind: str, name: str, offset: int, size: int) -> tuple[int, memoryview]:
        request = GetModelPart(model_root=self._root, kind=kind, name=name, offset=offset, size=size)
        for _ in range(BUSY_RETRIES):
            try:
                reply, body = await self._network.call(source.contact, request, deadline_s=PIECE_S)
            except Busy as busy:
                await trio.sleep(min(max(busy.retry_after_s, 0.05), BUSY_S))
                continue
            if not isinstance(reply, ModelPart):
                raise Liar(f"it answered with {type(reply).__name__}")
            source.nbytes += len(body)
            return reply.total, body
        raise Busy("it is busy all the time")

    async def _drop(self, source: Source, error: DaaswarmError) -> None:
        if not source.dropped:
            source.dropped = error.message
            source.lied = isinstance(error, Liar) or error.code in ("remote_protocol_error", "peer_id_mismatch")
            await self._say(f"{source.contact.peer_id} is asked nothing more: {error.message}")

    def _give_up(self, what: str) -> NoPeerCouldServe:
        reasons = "; ".join(f"{peer}: {source.dropped}" for peer, source in self._sources.items() if source.dropped)
        nobody = f"no peer gave {what}: {reasons}" if reasons else "nobody in the swarm hosts it now"
        return NoPeerCouldServe(
            f"model {self._root[:12]} can't be pulled: {nobody}",
            hint="is the root right, and does a host-expert of it run? What was pulled is kept: run this again",
        )

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
    while (lock := try_lock(path)) is None:
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
