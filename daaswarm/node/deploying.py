"""Experts that a node serves whenever it runs: added and removed while it does, and taken up again at a start.

The store is written first, then what is served changes: a crash in between costs nothing that was acknowledged.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import msgspec
import trio

from daaswarm.errors import ConfigError, DaaswarmError
from daaswarm.models.sources import LocalModel
from daaswarm.node.hosting import Hosting, Wish, count_bytes, describe_held, get_held
from daaswarm.node.reporting import Emit, Event, get_model
from daaswarm.store.node_store import NodeStore
from daaswarm.store.records import Deployment
from daaswarm.types import Dtype, ModelRoot, format_bytes, format_range, parse_range

ROOT_PREFIX = 6  # letters of a model's root that name it, at least

Held = dict[int, list[int]]

logger = logging.getLogger(__name__)


class Deploying:
    """The deployments of one node.

    Args:
        hosting: serves them.
        store: keeps them.
        default_dtype: of a deployment that names none.
    """

    def __init__(self, hosting: Hosting, store: NodeStore, *, default_dtype: Dtype) -> None:
        self._hosting = hosting
        self._store = store
        self._default_dtype: Dtype = default_dtype
        self._deployed: dict[ModelRoot, Deployment] = {}
        self._failed: dict[ModelRoot, str] = {}  # why one is not served
        self._changing = trio.Lock()  # one change at a time: each rests on what is held

    def describe(self) -> list[Event]:
        """What ``expert list`` shows: everything served, and what should be and isn't."""
        described = [
            {**hosted, "deployed": hosted["root"] in self._deployed, "error": ""} for hosted in self._hosting.describe()
        ]
        for root, reason in self._failed.items():
            described.append({**describe_deployment(self._deployed[root]), "error": reason})
        return described

    async def restore(self, emit: Emit) -> None:
        """Serve what was deployed in earlier runs. What can't be is said, and tried again at the next start."""
        for deployment in await self._store.get_deployments():
            self._deployed[deployment.model_root] = deployment
            try:
                async with self._changing:
                    model = await get_model(deployment.source, emit)
                    if model.root != deployment.model_root:
                        raise ConfigError(
                            f"{deployment.source} is another model now",
                            hint=f"daaswarm expert remove {deployment.model_root[:12]}, and deploy it anew",
                        )
                    await self._load(model, deployment.held, deployment.dtype, emit)
            except DaaswarmError as error:
                self._failed[deployment.model_root] = error.message
                logger.warning("%s, which is deployed here, is not served: %s", deployment.name, error)
                await emit({"event": "message", "text": f"not served: {deployment.name}: {error.message}"})
            else:
                await emit({"event": "message", "text": describe_served(model, self._hosting)})

    async def deploy(self, params: Event, emit: Emit) -> Event:
        """Serve more experts, from now on and after every start.

        Raises:
            ConfigError: a bad model or range, more than the memory limit, or a ``host-expert`` serves a layer of it.
            StorageError: the disk refuses; then nothing was changed.
        """
        async with self._changing:
            model = await get_model(params["model"], emit)
            dtype = params["dtype"] or self._get_dtype(model)
            if params["layers"] is None and params["experts"] is None and params["slices"] is None:
                wanted = await self._choose(model, dtype, params["memory_bytes"])
            else:
                wanted = get_held(model, params) or {}
            before = self._get_held_here(model)
            self._check_not_lent(model, wanted)
            fresh = {layer: sorted(set(ids) - set(before.get(layer, ()))) for layer, ids in wanted.items()}
            fresh = {layer: ids for layer, ids in fresh.items() if ids}
            union = {layer: sorted({*ids, *before.get(layer, ())}) for layer, ids in fresh.items()}
            bytes_read = 0
            with self._hosting.reserving(count_bytes(model, dtype, fresh)):
                if union:
                    # A layer that grows is read whole, and held twice until it takes the other's place.
                    hosted, bytes_read = await self._hosting.load(model, union, dtype, emit)
                    await self._remember(model, params["model"], dtype, union)
                    self._hosting.get_service().put(hosted)
                    self._hosting.advertise(model.root)
            return {
                "model": model.name,
                "model_root": model.root,
                "dtype": dtype,
                "added": {str(layer): ids for layer, ids in fresh.items()},
                "held": {str(layer): ids for layer, ids in self._get_held_here(model).items()},
                "bytes_held": sum(m["bytes"] for m in self._hosting.describe() if m["root"] == model.root),
                "bytes_read": bytes_read,
                "lines": [describe_served(model, self._hosting) if union else "these experts are served here already"],
            }

    async def remove(self, params: Event, emit: Emit) -> Event:
        """Serve experts of a model no more. Calls in flight are answered.

        Raises:
            ConfigError: nothing of the kind is deployed here, or a bad range.
            StorageError: the disk refuses; then nothing was changed.
        """
        async with self._changing:
            deployment = self._find(params["model"])
            held = self._deployed[deployment.model_root].held
            gone = get_removed(held, params, deployment.name)
            left = {layer: sorted(set(held[layer]) - set(ids)) for layer, ids in gone.items()}
            partly = {layer: ids for layer, ids in left.items() if ids}
            wholly = [layer for layer, ids in left.items() if not ids]
            hosted = None
            if partly and deployment.model_root not in self._failed:
                model = await get_model(deployment.source, emit)
                if model.root != deployment.model_root:
                    raise ConfigError(
                        f"{deployment.source} is another model now, so part of a layer can't be read anew",
                        hint="remove the whole layers",
                    )
                hosted, _ = await self._hosting.load(model, partly, deployment.dtype, emit)
            rest = {layer: ids for layer, ids in {**held, **partly}.items() if layer not in wholly}
            if wholly:
                await self._store.remove_deployment(deployment.model_root, deployment.dtype, wholly)
            if partly:
                await self._store.put_deployment(msgspec.structs.replace(deployment, held=partly))
            if rest:
                self._deployed[deployment.model_root] = msgspec.structs.replace(deployment, held=rest)
            else:
                del self._deployed[deployment.model_root]
                self._failed.pop(deployment.model_root, None)
            if self._hosting.service is not None:
                if hosted is not None:
                    self._hosting.service.put(hosted)
                self._hosting.service.remove(deployment.model_root, deployment.dtype, wholly)
                self._hosting.advertise(deployment.model_root)
            return {
                "model": deployment.name,
                "model_root": deployment.model_root,
                "dtype": deployment.dtype,
                "removed": {str(layer): ids for layer, ids in gone.items()},
                "held": {str(layer): ids for layer, ids in rest.items()},
            }

    # -- parts --------------------------------------------------------------------------------------------------

    async def _load(self, model: LocalModel, held: Held, dtype: Dtype, emit: Emit) -> None:
        self._check_not_lent(model, held)
        service = self._hosting.get_service()
        with self._hosting.reserving(count_bytes(model, dtype, held)):
            hosted, _ = await self._hosting.load(model, held, dtype, emit)
            service.put(hosted)
        self._hosting.advertise(model.root)

    async def _remember(self, model: LocalModel, source: str, dtype: Dtype, changed: Held) -> None:
        known = self._deployed.get(model.root)
        deployment = Deployment(
            model_root=model.root,
            dtype=dtype,
            name=model.name,
            source=source,
            held=changed,
            created_at=time.time() if known is None else known.created_at,
        )
        await self._store.put_deployment(deployment)
        held = {**(known.held if known is not None else {}), **changed}
        self._deployed[model.root] = msgspec.structs.replace(deployment, held=dict(sorted(held.items())))
        self._failed.pop(model.root, None)

    async def _choose(self, model: LocalModel, dtype: Dtype, memory_bytes: int | None) -> Held:
        """As much as is asked for, or else as fits."""
        free = self._hosting.limit_bytes - self._hosting.used_bytes
        if memory_bytes is not None and memory_bytes > free:
            raise ConfigError(
                f"--memory {format_bytes(memory_bytes)}: {format_bytes(max(free, 0))} are free of the "
                f"{format_bytes(self._hosting.limit_bytes)} that this node may hold",
                hint="give less, remove others, or start the node with a larger --memory",
            )
        wish = Wish(model, dtype, None, free if memory_bytes is None else memory_bytes)
        chosen = await self._hosting.choose(wish, self._get_held_here(model))
        if not chosen and not self._get_held_here(model):
            raise ConfigError("not one expert fits", hint="give more memory")
        return chosen

    def _get_dtype(self, model: LocalModel) -> Dtype:
        hosted = self._hosting.get_hosted(model.root)
        return hosted.dtype if hosted is not None else self._default_dtype

    def _get_held_here(self, model: LocalModel) -> Held:
        hosted = self._hosting.get_hosted(model.root)
        return {layer: list(experts.ids) for layer, experts in sorted(hosted.layers.items())} if hosted else {}

    def _check_not_lent(self, model: LocalModel, wanted: Held) -> None:
        """Raises:
        ConfigError: a ``host-expert`` command serves one of the layers; they go when it ends.
        """
        known = self._deployed.get(model.root)
        lent = sorted((self._get_held_here(model).keys() & wanted.keys()) - (known.held if known else {}).keys())
        if lent:
            raise ConfigError(
                f"a host-expert command serves {model.name}, layers {format_range(lent)}, on this node",
                hint="stop it first, or choose other --layers",
            )

    def _find(self, name: str) -> Deployment:
        """By name, root, the beginning of a root, or where it was deployed from."""
        path = str(Path(name).expanduser().absolute())
        found = [
            d
            for d in self._deployed.values()
            if name in (d.name, d.source, d.model_root)
            or path == d.source
            or (len(name) >= ROOT_PREFIX and d.model_root.startswith(name))
        ]
        if len(found) == 1:
            return found[0]
        if found:
            roots = ", ".join(d.model_root[:12] for d in found)
            raise ConfigError(f"{name} names {len(found)} models deployed here", hint=f"say which: {roots}")
        others = ", ".join(sorted({d.name for d in self._deployed.values()}))
        raise ConfigError(
            f"{name} is not deployed on this node",
            hint=f"deployed are: {others}" if others else "what a host-expert command serves goes when it is stopped",
        )


def get_removed(held: Held, params: Event, name: str) -> Held:
    """``{layer: [experts]}`` of ``held`` that the ranges name; all without one.

    Raises:
        ConfigError: they name nothing of it.
    """
    layers = sorted(held)
    if params["layers"] is not None:
        named = set(parse_range(params["layers"], option="--layers"))
        layers = [layer for layer in layers if layer in named]
    option, text = ("--experts", params["experts"]) if params["experts"] is not None else ("--slices", params["slices"])
    numbers = set(parse_range(text, option=option)) if text is not None else None
    gone = {layer: [e for e in held[layer] if numbers is None or e in numbers] for layer in layers}
    gone = {layer: ids for layer, ids in gone.items() if ids}
    if not gone:
        raise ConfigError(
            f"nothing of {name} in that range is deployed here", hint=f"it has layers {format_range(sorted(held))}"
        )
    return gone


def describe_served(model: LocalModel, hosting: Hosting) -> str:
    """``"serving smollm2: layers 0-9 (all 8 slices), 106.2 MB"``: all that this node serves of a model."""
    hosted = hosting.get_hosted(model.root)
    assert hosted is not None
    held = {layer: list(experts.ids) for layer, experts in sorted(hosted.layers.items())}
    return describe_held(model, held, hosted.nbytes)


def describe_deployment(deployment: Deployment) -> Event:
    """A deployment that is not served, as ``expert list`` shows it."""
    return {
        "name": deployment.name,
        "root": deployment.model_root,
        "dtype": deployment.dtype,
        "bytes": 0,
        "calls": 0,
        "rows": 0,
        "held": {str(layer): ids for layer, ids in sorted(deployment.held.items())},
        "changed_files": [],
        "deployed": True,
        "error": "",
    }
