"""What a node serves: which experts it takes on, and for how long the swarm is told of them."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import trio

from daaswarm.config import Config
from daaswarm.core.courtesy import Pause
from daaswarm.core.placement import choose_experts
from daaswarm.errors import ConfigError
from daaswarm.models.fingerprint import Fingerprint, find_changed, take_fingerprint
from daaswarm.models.sources import LocalModel
from daaswarm.net.discovery import Discovery
from daaswarm.node.balancing import Balancing, find_holders
from daaswarm.node.reporting import Emit, Event, get_model, make_progress
from daaswarm.types import Dtype, ExpertId, ModelRoot, format_bytes, format_range, parse_bytes, parse_range

if TYPE_CHECKING:
    from daaswarm.experts.service import ExpertService, HostedModel

logger = logging.getLogger(__name__)


LAST = 1 << 30  # "hosts" of an expert that is to be chosen after all others


class Wish(NamedTuple):
    """What a ``host-expert`` asks for, checked as far as can be without the swarm.

    Attributes:
        held: ``{layer: [experts]}``; ``None`` leaves the choice to the node.
    """

    model: LocalModel
    dtype: Dtype
    held: dict[int, list[int]] | None
    memory_bytes: int


class Served(NamedTuple):
    """What came of a :class:`Wish`.

    Attributes:
        ready: what the event ``ready`` says of it.
        balancing: looks after it while it lasts; ``None`` where the user chose the experts.
    """

    ready: Event
    balancing: Balancing | None


class Hosting:
    """The experts of one node.

    Args:
        discovery: is told what is served.

    Attributes:
        limit_bytes: of all experts together.
    """

    def __init__(self, config: Config, discovery: Discovery) -> None:
        self.service: ExpertService | None = None  # importing it takes seconds: made when the first expert comes
        self.limit_bytes = parse_bytes(config.host.memory, option="host.memory")
        self.changing = trio.Lock()  # what is served grows by one change at a time: each rests on what is held
        self._threads = config.host.threads
        self._tags = config.host.tags
        self._device = config.host.device
        self._discovery = discovery
        self._pause: Pause | None = None
        self._reserved = 0  # bytes of experts that are being read
        self._read: dict[ModelRoot, tuple[LocalModel, Fingerprint]] = {}  # the files as they were
        self._changed: dict[ModelRoot, list[str]] = {}  # files that are no longer

    def get_service(self) -> ExpertService:
        """The part that computes."""
        if self.service is None:
            from daaswarm.experts.service import ExpertService

            self.service = ExpertService(threads=self._threads)
            self.service.pause = self._pause
        return self.service

    def set_pause(self, pause: Pause | None) -> None:
        """Compute nothing for peers while there is one, and say so in the adverts."""
        self._pause = pause
        if self.service is not None:
            self.service.pause = pause
        self._discovery.set_paused(pause is not None)

    @property
    def used_bytes(self) -> int:
        """Of all experts, those being read included."""
        models = self.service.models.values() if self.service is not None else ()
        return self._reserved + sum(model.nbytes for model in models)

    @contextmanager
    def reserving(self, nbytes: int) -> Iterator[None]:
        """Count experts of this size as held during the block.

        Raises:
            ConfigError: they don't fit beside what is held.
        """
        if self.used_bytes + nbytes > self.limit_bytes:
            used = f", {format_bytes(self.used_bytes)} of which are in use" if self.used_bytes else ""
            raise ConfigError(
                f"these experts take {format_bytes(nbytes)}; the limit is {format_bytes(self.limit_bytes)}{used}",
                hint="serve fewer, or start the node with a larger --memory (host.memory in its settings)",
            )
        self._reserved += nbytes
        try:
            yield
        finally:
            self._reserved -= nbytes

    def get_hosted(self, root: ModelRoot) -> HostedModel | None:
        """What is served of a model now."""
        models = self.service.models.values() if self.service is not None else ()
        return next((hosted for hosted in models if hosted.root == root), None)

    def get_source(self, root: ModelRoot) -> LocalModel | None:
        """The files of a model of which something is served now, as long as they are what was loaded."""
        if self.get_hosted(root) is None or self._changed.get(root) or root not in self._read:
            return None
        return self._read[root][0]

    def describe(self) -> list[Event]:
        """What ``daaswarm status`` shows of each model served."""
        return [
            {
                "name": model.name,
                "root": model.root,
                "dtype": model.dtype,
                "bytes": model.nbytes,
                "calls": model.calls,
                "rows": model.rows,
                "held": {str(layer): list(experts.ids) for layer, experts in sorted(model.layers.items())},
                "changed_files": self._changed.get(model.root, []),
            }
            for model in (self.service.models.values() if self.service is not None else ())
        ]

    def describe_kernels(self) -> list[Event]:
        """What was tried for the experts served here, and what was chosen."""
        if self.service is None:
            return []
        from daaswarm.models.kernels import REGISTRY

        return [
            {
                "first": list(choice.first),
                "down": list(choice.down),
                "dtype": str(choice.dtype).removeprefix("torch."),
                "kernel": choice.kernel,
                "times_ms": {
                    name: {str(rows): round(ms, 3) for rows, ms in times.items()}
                    for name, times in choice.times_ms.items()
                },
                "wrong": choice.wrong,
            }
            for choice in REGISTRY.choices
        ]

    async def check(self, params: Event, emit: Emit) -> Wish:
        """Refuse what can be refused before anybody else is asked.

        Raises:
            ConfigError: a bad model or range, or more than fits.
        """
        model = await get_model(params["model"], emit)
        wish = Wish(model, params["dtype"], get_held(model, params), params["memory_bytes"])
        if wish.held is not None:
            with self.reserving(count_bytes(model, wish.dtype, wish.held)):
                pass  # it fits
        return wish

    @asynccontextmanager
    async def serve(self, wish: Wish, emit: Emit) -> AsyncIterator[Served]:
        """Load the experts and offer them during the block.

        Raises:
            ConfigError: they are served already, or not one fits into the memory given.
        """
        await import_loading()
        model, dtype = wish.model, wish.dtype
        service = self.get_service()
        async with self.changing:
            if wish.held is None:
                wish = wish._replace(memory_bytes=min(wish.memory_bytes, self.limit_bytes - self.used_bytes))
            held = wish.held if wish.held is not None else await self._choose_beside(wish)
            service.check_free(model.root, model.name, dtype, held)
            with self.reserving(count_bytes(model, dtype, held)):
                hosted, bytes_read = await self.load(model, held, dtype, emit)
            service.add(hosted)
        try:
            self.advertise(model.root)
            ready: Event = {
                "model": model.name,
                "model_root": model.root,
                "dtype": dtype,
                "held": {str(layer): ids for layer, ids in held.items()},
                "bytes_held": hosted.nbytes,
                "bytes_read": bytes_read,
                "lines": [describe_held(model, held, hosted.nbytes)],
            }
            balancing = None
            if wish.held is None:
                balancing = Balancing(self, self._discovery, self._discovery.peer_id, wish, held, emit)
            yield Served(ready, balancing)
        finally:
            service.remove(model.root, dtype, held)
            self.advertise(model.root)

    async def load(
        self, model: LocalModel, held: dict[int, list[int]], dtype: Dtype, emit: Emit
    ) -> tuple[HostedModel, int]:
        """Read experts into memory, each part checked against the manifest; also the number of bytes read.

        Nothing of the files is mapped: what is written to them later, or cut off, changes nothing that is served.

        Raises:
            ModelError: a tensor was altered or is missing.
        """
        await import_loading()
        from daaswarm.experts.loading import load_hosted

        fingerprint = await trio.to_thread.run_sync(take_fingerprint, model.folder, abandon_on_cancel=True)
        loaded = await trio.to_thread.run_sync(
            load_hosted, model, held, dtype, make_progress(emit), self._device, abandon_on_cancel=True
        )
        self._read[model.root] = model, fingerprint
        self._changed.pop(model.root, None)
        return loaded

    async def check_files(self) -> None:
        """Notice that files were changed of which experts are served. Those in memory are still what was checked."""
        for root, known in list(self._read.items()):
            if self.get_hosted(root) is None:
                if not self.changing.locked():  # else it may have been read just now, to be served
                    self._read.pop(root, None)
                    self._changed.pop(root, None)
                continue
            model, fingerprint = known
            changed = await trio.to_thread.run_sync(find_changed, model.folder, fingerprint, abandon_on_cancel=True)
            if self._read.get(root) is not known:  # read again meanwhile, or given up
                continue
            if changed and changed != self._changed.get(root):
                logger.warning(
                    "%s was changed on disk (%s): what was loaded before is still served; nothing of it is read again"
                    " unless it is what its manifest says",
                    model.folder,
                    ", ".join(changed),
                )
            self._changed[root] = changed

    def advertise(self, root: ModelRoot) -> None:
        """Publish what this node serves of a model now, or that it is nothing any more."""
        hosted = self.get_hosted(root)
        if hosted is None:
            self._discovery.withdraw(root)
        else:
            held = {layer: list(experts.ids) for layer, experts in hosted.layers.items()}
            self._discovery.advertise(
                root,
                hosted.name,
                hosted.kind,
                held,
                hosted.dtype,
                paused=self._pause is not None,
                tags=self._tags,
                device=hosted.device,
            )

    async def _choose_beside(self, wish: Wish) -> dict[int, list[int]]:
        """What to serve of a model of which this node may serve some layers already: one command has a layer whole.

        Raises:
            ConfigError: nothing is left, or fits.
        """
        hosted = self.get_hosted(wish.model.root)
        taken = {layer: list(range(wish.model.layers[layer])) for layer in hosted.layers} if hosted else {}
        chosen = await self.choose(wish, taken)
        if not chosen:
            raise ConfigError(
                f"this node serves something of all layers of {wish.model.name} that would fit",
                hint="stop the other host-expert (or expert remove) first",
            )
        return chosen

    async def choose(self, wish: Wish, without: dict[int, list[int]] | None = None) -> dict[int, list[int]]:
        """The experts with the fewest live hosts that fit into the memory given.

        Args:
            without: not these; they are served here already.
        """
        holders = await find_holders(self._discovery, wish.model.root, wish.dtype)
        counts = {expert: len(peers) for expert, peers in holders.items()}
        for layer, experts in (without or {}).items():
            for expert in experts:
                counts[ExpertId(layer, expert)] = LAST
        chosen = choose(wish.model, wish.dtype, wish.memory_bytes, counts)
        fresh = {layer: sorted(set(ids) - set((without or {}).get(layer, ()))) for layer, ids in chosen.items()}
        return {layer: ids for layer, ids in fresh.items() if ids}


async def import_loading() -> None:
    """Importing what reads experts takes seconds, in a thread."""
    await trio.to_thread.run_sync(import_module, "daaswarm.experts.loading", abandon_on_cancel=True)


def count_bytes(model: LocalModel, dtype: Dtype, held: dict[int, list[int]]) -> int:
    """What some experts take in memory."""
    return sum(len(ids) * model.expert_bytes(layer, dtype) for layer, ids in held.items())


def get_held(model: LocalModel, params: dict[str, Any]) -> dict[int, list[int]] | None:
    """``{layer: [experts]}`` of the ranges given; ``None`` without any.

    Raises:
        ConfigError: a range outside the model, or no range and not one expert that fits.
    """
    ranges = params["experts"] if model.kind == "moe" else params["slices"]
    wrong = params["slices"] if model.kind == "moe" else params["experts"]
    option = "--experts" if model.kind == "moe" else "--slices"
    if wrong is not None:
        raise ConfigError(f"{model.name} is split into {option[2:]}", hint=f"use {option}")
    if params["layers"] is None and ranges is None:
        choose(model, params["dtype"], params["memory_bytes"], {})  # refuses what fits under no circumstances
        return None
    layers = sorted(model.layers)
    if params["layers"] is not None:
        layers = parse_range(params["layers"], option="--layers")
        outside = [layer for layer in layers if layer not in model.layers]
        if outside:
            raise ConfigError(
                f"--layers {params['layers']}: {model.name} has experts in layers "
                f"{min(model.layers)} to {max(model.layers)}, not in {outside[0]}",
                hint=f"--layers {min(model.layers)}-{max(model.layers)} is all",
            )
    held: dict[int, list[int]] = {}
    for layer in layers:
        count = model.layers[layer]
        held[layer] = parse_range(ranges, option=option, limit=count) if ranges else list(range(count))
    return held


def choose(model: LocalModel, dtype: Dtype, memory_bytes: int, live_hosts: dict[ExpertId, int]) -> dict[int, list[int]]:
    """The experts with the fewest live hosts, as many as fit.

    Raises:
        ConfigError: not one fits.
    """
    return choose_experts(
        model.layers, lambda layer: model.expert_bytes(layer, dtype), memory_bytes, live_hosts, random.Random()
    )


def describe_held(model: LocalModel, held: dict[int, list[int]], nbytes: int) -> str:
    """``"serving smollm2: layers 0-9 (all 8 slices), 106.2 MB"``; layers with the same experts stand together."""
    noun = "experts" if model.kind == "moe" else "slices"
    groups: dict[tuple[int, ...], list[int]] = {}
    for layer, ids in held.items():
        groups.setdefault(tuple(ids), []).append(layer)
    parts = []
    for ids, layers in groups.items():
        whole = all(len(ids) == model.layers[layer] for layer in layers)
        which = f"all {len(ids)} {noun}" if whole else f"{noun} {format_range(list(ids))}"
        parts.append(f"layer{'s' * (len(layers) > 1)} {format_range(layers)} ({which})")
    return f"serving {model.name}: {', '.join(parts)}, {format_bytes(nbytes)}"
