"""Nodes that are asked as commands ask them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from daaswarm.config import Config, HostConfig, NetworkConfig
from daaswarm.experts.service import ExpertService
from daaswarm.messages import ExpertCall
from daaswarm.node.coordinator import SwarmCoordinator
from daaswarm.node.life import open_node
from daaswarm.store.data_dir import DataDir

ANY: dict[str, Any] = {"layers": None, "experts": None, "slices": None, "dtype": None, "memory_bytes": None}
events: list[dict[str, Any]] = []


async def emit(event: dict[str, Any]) -> None:
    events.append(event)


@asynccontextmanager
async def node(
    folder: Path, *, bootstrap: SwarmCoordinator | None = None, **host: Any
) -> AsyncIterator[SwarmCoordinator]:
    config = Config(network=NetworkConfig(libp2p=False), host=HostConfig(threads=1, **host))
    async with open_node(DataDir(folder), config, listen=True, libp2p=False, is_owner=True) as opened:
        if bootstrap is not None:
            await opened.bootstrap(bootstrap.addrs)
        yield opened


async def deploy(on: SwarmCoordinator, model: Path, **changes: Any) -> dict[str, Any]:
    return await on.control("deploy", {**ANY, "model": str(model), **changes}, emit)


async def remove(on: SwarmCoordinator, model: str, **changes: Any) -> dict[str, Any]:
    return await on.control("undeploy", {**ANY, "model": model, **changes}, emit)


async def get_held(on: SwarmCoordinator) -> dict[str, list[int]]:
    hosted = (await on.control("experts", {}, emit))["hosted"]
    return hosted[0]["held"] if hosted else {}


def make_call(service: ExpertService) -> tuple[ExpertCall, int]:
    (hosted,) = service.models.values()
    call = ExpertCall(
        model_root=hosted.root, layer=next(iter(hosted.layers)), experts=[0], dtype="f32", rows=1, hidden=hosted.hidden
    )
    return call, 4 * hosted.hidden
