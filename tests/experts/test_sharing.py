"""Requesters side by side on one host, with the real service: nobody starves, nobody holds more than its share."""

from __future__ import annotations

import threading

import pytest
import torch
import trio

from daaswarm.core.courtesy import Pause
from daaswarm.errors import Busy
from daaswarm.experts import service as service_module
from daaswarm.experts.service import ExpertService, HostedModel
from daaswarm.experts.verifying import TOLERANCES, choose_samples, compare, make_sample
from daaswarm.messages import ExpertReply
from daaswarm.models.sources import LocalModel, find_model
from daaswarm.net.inbound import InboundBody, InboundBudget
from daaswarm.types import PeerId
from tests.experts.test_service import ROOT, ROWS, ScaledLayer, make_call, make_service

MIB = 1 << 20


async def test_a_single_call_does_not_wait_for_a_hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "BLOCK_ROWS", len(ROWS))  # each is a batch of its own
    service, layer = make_service("dense")
    layer.gate = threading.Event()
    done: list[str] = []

    async def ask(peer: str) -> None:
        await service.serve(PeerId(peer), *make_call(ROWS), 30.0)
        done.append(peer)

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(ask, "greedy")
        await trio.testing.wait_all_tasks_blocked(0.01)
        for peer in ("one", "two"):
            nursery.start_soon(ask, peer)
        await trio.testing.wait_all_tasks_blocked(0.01)
        layer.gate.set()
    assert len(done) == 102
    assert max(done.index("one"), done.index("two")) <= 4, done[:6]
    service._admission.validate()


async def test_calls_given_up_leave_the_queue_at_once() -> None:
    service, layer = make_service("dense")
    layer.gate = threading.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.serve, PeerId("a"), *make_call(ROWS), 30.0)
        await trio.testing.wait_all_tasks_blocked(0.01)
        async with trio.open_nursery() as greedy:
            for _ in range(100):
                greedy.start_soon(service.serve, PeerId("greedy"), *make_call(ROWS), 30.0)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert service._admission.queue_depth == 100
            greedy.cancel_scope.cancel()
        assert service._admission.queue_depth == 0
        assert service._admission.get_wait_s(PeerId("b")) == 0
        layer.gate.set()
    assert len(layer.threads) == 1  # the hundred were never computed


async def test_a_paused_host_refuses_and_says_when_to_come_back() -> None:
    service, layer = make_service("dense")
    layer.gate = threading.Event()
    answers: list[object] = []

    async def ask() -> None:
        answers.append(await service.serve(PeerId("a"), *make_call(ROWS), 30.0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked(0.01)
        service.pause = Pause("quiet hours until 18:00", 3600.0)
        with pytest.raises(Busy, match="paused: quiet hours until 18:00") as info:
            service.serve_inline(PeerId("a"), *make_call(ROWS))
        assert info.value.retry_after_s == 3600.0
        with pytest.raises(Busy):
            await service.serve(PeerId("a"), *make_call(ROWS), 30.0)
        layer.gate.set()
    assert len(answers) == 2  # those admitted before are answered
    assert service.compute(*make_call(ROWS)) is not None  # the owner's own go on
    service.pause = None
    assert service.serve_inline(PeerId("a"), *make_call(ROWS)) is not None


def test_layers_are_replaced_under_a_call() -> None:
    service, before = make_service("dense", ids=[0, 1])
    after = ScaledLayer([0, 1, 5])
    held = service._check(make_call(ROWS)[0], len(make_call(ROWS)[1]))[1]
    service.put(HostedModel(ROOT, "tiny", "dense", 3, "f32", {2: after}))  # type: ignore[arg-type]
    assert held is before  # a call that was let in keeps what it found
    call, body = make_call(ROWS, experts=[5])
    assert service.compute(call, body) is not None and after.threads
    assert len(service.models) == 1


# -- memory -------------------------------------------------------------------------------------------------------


def test_one_peer_holds_no_more_than_its_share() -> None:
    budget = InboundBudget(limit_bytes=512 * MIB, limit_peer_bytes=64 * MIB)
    assert all(budget.charge(MIB, None, "greedy") for _ in range(64))
    assert not budget.charge(MIB, None, "greedy")
    assert all(budget.charge(MIB, None, peer) for peer in ("a", "b") for _ in range(64))
    budget.release(MIB, "greedy")
    assert budget.charge(MIB, None, "greedy")


def test_a_greedy_peers_bodies_do_not_hold_others_up() -> None:
    budget = InboundBudget(limit_bytes=512 * MIB, limit_peer_bytes=8 * MIB)
    woken: list[str] = []
    bodies = [InboundBody() for _ in range(5)]
    assert budget.may_grant(bodies[0], lambda: None, "greedy") and budget.may_grant(bodies[1], lambda: None, "greedy")
    assert budget.may_grant(bodies[2], lambda: woken.append("2"), "greedy")  # the first in line: can be completed
    assert not budget.may_grant(bodies[3], lambda: woken.append("3"), "greedy")
    assert budget.may_grant(bodies[4], lambda: None, "other")  # though others wait
    budget.forget(bodies[2], "greedy")
    assert woken[-1] == "3"
    for body in bodies:
        budget.forget(body, "other" if body is bodies[4] else "greedy")
    assert budget.reserved_bytes == 0 and not budget._by_peer


# -- verifying ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_honest_answers_pass_and_altered_weights_do_not(
    kind: str, dtype: str, request: pytest.FixtureRequest, cache: object
) -> None:
    model: LocalModel = find_model(str(request.getfixturevalue(kind)), cache)  # type: ignore[arg-type]
    held = {layer: list(range(count)) for layer, count in model.layers.items()}
    (expert,) = choose_samples(held, 1)
    sample = make_sample(model, expert, dtype)  # type: ignore[arg-type]
    reply = ExpertReply(rows=sample.call.rows, hidden=sample.call.hidden)

    def judge(sums: torch.Tensor) -> float:
        return compare(sample, reply, memoryview(bytearray(sums.float().contiguous().numpy().tobytes())))

    honest = sample.expected
    assert judge(honest) == 0.0
    assert judge(honest * (1 + 1e-7)) <= TOLERANCES[dtype]
    for wrong in (honest * 1.02, torch.zeros_like(honest), honest.roll(1, 0), honest * float("nan")):
        assert judge(wrong) > TOLERANCES[dtype]
    assert compare(sample, ExpertReply(rows=1, hidden=1), memoryview(bytes(4))) == float("inf")
    assert compare(sample, reply, memoryview(b"")) == float("inf")
    service = ExpertService()
    assert service.models == {}


def test_samples_repeat_only_when_there_are_too_few() -> None:
    assert len(set(choose_samples({0: [0, 1], 3: [2]}, 3))) == 3
    assert len(choose_samples({0: [0]}, 5)) == 5
