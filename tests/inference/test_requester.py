"""Whole answers over the in-memory network: text as it comes, several at once, and what ends one early."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from daaswarm.core.adverts import Known, to_bitmap
from daaswarm.core.router import ReplicaRouter
from daaswarm.errors import ConfigError, DaaswarmError, ModelError, NoPeerCouldServe, unwrap_groups
from daaswarm.inference.batch_cache import BatchCache
from daaswarm.inference.plan import HostPlan, make_plan
from daaswarm.inference.prompt import Prompt, encode_prompt
from daaswarm.inference.requester import TRUNKS, Requester, SharedRouter
from daaswarm.inference.sequence import Sampling
from daaswarm.inference.swarm_experts import Stopped
from daaswarm.messages import Advert, ExpertCall, Signed
from daaswarm.models.sources import LocalModel, find_model, ignore_progress
from daaswarm.models.trunk import load_reference, load_tokenizer
from daaswarm.net.scope import open_service_nursery
from daaswarm.types import ExpertId, PeerId
from tests.inference.swarm_in_memory import Host, Swarm, open_swarm

TOKENS = 10
HALVES = [{n: [0, 1, 2, 3] for n in range(3)}, {n: [4, 5, 6, 7] for n in range(3)}]


@pytest.fixture(scope="module")
def model(moe: Path, cache: Path) -> LocalModel:
    return find_model(str(moe), cache)


@pytest.fixture(scope="module")
def reference(model: LocalModel) -> Any:
    return load_reference(model, "f32")


def get_reference_text(reference: Any, model: LocalModel, prompt: str) -> str:
    tokenizer: Any = load_tokenizer(model)
    ids = torch.tensor([encode_prompt(Prompt(prompt), tokenizer, "m")])
    with torch.inference_mode():
        made = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


class Asking:
    """A requester on a swarm, and what it emitted."""

    def __init__(self, swarm: Swarm, nursery: trio.Nursery) -> None:
        self.swarm = swarm
        self.plan = swarm.make_plan()
        self.refreshed: HostPlan | None = None
        self.requester = Requester(swarm.requester, self.find_hosts, nursery, call_timeout_s=10.0)
        self.pieces: list[str] = []
        self.has_begun = trio.Event()

    async def find_hosts(self, model: LocalModel, dtype: Any) -> HostPlan:
        return self.refreshed or self.plan

    async def ask(self, text: str, pieces: list[str] | None = None, **changes: Any) -> dict[str, Any]:
        async def emit(event: dict[str, Any]) -> None:
            assert event["event"] == "text"
            (self.pieces if pieces is None else pieces).append(event["text"])
            self.has_begun.set()

        trunk = await self.requester.load(self.swarm.model, "f32", ignore_progress)
        sampling = Sampling(max_tokens=changes.pop("max_tokens", TOKENS))
        prompt = Prompt(text, sampling=sampling, **changes)
        with trio.fail_after(30), unwrap_groups():
            return await self.requester.answer(self.swarm.model, trunk, self.plan, prompt, emit)


@asynccontextmanager
async def asking(model: LocalModel, *held: dict[int, list[int]]) -> AsyncIterator[Asking]:
    async with open_swarm(model, *held) as swarm, open_service_nursery() as nursery:
        yield Asking(swarm, nursery)


async def test_an_answer(model: LocalModel, reference: Any) -> None:
    async with asking(model, *HALVES) as its:
        answer = await its.ask("Hello")
        assert answer["text"] == get_reference_text(reference, model, "Hello") == "".join(its.pieces)
        assert len(its.pieces) > 1
        assert answer["prompt_tokens"] == 5 and answer["completion_tokens"] == TOKENS
        assert answer["calls"] == sum(host["calls"] for host in answer["hosts"]) > 0
        assert answer["finish_reason"] == "length" and answer["retries"] == 0
        assert answer["tokens_per_s"] > 0 and answer["time_to_first_token_s"] > 0
        assert {host["peer_id"] for host in answer["hosts"]} == {host.pool.peer_id for host in its.swarm.hosts}
        whole = sum(p.numel() for p in reference.parameters())
        assert answer["requester_parameters"] + answer["remote_parameters"] == whole


async def test_answers_at_the_same_time_do_not_mix(model: LocalModel, reference: Any) -> None:
    prompts = ["One", "Two", "Three", "Four"]
    async with asking(model, *HALVES) as its:
        answers: dict[str, dict[str, Any]] = {}

        async def ask(prompt: str) -> None:
            answers[prompt] = await its.ask(prompt, [])

        async with trio.open_nursery() as nursery:
            for prompt in prompts:
                nursery.start_soon(ask, prompt)
    for prompt in prompts:
        assert answers[prompt]["text"] == get_reference_text(reference, model, prompt)


async def test_a_host_lost_without_a_replica(model: LocalModel, reference: Any) -> None:
    async with asking(model, *HALVES) as its:
        lost = its.swarm.hosts[1]
        its.refreshed = its.swarm.make_plan(its.swarm.hosts[:1])
        left = 9

        async def die_later(host: Host, call: ExpertCall, body: memoryview) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                its.swarm.kill(host)
                await trio.sleep_forever()
            return await host.service.serve(PeerId("x"), call, body, 5.0)

        lost.behave = die_later
        with pytest.raises(NoPeerCouldServe, match=r"layers 0-2: experts 4-7") as info:
            await its.ask("Hello")
        assert info.value.missing == {n: [4, 5, 6, 7] for n in range(3)}
        text = get_reference_text(reference, model, "Hello")
        assert info.value.text and text.startswith(info.value.text) and info.value.text == "".join(its.pieces)


async def test_a_host_found_in_the_middle_is_connected(model: LocalModel, reference: Any) -> None:
    async with asking(model, *HALVES, HALVES[1]) as its:
        _, lost, late = its.swarm.hosts
        its.plan, its.refreshed = its.swarm.make_plan(its.swarm.hosts[:2]), its.swarm.make_plan()
        await its.swarm.requester.disconnect(late.pool.peer_id, "not met yet")

        async def die(host: Host, call: ExpertCall, body: memoryview) -> Any:
            its.swarm.kill(host)
            await trio.sleep_forever()

        lost.behave = die
        answer = await its.ask("Hello")
        assert answer["text"] == get_reference_text(reference, model, "Hello") and answer["retries"] >= 1
        assert late.pool.peer_id in {host["peer_id"] for host in answer["hosts"]}


async def test_an_answer_needs_none_of_trios_own_threads(model: LocalModel) -> None:
    async with asking(model, *HALVES) as its:
        trunk = await its.requester.load(model, "f32", ignore_progress)
        limiter = trio.to_thread.current_default_thread_limiter()
        borrowers = [object() for _ in range(int(limiter.available_tokens))]
        for borrower in borrowers:
            limiter.acquire_on_behalf_of_nowait(borrower)
        try:
            with trio.fail_after(10):
                experts = its.requester.make_experts(model, its.plan)
                await its.requester.run_model(experts, lambda: trunk.model(torch.tensor([[5, 6]])), experts.cancel)
        finally:
            for borrower in borrowers:
                limiter.release_on_behalf_of(borrower)


async def test_what_is_missing_is_said_before_anything_is_computed(model: LocalModel) -> None:
    async with asking(model, HALVES[0]) as its:
        with pytest.raises(NoPeerCouldServe, match=r"experts 4-7 \(1 host found\)") as info:
            await its.ask("Hello")
        assert info.value.text == "" and its.swarm.hosts[0].calls == []


async def test_cancelling_an_answer_ends_its_thread(model: LocalModel) -> None:
    async with asking(model, *HALVES) as its:
        asked = trio.Event()

        async def be_silent(host: Host, call: ExpertCall, body: memoryview) -> Any:
            asked.set()
            await trio.sleep_forever()

        its.swarm.hosts[0].behave = be_silent
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(its.ask, "Hello")
                await asked.wait()
                nursery.cancel_scope.cancel()
        its.swarm.hosts[0].behave = None
        await its.ask("Hello")  # the next one is not hurt


async def test_a_slow_reader_holds_up_nobody(model: LocalModel, reference: Any) -> None:
    async with asking(model, *HALVES) as its:
        trunk = await its.requester.load(model, "f32", ignore_progress)
        stuck = trio.Event()

        async def emit(event: dict[str, Any]) -> None:
            stuck.set()
            await trio.sleep_forever()

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                slow = Prompt("Hello", sampling=Sampling(max_tokens=200))
                nursery.start_soon(its.requester.answer, model, trunk, its.plan, slow, emit)
                await stuck.wait()
                answer = await its.ask("One")
                nursery.cancel_scope.cancel()
        assert answer["text"] == get_reference_text(reference, model, "One")


async def test_a_prompt_that_does_not_fit(model: LocalModel) -> None:
    async with asking(model, *HALVES) as its:
        with pytest.raises(ConfigError, match="256 tokens"):
            await its.ask("x" * 256)
        with pytest.raises(ConfigError, match="chat template"):
            await its.ask("Hello", system="Be kind")


async def test_stopped_is_raised_in_the_thread_of_a_cancelled_answer(model: LocalModel) -> None:
    async with asking(model, *HALVES) as its:
        experts = its.requester.make_experts(model, its.plan)
        experts.cancel()
        trunk = await its.requester.load(model, "f32", ignore_progress)
        with pytest.raises(Stopped):
            await its.requester.run_model(experts, lambda: trunk.model(torch.tensor([[5, 6]])), experts.cancel)


async def test_trunks_are_kept_and_the_oldest_goes(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async with asking(model, *HALVES) as its:
        loaded: list[str] = []

        def load(model: LocalModel, dtype: str, progress: Any) -> Any:
            loaded.append(dtype)
            return dtype

        monkeypatch.setattr(its.requester, "_load", load)
        assert TRUNKS == 2
        for dtype in ("f32", "bf16", "f32", "f16", "f32", "bf16"):
            assert await its.requester.load(model, dtype, ignore_progress) == dtype  # type: ignore[arg-type]
        assert loaded == ["f32", "bf16", "f16", "bf16"]  # f32 was used in between


async def test_a_bug_in_a_batch_costs_its_answers_only(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: BatchCache) -> int:
        raise RuntimeError("no memory for another row")

    async with asking(model, *HALVES) as its:
        with monkeypatch.context() as patch:
            patch.setattr(BatchCache, "add", fail)
            with pytest.raises(RuntimeError, match="another row"):
                await its.ask("Hello")
        await its.ask("Hello")


async def test_a_node_that_leaves_says_so(model: LocalModel) -> None:
    async with asking(model, *HALVES) as its, trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(DaaswarmError, match="the node is leaving"):
                await its.ask("Hello", max_tokens=400)

        nursery.start_soon(ask)
        with trio.fail_after(10):
            await its.has_begun.wait()
        its.requester._nursery.cancel_scope.cancel()


async def test_a_model_without_a_tokenizer(model: LocalModel) -> None:
    async with asking(model, *HALVES) as its:
        trunk = await its.requester.load(model, "f32", ignore_progress)
        trunk.tokenizer = None
        with pytest.raises(ModelError, match="no tokenizer"):
            await its.ask("Hello")


def test_the_plan_believes_only_what_the_model_has(model: LocalModel) -> None:
    def advertise(number: int, held: dict[int, list[int]], **changes: Any) -> Known:
        fields: dict[str, Any] = {
            "peer_id": f"{number}" * 52,
            "model_root": model.root,
            "model_name": "m",
            "kind": "moe",
            "held": {layer: to_bitmap(ids) for layer, ids in held.items()},
            "dtype": "f32",
            "device": "cpu",
            "addrs": [f"/memory/{number}"],
            "seq": 1,
            "expires_at": 1.0,
        }
        return Known(Advert(**{**fields, **changes}), Signed(public_key=b"", signature=b"", payload=b""))

    known = [
        advertise(1, {0: [0, 7, 8, 5000], 3: [0], 65_535: [1]}),
        advertise(2, {0: [0]}, dtype="bf16"),
        advertise(3, {0: [0]}, kind="dense"),
        advertise(4, {0: [0]}, codecs=["f16", "none", "zstd"]),
    ]
    plan = make_plan(model, known, "f32")
    one, four = PeerId("1" * 52), PeerId("4" * 52)
    assert plan.holders == {ExpertId(0, 0): [one, four], ExpertId(0, 7): [one]}
    assert plan.codecs == {one: frozenset(), four: frozenset(["f16"])}
    assert set(plan.contacts) == {one, four} and plan.contacts[one].addrs == ["/memory/1"]
    assert plan.get_missing() == {0: [1, 2, 3, 4, 5, 6], 1: list(range(8)), 2: list(range(8))}
    assert plan.get_missing(frozenset([one]))[0] == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(NoPeerCouldServe, match="2 hosts found") as info:
        plan.check_complete("m")
    assert info.value.hint and info.value.missing == plan.get_missing()


def test_the_shared_router_is_the_router() -> None:
    peers = [PeerId("a"), PeerId("b")]
    plans = []
    for router in (ReplicaRouter(random.Random(0)), SharedRouter(random.Random(0))):
        router.note_reply(peers[0], 4, 0.01, 0.005, 0, 1.0, experts=2)
        router.note_failure(peers[1], 1.0)
        plans.append((router.choose(0, {0: 1}, {0: peers}, 1.5), router.get_estimate_s(peers[0], 1, 1, 1.5)))
    assert plans[0] == plans[1]
