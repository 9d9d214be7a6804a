"""Calls that take long are asked of a second replica: the first answer counts, and the sums stay the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from daaswarm.core.hedging import KEPT, LEAST
from daaswarm.errors import Busy, ExpertError
from daaswarm.inference import swarm_experts
from daaswarm.inference.swarm_experts import SwarmExperts
from daaswarm.messages import ExpertCall
from daaswarm.models.sources import LocalModel, find_model
from tests.inference.swarm_in_memory import Host, Swarm, open_swarm

ALL = {0: list(range(8))}
WORK = 6  # rows times experts of a call


@pytest.fixture(scope="module")
def model(moe: Path, cache: Path) -> LocalModel:
    return find_model(str(moe), cache)


@pytest.fixture(autouse=True)
def long_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Longer than a test: only a hedge gets past a silent host."""
    monkeypatch.setattr(swarm_experts, "REPLICA_PATIENCE_S", 1_000.0)
    yield


class Silent:
    """A host's behaviour; ``told`` once the call was cancelled."""

    def __init__(self) -> None:
        self.told = trio.Event()

    async def __call__(self, host: Host, call: ExpertCall, body: memoryview) -> Any:
        try:
            await trio.sleep_forever()
        finally:
            self.told.set()


def make_experts(swarm: Swarm, *fast: Host) -> SwarmExperts:
    """Calls to all hosts are hedged after a millisecond; the ``fast`` ones are asked first."""
    experts = swarm.make_experts(call_timeout_s=1_000.0)
    router = experts._router
    for host in swarm.hosts:
        seconds = 1e-5 if host in fast else 1e-3
        for work in (1, 2, 8, WORK):
            for _ in range(LEAST):
                router.hedging.note_latency(host.pool.peer_id, work, 1e-5)
        router.note_reply(host.pool.peer_id, 1, seconds, seconds, 0, trio.current_time())
    return experts


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_inputs(model: LocalModel) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    index = torch.tensor([[0, 1], [1, 2], [3, 0]])
    return torch.randn(3, model.hidden, generator=generator), index, torch.rand(3, 2, generator=generator)


async def compute(experts: SwarmExperts, inputs: Inputs) -> torch.Tensor:
    with trio.fail_after(20):
        return await trio.to_thread.run_sync(experts, 0, *inputs)


async def compute_calmly(swarm: Swarm, inputs: Inputs) -> torch.Tensor:
    return await compute(swarm.make_experts(), inputs)


async def test_a_silent_host_is_outrun_and_told(model: LocalModel) -> None:
    async with open_swarm(model, ALL, ALL) as swarm:
        inputs = make_inputs(model)
        wanted = await compute_calmly(swarm, inputs)
        slow, fast = swarm.hosts
        slow.behave = silent = Silent()
        slow.calls.clear()
        experts = make_experts(swarm, slow)
        for _ in range(10):
            assert torch.equal(await compute(experts, inputs), wanted)  # to the bit
        with trio.fail_after(5):
            await silent.told.wait()
        assert len(slow.calls) == 2  # then it is left out
        assert experts._router.hedging.hedges == 2 and experts.retries == 0 and swarm.refreshes == 0
        assert experts.hosts[fast.pool.peer_id].calls == 10 and slow.pool.peer_id not in experts.hosts


async def test_the_second_one_asked_may_be_silent_too(model: LocalModel) -> None:
    async with open_swarm(model, ALL, ALL, ALL) as swarm:
        inputs = make_inputs(model)
        wanted = await compute_calmly(swarm, inputs)
        silent = [Silent(), Silent()]
        for host, behaviour in zip(swarm.hosts, silent, strict=False):
            host.behave = behaviour
        experts = make_experts(swarm, *swarm.hosts[:2])
        for _ in range(10):
            assert torch.equal(await compute(experts, inputs), wanted)
        with trio.fail_after(5):
            for behaviour in silent:
                await behaviour.told.wait()
        assert list(experts.hosts) == [swarm.hosts[2].pool.peer_id]
        assert experts._router.hedging.hedges <= 4 and experts.retries == 0


async def test_several_replicas_stand_in_together(model: LocalModel) -> None:
    async with open_swarm(model, ALL, {0: [0, 1, 4]}, {0: [2, 3]}) as swarm:
        inputs = make_inputs(model)
        wanted = await compute_calmly(swarm, inputs)
        swarm.hosts[0].behave = Silent()
        experts = make_experts(swarm, swarm.hosts[0])
        torch.testing.assert_close(await compute(experts, inputs), wanted, rtol=1e-5, atol=1e-6)
        assert [host.pool.peer_id in experts.hosts for host in swarm.hosts] == [False, True, True]


async def test_where_there_is_no_replica_the_host_has_its_time(model: LocalModel) -> None:
    async def take_long(host: Host, call: ExpertCall, body: memoryview) -> Any:
        await trio.sleep(0.1)
        return await host.service.serve(host.pool.peer_id, call, body, 10.0)

    async with open_swarm(model, ALL, {0: [0, 1]}) as swarm:
        inputs = make_inputs(model)
        wanted = await compute_calmly(swarm, inputs)
        swarm.hosts[0].behave = take_long
        experts = make_experts(swarm, swarm.hosts[0])
        torch.testing.assert_close(await compute(experts, inputs), wanted, rtol=1e-5, atol=1e-6)
        assert experts._router.hedging.hedges == 0


async def test_the_first_may_still_win(model: LocalModel) -> None:
    async with open_swarm(model, ALL, ALL) as swarm:
        inputs = make_inputs(model)
        wanted = await compute_calmly(swarm, inputs)
        slow, other = swarm.hosts
        other.behave = silent = Silent()

        async def wait_for_the_other(host: Host, call: ExpertCall, body: memoryview) -> Any:
            while not other.calls:  # noqa: ASYNC110 - the host is no event
                await trio.sleep(0.001)
            return await host.service.serve(host.pool.peer_id, call, body, 10.0)

        slow.behave = wait_for_the_other
        other.calls.clear()
        experts = make_experts(swarm, slow)
        assert torch.equal(await compute(experts, inputs), wanted)
        with trio.fail_after(5):
            await silent.told.wait()
        assert list(experts.hosts) == [slow.pool.peer_id]


@pytest.mark.parametrize("error", [ExpertError("broken"), Busy("full", retry_after_s=1_000.0)])
async def test_a_hedge_that_fails_costs_nothing(model: LocalModel, error: Exception) -> None:
    async with open_swarm(model, ALL, ALL) as swarm:
        inputs = make_inputs(model)
        wanted = await compute_calmly(swarm, inputs)
        slow, other = swarm.hosts
        has_failed = trio.Event()

        async def fail(host: Host, call: ExpertCall, body: memoryview) -> Any:
            has_failed.set()
            raise error

        async def wait_for_the_other(host: Host, call: ExpertCall, body: memoryview) -> Any:
            await has_failed.wait()
            await trio.sleep(0.05)
            return await host.service.serve(host.pool.peer_id, call, body, 10.0)

        slow.behave, other.behave = wait_for_the_other, fail
        experts = make_experts(swarm, slow)
        assert torch.equal(await compute(experts, inputs), wanted)
        assert list(experts.hosts) == [slow.pool.peer_id]


async def test_when_both_fail_a_third_is_asked(model: LocalModel) -> None:
    async with open_swarm(model, ALL, ALL, ALL) as swarm:
        inputs = make_inputs(model)
        wanted = await compute_calmly(swarm, inputs)
        slow, other, third = swarm.hosts
        has_failed = trio.Event()

        async def fail(host: Host, call: ExpertCall, body: memoryview) -> Any:
            has_failed.set()
            raise ExpertError("broken")

        async def fail_later(host: Host, call: ExpertCall, body: memoryview) -> Any:
            await has_failed.wait()
            raise ExpertError("broken too")

        slow.behave, other.behave, third.behave = fail_later, fail, fail_later
        experts = make_experts(swarm, slow)
        experts._router.note_reply(third.pool.peer_id, 1, 1.0, 1.0, 0, trio.current_time())  # asked last

        async def serve(host: Host, call: ExpertCall, body: memoryview) -> Any:
            return await host.service.serve(host.pool.peer_id, call, body, 10.0)

        third.behave = serve
        assert torch.equal(await compute(experts, inputs), wanted)
        assert list(experts.hosts) == [third.pool.peer_id] and experts.retries == 2


async def test_what_a_busy_host_refused_is_not_hedged(model: LocalModel) -> None:
    async with open_swarm(model, ALL, ALL, ALL) as swarm:
        inputs = make_inputs(model)

        async def refuse(host: Host, call: ExpertCall, body: memoryview) -> Any:
            host.behave = None
            raise Busy("full", retry_after_s=0.001)

        async def take_long(host: Host, call: ExpertCall, body: memoryview) -> Any:
            await trio.sleep(0.1)
            return await host.service.serve(host.pool.peer_id, call, body, 10.0)

        busy, *others = swarm.hosts
        busy.behave = refuse
        for host in others:
            host.behave = take_long
        experts = make_experts(swarm, busy)
        for work in (1, 2, 8):
            for _ in range(KEPT):  # it is waited for
                experts._router.hedging.note_latency(busy.pool.peer_id, work, 100.0)
        await compute(experts, inputs)
        assert experts._router.hedging.hedges == 0 and experts.retries == 1
        assert busy.pool.peer_id not in experts.hosts
