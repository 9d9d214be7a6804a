"""Gives peers the models that this node hosts, piece by piece, within what the owner allowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec
import trio

from daaswarm.core.pacing import TokenBucket
from daaswarm.errors import Busy, ConfigError, ExpertError, RemoteProtocolError
from daaswarm.limits import MIB
from daaswarm.messages import GetModelPart, ModelPart
from daaswarm.models.checkpoint import Checkpoint
from daaswarm.models.sources import LocalModel
from daaswarm.node.hosting import Hosting
from daaswarm.node.neighbour import GoodNeighbour
from daaswarm.types import ModelRoot

if TYPE_CHECKING:
    from daaswarm.net.frames import Buffer

SHARED_BYTES_PER_S = 64 * MIB  # of all peers together; expert calls come first (host.upload bounds both)
READS = 2  # from disk at once: these are random reads, beside an owner's own
WAITING = 64  # requests for pieces; more are told to come again
OPEN_MODELS = 4  # whose files are kept open
RETRY_S = 1.0  # a queue of 64 pieces of 1 MiB at 64 MiB/s

_Read = Callable[[int, int], bytes]  # (offset, size) → bytes


class Sharing:
    """Answers :class:`GetModelPart`.

    Args:
        hosting: only models that it serves are given away, and only while their files are what was loaded.
        neighbour: its upload limit holds for pieces too.
    """

    def __init__(self, hosting: Hosting, neighbour: GoodNeighbour) -> None:
        self._hosting = hosting
        self._neighbour = neighbour
        self._bucket = TokenBucket(SHARED_BYTES_PER_S)
        self._reads = trio.CapacityLimiter(READS)
        self._waiting = 0
        self._open: dict[ModelRoot, _Source] = {}

    async def answer(self, message: GetModelPart, deadline_s: float) -> tuple[ModelPart, Sequence[Buffer]]:
        """The bytes asked for.

        Raises:
            ExpertError: the model, or what is named, is not here.
            Busy: paused, too many ask, or the upload limit is reached.
            RemoteProtocolError: it asks for bytes past the end.
        """
        if self._neighbour.pause is not None:
            pause = self._neighbour.pause
            raise Busy(f"this host is paused: {pause.reason}", retry_after_s=pause.retry_after_s)
        if self._waiting >= WAITING:
            raise Busy("too many pieces of models are asked for", hint="ask another host", retry_after_s=RETRY_S)
        model = self._hosting.get_source(ModelRoot(message.model_root))
        if model is None:
            raise ExpertError(f"model {message.model_root[:12]} is not hosted here", hint="ask for this peer's adverts")
        self._waiting += 1
        try:
            source = self._get(model)
            async with self._neighbour.uploading(message.size, deadline_s):
                await trio.sleep(self._bucket.take(message.size, trio.current_time()))
                source.readers += 1
                try:
                    async with source.turn:
                        total, data = await trio.to_thread.run_sync(source.read, message, limiter=self._reads)
                finally:
                    source.readers -= 1
        finally:
            self._waiting -= 1
        return ModelPart(total=total), [data]

    def close(self) -> None:
        """Close all files."""
        for source in self._open.values():
            source.close()
        self._open.clear()

    def _get(self, model: LocalModel) -> _Source:
        for root, source in list(self._open.items()):
            stale = self._hosting.get_source(root) is None or len(self._open) >= OPEN_MODELS
            if root != model.root and stale and not source.readers:
                source.close()
                del self._open[root]
        if model.root not in self._open:
            self._open[model.root] = _Source(model)
        return self._open[model.root]


class _Source:
    """One model on disk.

    Attributes:
        readers: requests that use it now; it is closed when there are none.
    """

    def __init__(self, model: LocalModel) -> None:
        self.readers = 0
        self.turn = trio.Lock()
        self._model = model
        self._checkpoint: Checkpoint | None = None
        self._manifest = b""

    def read(self, message: GetModelPart) -> tuple[int, bytes]:
        """(bytes in all, those asked for). Blocks. Only what the manifest names is ever opened."""
        try:
            if message.kind == "manifest":
                self._manifest = self._manifest or msgspec.msgpack.encode(self._model.manifest)
                return self._cut(message, len(self._manifest), lambda at, size: self._manifest[at : at + size])
            if message.kind == "file":
                return self._read_file(message)
            return self._read_tensor(message)
        except (OSError, ConfigError):
            raise ExpertError(
                f"model {message.model_root[:12]} can't be read here any more", hint="ask another host"
            ) from None

    def _read_file(self, message: GetModelPart) -> tuple[int, bytes]:
        if message.name not in self._model.manifest.files:
            raise ExpertError("the model has no such file", hint="ask for what its manifest names")
        with (self._model.folder / message.name).open("rb") as file:

            def read(at: int, size: int) -> bytes:
                file.seek(at)
                return file.read(size)

            total = file.seek(0, 2)
            return self._cut(message, total, read)

    def _read_tensor(self, message: GetModelPart) -> tuple[int, bytes]:
        if self._checkpoint is None:
            self._checkpoint = Checkpoint(self._model.folder)
        tensor = self._checkpoint.tensors.get(message.name)
        if tensor is None:
            raise ExpertError("the model has no such tensor", hint="ask for what its manifest names")

        def read(at: int, size: int) -> bytes:
            assert self._checkpoint is not None
            data = bytearray(size)
            self._checkpoint.read_into(message.name, at, memoryview(data))
            return bytes(data)

        return self._cut(message, tensor.nbytes, read)

    def _cut(self, message: GetModelPart, total: int, read: _Read) -> tuple[int, bytes]:
        if message.offset > total:
            raise RemoteProtocolError(f"byte {message.offset} of {total} was asked for", reject=False)
        return total, read(message.offset, min(message.size, total - message.offset))

    def close(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.close()
            self._checkpoint = None
