"""Answers of different lengths on one trunk compute with the frequencies of their own text."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from daaswarm.inference.requester import Requester
from daaswarm.models.sources import LocalModel, find_model, ignore_progress
from daaswarm.models.trunk import load_reference
from daaswarm.testing.checkpoints import make_tiny_checkpoint
from tests.byte_tokenizer import add_tokenizer
from tests.inference.swarm_in_memory import open_swarm

CONTEXT = 16  # tokens that the frequencies are made for
ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "rope_theta": 100.0,
        "short_factor": [1.0],
        "long_factor": [3.0],
        "original_max_position_embeddings": CONTEXT,
    },
}
TEXTS = {"long": 40, "medium": 24, "short": 8}


@pytest.fixture(scope="module", params=sorted(ROPES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> LocalModel:
    rope = dict(ROPES[request.param])
    folder = tmp_path_factory.mktemp("rope") / f"tiny-{request.param}"
    half = make_config_half()
    for name in ("short_factor", "long_factor"):
        if name in rope:
            rope[name] = rope[name] * half
    limit = CONTEXT if request.param == "dynamic" else 4 * CONTEXT
    make_tiny_checkpoint("llama", folder, rope_parameters=rope, max_position_embeddings=limit)
    return find_model(str(add_tokenizer(folder)), cache)


def make_config_half() -> int:
    """Frequencies of one head."""
    from daaswarm.testing.checkpoints import make_config

    config: Any = make_config("llama")
    return config.head_dim // 2


def make_ids(length: int) -> torch.Tensor:
    return torch.randint(5, 60, (1, length), generator=torch.Generator().manual_seed(length))


def get_reference(model: LocalModel, length: int) -> torch.Tensor:
    reference: Any = load_reference(model, "f32")  # a new one, which has met no other text
    with torch.inference_mode():
        return reference(make_ids(length)).logits


async def ask(requester: Requester, model: LocalModel, plan: Any, work: Callable[[Any], Any]) -> Any:
    trunk = await requester.load(model, "f32", ignore_progress)

    def in_inference_mode() -> Any:
        with torch.inference_mode():
            return work(trunk.model)

    return await requester.run_model(requester.make_experts(model, plan), in_inference_mode, lambda: None)


def make_requester(swarm: Any, nursery: trio.Nursery) -> Requester:
    async def find_hosts(model: LocalModel, dtype: Any) -> Any:
        return swarm.make_plan()

    return Requester(swarm.requester, find_hosts, nursery, call_timeout_s=10.0)


async def test_one_answer_after_another(model: LocalModel) -> None:
    async with (
        open_swarm(model, {layer: list(range(n)) for layer, n in model.layers.items()}) as swarm,
        trio.open_nursery() as nursery,
    ):
        requester = make_requester(swarm, nursery)
        for name in ("long", "medium", "short", "long"):
            length = TEXTS[name]
            got = await ask(requester, model, swarm.make_plan(), lambda trunk, n=length: trunk(make_ids(n)).logits)
            torch.testing.assert_close(got, get_reference(model, length), rtol=1e-4, atol=1e-4)


async def test_two_answers_at_once(model: LocalModel) -> None:
    """The second begins and ends between two passes of the first."""
    async with (
        open_swarm(model, {layer: list(range(n)) for layer, n in model.layers.items()}) as swarm,
        trio.open_nursery() as nursery,
    ):
        requester, plan = make_requester(swarm, nursery), swarm.make_plan()
        begun, other_done = trio.Event(), threading.Event()
        length = TEXTS["medium"]

        def in_two_passes(trunk: Any) -> torch.Tensor:
            ids = make_ids(length)
            first = trunk(ids[:, :-1], use_cache=True)
            trio.from_thread.run_sync(begun.set)
            assert other_done.wait(10)
            return trunk(ids[:, -1:], past_key_values=first.past_key_values, use_cache=True).logits

        alone: list[torch.Tensor] = []

        async def ask_other() -> None:
            await begun.wait()
            await ask(requester, model, plan, lambda trunk: trunk(make_ids(TEXTS["long"])).logits)
            other_done.set()

        async def ask_first() -> None:
            alone.append(await ask(requester, model, plan, in_two_passes))

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask_other)
                nursery.start_soon(ask_first)
        reference: Any = load_reference(model, "f32")
        with torch.inference_mode():
            ids = make_ids(length)
            first = reference(ids[:, :-1], use_cache=True)
            wanted = reference(ids[:, -1:], past_key_values=first.past_key_values, use_cache=True).logits
        torch.testing.assert_close(alone[0], wanted, rtol=1e-4, atol=1e-4)
