"""Experts that a node serves whenever it runs: added and removed while it does, and taken up again at a start.

The store is written first, then what is served changes: a crash in between costs nothing that was acknowledged.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import msgspec

from daaswarm.errors import ConfigError, DaaswarmError, OutcomeUnknown, StorageError
from daaswarm.models.sources import LocalModel
from daaswarm.node.hosting import Hosting, Wish, count_bytes, describe_held, get_held
from daaswarm.node.reporting import Emit, Event, get_model
from daaswarm.store.node_store import NodeStore
from daaswarm.store.records import Deployment
from daaswarm.systems import expand_user
from daaswarm.types import Dtype, ModelRoot, format_bytes, format_range, parse_range

if TYPE_CHECKING:
    from daaswarm.experts.service import HostedModel

ROOT_PREFIX = 6  # letters of a model's root that name it, at least

Held = dict[int, list[int]]

logger = logging.getLogger(__name__)


class Deploying:
    """The deployments of one node.

    Args:
        hosting: serves them; one lock keeps its changes and those made here apart.
        store: keeps them.
        default_dtype: of a model's first deployment, if it names none.
    """

    def __init__(self, hosting: Hosting, store: NodeStore, *, default_dtype: Dtype) -> None:
        self._hosting = hosting
        self._store = store
        self._default_dtype: Dtype = default_dtype
        self._has_recalled = False
        self._deployed: dict[ModelRoot, Deployment] = {}  # as it stands in the store
        self._serving: dict[ModelRoot, set[int]] = {}  # the layers of it that are served; never those of a host-expert
        self._failed: dict[ModelRoot, str] = {}  # why some are not

    def describe(self) -> list[Event]:
        """What ``expert list`` shows: everything served, and what should be and isn't."""
        described = [
            {**hosted, "deployed": bool(self._serving.get(hosted["root"])), "error": ""}
            for hosted in self._hosting.describe()
        ]
        for root, deployment in self._deployed.items():
            if missing := self._get_missing(deployment):
                absent = msgspec.structs.replace(deployment, held=missing)
                described.append({**describe_deployment(absent), "error": self._failed.get(root, "not read yet")})
        return described

    async def restore(self, emit: Emit) -> None:
        """Serve what was deployed in earlier runs. What can't be is said, and tried again at the next start."""
        async with self._hosting.changing:
            try:
                await self._recall()
            except StorageError as error:
                logger.warning("what is deployed here is not served: %s", error)
                return
        for root in list(self._deployed):
            async with self._hosting.changing:
                deployment = self._deployed.get(root)  # what was removed or served since the last turn isn't read
                if deployment is None or not (missing := self._get_missing(deployment)):
                    continue
                try:
                    model = await self._find_again(deployment, emit)
                    self._get_dtype(model, deployment.dtype)
                    held = {layer: deployment.held[layer] for layer in missing}
                    self._check_not_lent(model, held)
                    with self._hosting.reserving(count_bytes(model, deployment.dtype, missing)):
                        hosted, _ = await self._hosting.load(model, held, deployment.dtype, emit)
                        self._serve(hosted)
                except DaaswarmError as error:
                    self._failed[root] = error.message
                    logger.warning("%s, which is deployed here, is not served: %s", deployment.name, error)
                    text = f"not served: {deployment.name}: {error.message}"
                else:
                    text = describe_served(model, self._hosting)
            await emit({"event": "message", "text": text})

    async def deploy(self, params: Event, emit: Emit) -> Event:
        """Serve more experts, from now on and after every start.

        Raises:
            ConfigError: a bad model or range, more than the memory limit, another dtype than the model is served or
                deployed in here, or a ``host-expert`` serves a layer of it.
            OutcomeUnknown: nothing more is served now, but perhaps after a start; doing it again is safe.
            StorageError: the disk refuses; then nothing was changed.
        """
        async with self._hosting.changing:
            await self._recall()
            model = await get_model(params["model"], emit)
            dtype = self._get_dtype(model, params["dtype"])
            if params["layers"] is None and params["experts"] is None and params["slices"] is None:
                wanted = await self._choose(model, dtype, params["memory_bytes"])
            else:
                wanted = get_held(model, params) or {}
            self._check_not_lent(model, wanted)
            known = self._deployed.get(model.root)
            here, stored = self._get_held_here(model), known.held if known is not None else {}
            # Layers are kept and read whole: with what is stored of them, even if that could not be served so far.
            union = {layer: sorted({*ids, *stored.get(layer, ())}) for layer, ids in wanted.items()}
            fresh = {layer: sorted(set(ids) - set(here.get(layer, ()))) for layer, ids in union.items()}
            fresh = {layer: ids for layer, ids in fresh.items() if ids}
            bytes_read = 0
            with self._hosting.reserving(count_bytes(model, dtype, fresh)):
                if fresh:
                    # A layer that grows is held twice until it takes the other's place.
                    changed = {layer: union[layer] for layer in fresh}
                    hosted, bytes_read = await self._hosting.load(model, changed, dtype, emit)
                    deployment = Deployment(
                        model_root=model.root,
                        dtype=dtype,
                        name=model.name,
                        source=params["model"],
                        held=changed,
                        created_at=known.created_at if known is not None else time.time(),
                    )
                    await self._remember(deployment)
                    self._serve(hosted)
            return {
                "model": model.name,
                "model_root": model.root,
                "dtype": dtype,
                "added": {str(layer): ids for layer, ids in fresh.items()},
                "held": {str(layer): ids for layer, ids in self._get_held_here(model).items()},
                "bytes_held": sum(m["bytes"] for m in self._hosting.describe() if m["root"] == model.root),
                "bytes_read": bytes_read,
                "lines": [describe_served(model, self._hosting) if fresh else "these experts are served here already"],
            }

    async def remove(self, params: Event, emit: Emit) -> Event:
        """Serve experts of a model no more. Calls in flight are answered.

        Raises:
            ConfigError: nothing of the kind is deployed here, or a bad range.
            OutcomeUnknown: they are served on for now, but perhaps not after a start; doing it again is safe.
            StorageError: the disk refuses; then nothing was changed.
        """
        async with self._hosting.changing:
            await self._recall()
            deployment = self._find(params["model"])
            root, held = deployment.model_root, deployment.held
            gone = get_removed(held, params, deployment.name)
            left = {layer: sorted(set(held[layer]) - set(ids)) for layer, ids in gone.items()}
            serving = self._serving.get(root, set())
            partly = {layer: ids for layer, ids in left.items() if ids and layer in serving}
            hosted = None
            if partly:
                model = await self._find_again(deployment, emit)
                hosted, _ = await self._hosting.load(model, partly, deployment.dtype, emit)
            await self._remember(msgspec.structs.replace(deployment, held=left))
            if hosted is not None:
                self._serve(hosted)
            self._stop(deployment, serving & (left.keys() - partly.keys()))
            rest = self._deployed[root].held if root in self._deployed else {}
            return {
                "model": deployment.name,
                "model_root": root,
                "dtype": deployment.dtype,
                "removed": {str(layer): ids for layer, ids in gone.items()},
                "held": {str(layer): ids for layer, ids in rest.items()},
            }

    # -- parts --------------------------------------------------------------------------------------------------

    async def _recall(self) -> None:
        """Know what the store holds: at first, and after a write of which nobody knows whether it happened.

        Raises:
            StorageError: it can't be read. What is changed rests on it, so nothing can be.
        """
        if self._has_recalled:
            return
        before = self._deployed
        self._deployed = {deployment.model_root: deployment for deployment in await self._store.get_deployments()}
        self._has_recalled = True
        for root, deployment in before.items():  # what was removed after all is served no more
            stored = self._deployed[root].held if root in self._deployed else {}
            served = self._get_served(root)
            self._stop(deployment, {layer for layer, ids in served.items() if not ids <= set(stored.get(layer, ()))})

    async def _remember(self, changed: Deployment) -> None:
        """Write the layers that change, those of which nothing is left as empty ones. All of it is written, or none."""
        try:
            await self._store.put_deployment(changed)
        except OutcomeUnknown:
            self._has_recalled = False
            raise
        known = self._deployed.get(changed.model_root)
        held = {**(known.held if known is not None else {}), **changed.held}
        held = {layer: ids for layer, ids in sorted(held.items()) if ids}
        if held:
            self._deployed[changed.model_root] = msgspec.structs.replace(changed, held=held)
        else:
            self._deployed.pop(changed.model_root, None)
            self._failed.pop(changed.model_root, None)

    def _serve(self, hosted: HostedModel) -> None:
        self._hosting.get_service().put(hosted)
        self._serving.setdefault(hosted.root, set()).update(hosted.layers)
        self._hosting.advertise(hosted.root)
        if hosted.root in self._deployed and not self._get_missing(self._deployed[hosted.root]):
            self._failed.pop(hosted.root, None)

    def _stop(self, deployment: Deployment, layers: set[int]) -> None:
        if layers:
            self._hosting.get_service().remove(deployment.model_root, deployment.dtype, layers)
            self._serving[deployment.model_root] -= layers
            self._hosting.advertise(deployment.model_root)

    async def _find_again(self, deployment: Deployment, emit: Emit) -> LocalModel:
        """Raises:
        ConfigError: it is gone, or another one.
        """
        model = await get_model(deployment.source, emit)
        if model.root != deployment.model_root:
            raise ConfigError(
                f"{deployment.source} is another model now",
                hint=f"daaswarm expert remove {deployment.model_root[:12]}, all of it, and deploy it anew",
            )
        return model

    def _get_served(self, root: ModelRoot) -> dict[int, set[int]]:
        """``{layer: experts}`` of a model that are served because they are deployed."""
        hosted = self._hosting.get_hosted(root)
        layers = self._serving.get(root, set()) if hosted is not None else set()
        return {layer: set(hosted.layers[layer].ids) for layer in layers} if hosted is not None else {}

    def _get_missing(self, deployment: Deployment) -> Held:
        """``{layer: [experts]}`` that are deployed and not served."""
        served = self._get_served(deployment.model_root)
        missing = {layer: [e for e in ids if e not in served.get(layer, ())] for layer, ids in deployment.held.items()}
        return {layer: ids for layer, ids in missing.items() if ids}

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
        here = self._get_held_here(model)
        lent = here.keys() - self._serving.get(model.root, set())
        without = {layer: list(range(model.layers[layer])) if layer in lent else ids for layer, ids in here.items()}
        chosen = await self._hosting.choose(wish, without)
        if not chosen and not here:
            raise ConfigError("not one expert fits", hint="give more memory")
        return chosen

    def _get_dtype(self, model: LocalModel, asked: Dtype | None) -> Dtype:
        """What to compute a model in: what is asked for, as what is here of it, or the setting.

        Raises:
            ConfigError: some of it is served or deployed here in another one.
        """
        known = self._deployed.get(model.root), self._hosting.get_hosted(model.root)
        here: list[Dtype] = [part.dtype for part in known if part is not None]
        dtype = asked or (here[0] if here else self._default_dtype)
        for other in here:
            if other != dtype:
                raise ConfigError(
                    f"this node serves {model.name} in {other} already; one answer never mixes dtypes",
                    hint=f"use --dtype {other}, or take it away first: expert remove, or stop its host-expert",
                )
        return dtype

    def _get_held_here(self, model: LocalModel) -> Held:
        hosted = self._hosting.get_hosted(model.root)
        return {layer: list(experts.ids) for layer, experts in sorted(hosted.layers.items())} if hosted else {}

    def _check_not_lent(self, model: LocalModel, wanted: Held) -> None:
        """Raises:
        ConfigError: a ``host-expert`` command serves one of the layers; they go when it ends.
        """
        lent = sorted((self._get_held_here(model).keys() & wanted.keys()) - self._serving.get(model.root, set()))
        if lent:
            raise ConfigError(
                f"a host-expert command serves {model.name}, layers {format_range(lent)}, on this node",
                hint="stop it first, or choose other --layers",
            )

    def _find(self, name: str) -> Deployment:
        """By name, root, the beginning of a root, or where it was deployed from."""
        path = str(expand_user(name).absolute())
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
