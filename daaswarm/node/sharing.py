"""Gives peers the models that this node hosts, piece by piece, within what the owner allowed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
import trio

from daaswarm.core.pacing import TokenBucket
from daaswarm.errors import Busy, ConfigError, ExpertError, RemoteProtocolError
from daaswarm.limits import MIB
from daaswarm.messages import GetModelPart, ModelPart
from daaswarm.models.checkpoint import Checkpoint
from daaswarm.models.sources import LocalModel
from daaswarm.node.hosting import Hosting
from daaswarm.node.neighbour import QUEUE_SHARE, GoodNeighbour
from daaswarm.types import ModelRoot, PeerId

if TYPE_CHECKING:
    from daaswarm.net.frames import Buffer

SHARED_BYTES_PER_S = 64 * MIB  # of all peers together; bounds what is read from the owner's disk too
READS = 2  # from disk at once: these are random reads, beside an owner's own
WAITING = 64  # requests for pieces; more are told to come again
WAITING_PER_PEER = 8  # of them; one that pulls asks for 3 at the same time
OPEN_MODELS = 4  # whose files are kept open though nobody asks for them
RETRY_S = 1.0  # a queue of 64 pieces of 1 MiB at 64 MiB/s
SPARE_S = 0.05  # between two looks at what calls left of the upload limit

T = TypeVar("T")
_Read = Callable[[int, int], bytes]  # (offset, size) → bytes


class Sharing:
    """Answers :class:`GetModelPart`.

    Args:
        hosting: only models that it serves are given away, and only while their files are what was loaded.
        neighbour: of its upload limit, pieces get what expert calls leave.
    """

    def __init__(self, hosting: Hosting, neighbour: GoodNeighbour) -> None:
        self._hosting = hosting
        self._neighbour = neighbour
        self._buckets = [TokenBucket(SHARED_BYTES_PER_S), *filter(None, [neighbour.upload])]
        self._turn = trio.Lock()  # to take from the buckets: first come, first served
        self._ahead = [0] * len(self._buckets)  # bytes that those who wait still want of each
        self._reads = trio.CapacityLimiter(READS)
        self._waiting: Counter[PeerId] = Counter()
        self._open: dict[ModelRoot, _Source] = {}  # the one asked for last comes last

    async def answer(
        self, peer: PeerId, message: GetModelPart, deadline_s: float
    ) -> tuple[ModelPart, Sequence[Buffer]]:
        """The bytes asked for.

        Raises:
            ExpertError: the model, or what is named, is not here.
            Busy: paused, too many ask, or it would be sent too late.
            RemoteProtocolError: it asks for bytes past the end.
        """
        latest = trio.current_time() + QUEUE_SHARE * deadline_s
        if self._neighbour.pause is not None:
            pause = self._neighbour.pause
            raise Busy(f"this host is paused: {pause.reason}", retry_after_s=pause.retry_after_s)
        model = self._hosting.get_source(ModelRoot(message.model_root))
        if model is None:
            raise ExpertError(f"model {message.model_root[:12]} is not hosted here", hint="ask for this peer's adverts")
        with self._place(peer), self._using(model) as source:
            total, read = await self._run(source, lambda: source.find(message))
            if message.offset > total:
                raise RemoteProtocolError(f"byte {message.offset} of {total} was asked for", reject=False)
            size = min(message.size, total - message.offset)
            await self._claim(size, latest)
            try:
                data = await self._run(source, lambda: read(message.offset, size))
            except BaseException:
                if self._neighbour.upload is not None:
                    self._neighbour.upload.give_back(size)  # read perhaps, but not sent
                raise
        return ModelPart(total=total), [data]

    def close(self) -> None:
        """Close all files; those in use as soon as they are no longer."""
        for root in list(self._open):
            self._forget(root)

    # -- what may be sent ---------------------------------------------------------------------------------------

    @contextmanager
    def _place(self, peer: PeerId) -> Iterator[None]:
        if self._waiting[peer] >= WAITING_PER_PEER or self._waiting.total() >= WAITING:
            raise Busy("too many pieces of models are asked for", hint="ask another host", retry_after_s=RETRY_S)
        self._waiting[peer] += 1
        try:
            yield
        finally:
            self._waiting[peer] -= 1
            if not self._waiting[peer]:
                del self._waiting[peer]

    async def _claim(self, size: int, latest: float) -> None:
        """Wait until ``size`` bytes may be sent. Nothing is owed before: who gives up leaves no debt to others.

        Raises:
            Busy: that would be after ``latest`` (of trio's clock).
        """
        now = trio.current_time()
        waits = zip(self._buckets, self._ahead, strict=True)
        wait_s = max(bucket.get_spare_wait_s(ahead + size, now) for bucket, ahead in waits)
        if now + wait_s > latest:
            raise self._refuse(now + wait_s - latest)
        rest = [size] * len(self._buckets)

        def note(bucket: int, taken: int) -> None:
            rest[bucket] -= taken
            self._ahead[bucket] -= taken

        self._ahead = [ahead + size for ahead in self._ahead]
        try:
            with trio.move_on_at(latest):
                async with self._turn:
                    await take_spare(self._buckets, size, note)
                return
        finally:
            self._ahead = [ahead - left for ahead, left in zip(self._ahead, rest, strict=True)]
        raise self._refuse(RETRY_S)  # calls left too little

    def _refuse(self, retry_after_s: float) -> Busy:
        hint = f"try again in {retry_after_s:.1f} s, or another host"
        return Busy("this host sends as much as it may", hint=hint, retry_after_s=retry_after_s)

    # -- files --------------------------------------------------------------------------------------------------

    @contextmanager
    def _using(self, model: LocalModel) -> Iterator[_Source]:
        source = self._open.pop(model.root, None)
        if source is not None and source.model is not model:  # loaded anew, perhaps from another folder
            source.drop()
            source = None
        source = self._open[model.root] = source or _Source(model)
        source.readers += 1
        self._tidy()
        try:
            yield source
        finally:
            source.readers -= 1
            if self._open.get(model.root) is source:
                self._tidy()
            else:
                source.drop()

    def _tidy(self) -> None:
        for root, source in list(self._open.items()):
            stale = self._hosting.get_source(root) is None or len(self._open) > OPEN_MODELS
            if stale and not source.readers:
                self._forget(root)

    def _forget(self, root: ModelRoot) -> None:
        self._open.pop(root).drop()

    async def _run(self, source: _Source, work: Callable[[], T]) -> T:
        try:
            async with source.turn:
                return await trio.to_thread.run_sync(work, limiter=self._reads)
        except (OSError, ConfigError):
            raise ExpertError(
                f"model {source.model.root[:12]} can't be read here any more", hint="ask another host"
            ) from None


async def take_spare(buckets: Sequence[TokenBucket], size: int, note: Callable[[int, int], None]) -> None:
    """Claim ``size`` bytes of each bucket, as they become spare; nothing when cancelled. ``note`` is told which
    bucket gave how much, each time."""
    claimed = [0] * len(buckets)
    try:
        for i, bucket in enumerate(buckets):
            while True:
                taken = bucket.take_spare(size - claimed[i], trio.current_time())
                claimed[i] += taken
                note(i, taken)
                if claimed[i] == size:
                    break
                await trio.sleep(SPARE_S)
    except BaseException:
        for bucket, taken in zip(buckets, claimed, strict=True):
            bucket.give_back(taken)
        raise


class _Source:
    """One model on disk.

    Attributes:
        readers: requests that use it now; it is closed when there are none.
        turn: held while a thread works with it.
    """

    def __init__(self, model: LocalModel) -> None:
        self.model = model
        self.readers = 0
        self.turn = trio.Lock()
        self._checkpoint: Checkpoint | None = None
        self._manifest = b""

    def find(self, message: GetModelPart) -> tuple[int, _Read]:
        """How many bytes there are of what is asked for, and what reads them (both block).

        Only what the manifest names is ever opened.
        """
        if message.kind == "manifest":
            manifest = self._manifest = self._manifest or msgspec.msgpack.encode(self.model.manifest)
            return len(manifest), lambda at, size: manifest[at : at + size]
        if message.kind == "file":
            if message.name not in self.model.manifest.files:
                raise ExpertError("the model has no such file", hint="ask for what its manifest names")
            path = self.model.folder / message.name
            return path.stat().st_size, lambda at, size: read_file(path, at, size)
        if self._checkpoint is None:
            self._checkpoint = Checkpoint(self.model.folder)
        checkpoint, name = self._checkpoint, message.name
        if name not in checkpoint.tensors:
            raise ExpertError("the model has no such tensor", hint="ask for what its manifest names")
        return checkpoint.tensors[name].nbytes, lambda at, size: read_tensor(checkpoint, name, at, size)

    def drop(self) -> None:
        """It is no longer found here: close it as soon as nobody uses it."""
        if not self.readers and self._checkpoint is not None:
            self._checkpoint.close()
            self._checkpoint = None


def read_file(path: Path, at: int, size: int) -> bytes:
    """Blocks."""
    with path.open("rb") as file:
        file.seek(at)
        return file.read(size)


def read_tensor(checkpoint: Checkpoint, name: str, at: int, size: int) -> bytes:
    """Blocks."""
    data = bytearray(size)
    checkpoint.read_into(name, at, memoryview(data))
    return bytes(data)
