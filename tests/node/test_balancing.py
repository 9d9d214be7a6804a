"""Hosts given only a memory share a model among them, and take over what others leave."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from daaswarm.core.placement import LOST_S, Placement
from daaswarm.models.sources import LocalModel, find_model
from daaswarm.node.balancing import Balancing
from daaswarm.node.coordinator import SwarmCoordinator
from daaswarm.node.hosting import Wish, count_bytes
from daaswarm.types import Dtype, ExpertId
from tests.node.node_helpers import emit, events, node

Held = dict[int, list[int]]
HOUR_S = 3600.0


@pytest.fixture
def model(moe: Path, cache: Path) -> LocalModel:
    """Three layers of eight experts."""
    return find_model(str(moe), cache)


def get_layers(model: LocalModel, *layers: int) -> Held:
    return {layer: list(range(model.layers[layer])) for layer in layers}


def list_experts(held: Held) -> set[ExpertId]:
    return {ExpertId(layer, e) for layer, ids in held.items() for e in ids}


def get_held(on: SwarmCoordinator, model: LocalModel) -> set[ExpertId]:
    hosted = on.hosting.get_hosted(model.root)
    return list_experts({n: list(layer.ids) for n, layer in hosted.layers.items()}) if hosted is not None else set()


async def count_replicas(on: SwarmCoordinator, model: LocalModel) -> Counter[ExpertId]:
    found = await on.discovery.find_adverts(model.root)
    return Counter(ExpertId(layer, e) for known in found for layer, ids in known.experts.items() for e in ids)


@asynccontextmanager
async def placing(
    on: SwarmCoordinator, model: LocalModel, memory: int, dtype: Dtype = "f32"
) -> AsyncIterator[Balancing]:
    """As ``host-expert MODEL --memory``; yields what looks after it."""
    async with on.hosting.serve(Wish(model, dtype, None, memory), emit) as served:
        assert served.balancing is not None
        served.balancing.placement = Placement(
            on.peer_id, model.layers, lambda layer: model.expert_bytes(layer, dtype), memory, random.Random(1)
        )
        yield served.balancing


async def test_hosts_given_a_memory_cover_a_model_evenly_and_hold_still(model: LocalModel, tmp_path: Path) -> None:
    memory = count_bytes(model, "f32", get_layers(model, 0, 1))
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(node(tmp_path / "0"))
        second, third = [
            await stack.enter_async_context(node(tmp_path / str(i), bootstrap=first)) for i in (1, 2)
        ]  # fmt: skip
        balancings = [await stack.enter_async_context(placing(first, model, memory))]
        async with placing(second, model, memory):
            assert set(await count_replicas(first, model)) == list_experts(get_layers(model, 0, 1, 2))
            balancings.append(await stack.enter_async_context(placing(third, model, memory)))
            assert set((await count_replicas(first, model)).values()) == {2}
            assert [await b.look(time.time()) for b in balancings] == [None, None]
        counts = await count_replicas(first, model)
        assert set(counts) == list_experts(get_layers(model, 0, 1, 2)) and set(counts.values()) == {1, 2}
        for hour in range(1, 4):
            assert [await b.look(time.time() + HOUR_S * hour) for b in balancings] == [None, None]


async def test_what_was_lost_is_taken_for_what_two_hold(model: LocalModel, tmp_path: Path) -> None:
    memory = count_bytes(model, "f32", get_layers(model, 0))
    async with node(tmp_path / "0") as a, node(tmp_path / "1", bootstrap=a) as b, AsyncExitStack() as stack:

        def serve_on_b(*layers: int) -> Any:
            return b.hosting.serve(Wish(model, "f32", get_layers(model, *layers), 0), emit)

        await stack.enter_async_context(serve_on_b(1))
        async with serve_on_b(2):
            balancing = await stack.enter_async_context(placing(a, model, memory))
            assert get_held(a, model) == list_experts(get_layers(model, 0))
        await stack.enter_async_context(serve_on_b(0))  # twice now, and layer 2 not at all
        events.clear()
        now = time.time()
        assert await balancing.look(now) is None, "its host may be back"
        changes = 0
        for _ in range(200):
            now += LOST_S
            before = get_held(a, model)
            if (change := await balancing.look(now)) is not None:
                changes += 1
                assert get_held(a, model) == before - list_experts(change.drop) | list_experts(change.add)
                assert a.hosting.used_bytes <= memory
                assert set(await count_replicas(b, model)) >= get_held(a, model)
        assert changes > 1, "not all at once"
        assert get_held(a, model) == list_experts(get_layers(model, 2))
        assert len([event for event in events if "placed anew" in event.get("text", "")]) == changes
        await stack.aclose()
        assert not get_held(a, model) and not get_held(b, model), "what was taken later goes too"


async def test_replicas_in_another_dtype_are_none(model: LocalModel, tmp_path: Path) -> None:
    one, two = (count_bytes(model, "f32", get_layers(model, *range(n))) for n in (1, 2))
    async with (
        node(tmp_path / "0") as a,
        node(tmp_path / "1", bootstrap=a) as b,
        node(tmp_path / "2", bootstrap=a) as c,
    ):
        serving = b.hosting.serve(Wish(model, "bf16", get_layers(model, 0, 1), 0), emit)
        async with serving, placing(a, model, two), placing(c, model, one):
            assert get_held(a, model) | get_held(c, model) == list_experts(get_layers(model, 0, 1, 2))


async def test_layers_that_the_node_serves_for_another_command_are_left_alone(
    model: LocalModel, tmp_path: Path
) -> None:
    one = count_bytes(model, "f32", get_layers(model, 0))
    async with node(tmp_path / "0") as a, node(tmp_path / "1", bootstrap=a) as b:
        elsewhere = b.hosting.serve(Wish(model, "f32", get_layers(model, 1), 0), emit)
        beside = a.hosting.serve(Wish(model, "f32", {2: [0]}, 0), emit)
        async with elsewhere, beside, placing(a, model, one) as balancing:
            assert get_held(a, model) == list_experts({**get_layers(model, 0), 2: [0]})
            for hour in range(3):
                assert await balancing.look(time.time() + HOUR_S * hour) is None
