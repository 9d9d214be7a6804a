"""Calls of several callers computed together: the same answers, and nobody harmed by another."""

from __future__ import annotations

import threading

import pytest
import torch
import trio
import trio.testing

from daaswarm.errors import RemoteProtocolError
from daaswarm.experts import service as service_module
from daaswarm.experts.service import ExpertService
from daaswarm.messages import ExpertCall
from daaswarm.types import PeerId
from tests.experts.test_service import HIDDEN, ROWS, ScaledLayer, make_call, make_service, read

Call = tuple[ExpertCall, memoryview]


def make_calls(kind: str) -> list[Call]:
    calls = []
    for i in range(5):
        rows = torch.randn(6 + i, HIDDEN, generator=torch.Generator().manual_seed(i))
        pairs = [(row, expert, 0.5 + row) for row in range(0, 6, i + 1) for expert in ((0, 5), (1,))[i % 2]]
        calls.append(make_call(rows, pairs if kind == "moe" else None))
    return calls


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a batch would take, which hangs on the machine, doesn't cut it short."""
    monkeypatch.setattr("daaswarm.core.admission.BATCH_S", 1e6)


async def hold_back(service: ExpertService, layer: ScaledLayer, nursery: trio.Nursery, kind: str) -> None:
    """Something is being computed until ``layer.gate`` opens."""
    layer.gate = threading.Event()
    nursery.start_soon(service.serve, PeerId("first"), *make_call(ROWS, [(0, 0, 1.0)] if kind == "moe" else None), 30.0)
    await trio.testing.wait_all_tasks_blocked(0.01)


@pytest.mark.parametrize("kind", ["dense", "moe"])
async def test_what_waits_is_computed_together_with_the_same_answers(kind: str) -> None:
    service, layer = make_service(kind)
    calls, answers = make_calls(kind), {}
    wanted = [read(*make_service(kind)[0].compute(*call)) for call in calls]

    async def ask(i: int) -> None:
        answers[i] = read(*await service.serve(PeerId(str(i % 2)), *calls[i], 30.0))

    async with trio.open_nursery() as nursery:
        await hold_back(service, layer, nursery, kind)
        for i in range(len(calls)):
            nursery.start_soon(ask, i)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert layer.gate is not None
        layer.gate.set()
    assert len(layer.threads) == 2  # the first, and all others at once
    for i, sums in enumerate(wanted):
        torch.testing.assert_close(answers[i], sums, rtol=1e-5, atol=1e-5)
    model = next(iter(service.models.values()))
    assert (model.calls, model.rows) == (6, 2 + sum(call.rows for call, _ in calls))
    service._admission.validate()


async def test_a_batch_is_a_block_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "BLOCK_ROWS", 16)  # calls of 6 to 10 rows
    service, layer = make_service("dense")
    async with trio.open_nursery() as nursery:
        await hold_back(service, layer, nursery, "dense")
        for call in make_calls("dense"):
            nursery.start_soon(service.serve, PeerId("a"), *call, 30.0)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert layer.gate is not None
        layer.gate.set()
    assert len(layer.threads) >= 4  # 40 rows


async def test_a_bad_call_harms_no_other() -> None:
    service, layer = make_service("moe")
    good = make_call(ROWS, [(0, 0, 1.0)])
    bad = make_call(ROWS, [(7, 0, 1.0)])
    said: list[object] = []

    async def ask(call: Call) -> None:
        try:
            said.append(read(*await service.serve(PeerId("a"), *call, 30.0))[0].tolist())
        except RemoteProtocolError as error:
            said.append(str(error))

    async with trio.open_nursery() as nursery:
        await hold_back(service, layer, nursery, "moe")
        for call in (good, bad, good):
            nursery.start_soon(ask, call)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert layer.gate is not None
        layer.gate.set()
    assert said.count(ROWS[0].tolist()) == 2
    assert any("outside the call" in str(each) for each in said)


async def test_who_gives_up_while_leading_takes_nobody_along() -> None:
    service, layer = make_service("dense")
    answers: list[torch.Tensor] = []

    async def ask() -> None:
        answers.append(read(*await service.serve(PeerId("a"), *make_call(ROWS), 30.0)))

    async with trio.open_nursery() as nursery:
        await hold_back(service, layer, nursery, "dense")
        first_gate, layer.gate = layer.gate, threading.Event()
        async with trio.open_nursery() as leading:
            leading.start_soon(service.serve, PeerId("a"), *make_call(ROWS), 30.0)
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.start_soon(ask)
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert first_gate is not None
            first_gate.set()
            with trio.fail_after(10):
                while len(layer.threads) < 2:  # noqa: ASYNC110 - a thread sets it
                    await trio.sleep(0.001)
            leading.cancel_scope.cancel()
            layer.gate.set()
    assert [sums.tolist() for sums in answers] == [(ROWS * 3).tolist()] * 2
    assert len(layer.threads) == 2
    service._admission.validate()


async def test_who_gives_up_before_leading_passes_the_lead_on() -> None:
    service, layer = make_service("dense")
    answers: list[object] = []

    async def ask() -> None:
        answers.append(await service.serve(PeerId("b"), *make_call(ROWS), 30.0))

    async with trio.open_nursery() as nursery:
        await hold_back(service, layer, nursery, "dense")
        async with trio.open_nursery() as leading:
            leading.start_soon(service.serve, PeerId("a"), *make_call(ROWS), 30.0)
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.start_soon(ask)
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked(0.01)
            start_next = service._start_next

            def cancel_then_start() -> None:  # both in one tick: the turn comes to a task that is gone already
                leading.cancel_scope.cancel()
                start_next()

            service._start_next = cancel_then_start  # type: ignore[method-assign]
            assert layer.gate is not None
            layer.gate.set()
    assert len(answers) == 2
    assert not service._computing and not service._waiting
    service._admission.validate()
