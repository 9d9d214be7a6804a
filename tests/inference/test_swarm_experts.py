"""A layer's experts on several hosts are the layer's experts, whatever happens to a host meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from daaswarm.errors import (
    Busy,
    ConfigError,
    DaaswarmError,
    ExpertError,
    LocalProtocolError,
    NoPeerCouldServe,
    TooLarge,
)
from daaswarm.inference import swarm_experts
from daaswarm.inference.shares import Share, make_pair_share
from daaswarm.inference.swarm_experts import REPLICA_PATIENCE_S, ROWS_PER_CALL, Stopped, SwarmExperts, as_bytes
from daaswarm.messages import ExpertCall, ExpertReply, Pong, Reply
from daaswarm.models.experts import load_experts
from daaswarm.models.sources import LocalModel, find_model
from daaswarm.net import holding
from daaswarm.types import PeerId
from tests.inference.swarm_in_memory import Host, Swarm, open_swarm

Inputs = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


@pytest.fixture(scope="module")
def moe_model(moe: Path, cache: Path) -> LocalModel:
    return find_model(str(moe), cache)


@pytest.fixture(scope="module")
def dense_model(dense: Path, cache: Path) -> LocalModel:
    return find_model(str(dense), cache)


def make_inputs(model: LocalModel, n: int, k: int = 2) -> Inputs:
    generator = torch.Generator().manual_seed(n)
    rows = torch.randn(n, model.hidden, generator=generator)
    if model.kind == "dense":
        return rows, None, None
    index = torch.stack([torch.randperm(model.layers[0], generator=generator)[:k] for _ in range(n)])
    return rows, index, torch.rand(n, k, generator=generator)


def compute_here(model: LocalModel, layer: int, inputs: Inputs, dtype: Any = "f32") -> torch.Tensor:
    """The whole layer on one machine."""
    count = model.layers[layer]
    whole = load_experts(model, {layer: list(range(count))}, dtype)[layer]
    rows, index, weights = inputs
    rows = rows.to(swarm_experts.TORCH_DTYPES[dtype])
    if index is None or weights is None:
        return whole.compute_slices(rows, list(range(count)))
    n, k = index.shape
    return whole.compute_pairs(rows, torch.arange(n).repeat_interleave(k), index.reshape(-1), weights.reshape(-1))


async def compute(experts: SwarmExperts, layer: int, inputs: Inputs) -> torch.Tensor:
    with trio.fail_after(30):
        return await trio.to_thread.run_sync(experts, layer, *inputs)


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)  # f32 sums in another order


def all_of(model: LocalModel, layers: Sequence[int] | None = None) -> dict[int, list[int]]:
    return {layer: list(range(n)) for layer, n in model.layers.items() if layers is None or layer in layers}


# -- the sum ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 40])
async def test_slices_on_two_hosts(dense_model: LocalModel, rows: int) -> None:
    n = dense_model.layers[0]
    parts = [{0: list(range(n // 2))}, {0: list(range(n // 2, n))}]
    async with open_swarm(dense_model, *parts) as swarm:
        experts, inputs = swarm.make_experts(), make_inputs(dense_model, rows)
        assert_same(await compute(experts, 0, inputs), compute_here(dense_model, 0, inputs))
        assert experts.retries == 0 and swarm.refreshes == 0
        assert {use.calls for use in experts.hosts.values()} == {1}
        use = experts.hosts[swarm.hosts[0].pool.peer_id]
        assert use.rows == rows and use.bytes_sent == use.bytes_received == rows * dense_model.hidden * 4
        assert len(use.latencies_s) == 1 and use.latencies_s[0] > 0


@pytest.mark.parametrize("rows", [1, 7, 40])
async def test_pairs_on_three_hosts(moe_model: LocalModel, rows: int) -> None:
    async with open_swarm(moe_model, {0: [0, 3, 6]}, {0: [1, 4, 7]}, {0: [2, 5]}) as swarm:
        experts, inputs = swarm.make_experts(), make_inputs(moe_model, rows)
        assert_same(await compute(experts, 0, inputs), compute_here(moe_model, 0, inputs))
        assert all(use.calls == 1 for use in experts.hosts.values()) and experts.retries == 0
        index = inputs[1]
        assert index is not None
        wanted = sum(int(torch.isin(index, torch.tensor(h.held[0])).any(1).sum()) for h in swarm.hosts)
        assert sum(use.rows for use in experts.hosts.values()) == wanted  # a host gets the rows that it needs


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
async def test_half_precision(moe_model: LocalModel, dtype: Any) -> None:
    async with open_swarm(moe_model, all_of(moe_model, [0]), dtype=dtype) as swarm:
        rows, index, weights = make_inputs(moe_model, 5)
        inputs = rows.to(swarm_experts.TORCH_DTYPES[dtype]), index, weights
        got = await compute(swarm.make_experts(), 0, inputs)
        assert got.dtype == inputs[0].dtype
        torch.testing.assert_close(got, compute_here(moe_model, 0, inputs, dtype).to(got.dtype), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["moe", "dense"])
async def test_a_long_prefill_travels_in_pieces(moe_model: LocalModel, dense_model: LocalModel, kind: str) -> None:
    model = moe_model if kind == "moe" else dense_model
    n = model.layers[0]
    async with open_swarm(model, {0: list(range(n // 2))}, {0: list(range(n // 2, n))}) as swarm:
        experts, inputs = swarm.make_experts(), make_inputs(model, 2 * ROWS_PER_CALL + 5)
        assert_same(await compute(experts, 0, inputs), compute_here(model, 0, inputs))
        assert sum(use.calls for use in experts.hosts.values()) == 6


async def test_this_node_is_one_of_the_hosts(moe_model: LocalModel) -> None:
    async with open_swarm(moe_model, {0: [0, 1, 2, 3]}, {0: [4, 5, 6, 7]}) as swarm:
        here = swarm.hosts[0]
        swarm.requester = here.pool
        await here.pool.connect(swarm.hosts[1].contact)
        experts = swarm.make_experts(local=here.service.compute)
        inputs = make_inputs(moe_model, 9)
        assert_same(await compute(experts, 0, inputs), compute_here(moe_model, 0, inputs))
        assert len(experts.hosts) == 2 and here.calls == []


# -- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["moe", "dense"])
async def test_a_host_that_dies_is_replaced(moe_model: LocalModel, dense_model: LocalModel, kind: str) -> None:
    model = moe_model if kind == "moe" else dense_model
    async with open_swarm(model, all_of(model), all_of(model)) as swarm:
        experts = swarm.make_experts()
        for layer in (0, 1, 2, 0, 1, 2):
            inputs = make_inputs(model, 5 + layer)
            assert_same(await compute(experts, layer, inputs), compute_here(model, layer, inputs))
            if experts.hosts and experts.retries == 0 and layer == 2:
                swarm.kill(next(host for host in swarm.hosts if host.pool.peer_id in experts.hosts))
        assert experts.retries > 0 and swarm.refreshes == 0


async def test_a_host_that_dies_while_it_computes(moe_model: LocalModel) -> None:
    async with open_swarm(moe_model, all_of(moe_model), all_of(moe_model)) as swarm:

        async def die(host: Host, call: ExpertCall, body: memoryview) -> Any:
            for other in swarm.hosts:
                other.behave = None
            swarm.kill(host)
            await trio.sleep_forever()

        for host in swarm.hosts:
            host.behave = die
        experts, inputs = swarm.make_experts(), make_inputs(moe_model, 4)
        assert_same(await compute(experts, 0, inputs), compute_here(moe_model, 0, inputs))
        assert experts.retries == 1


async def test_without_a_replica_the_missing_layers_are_named(moe_model: LocalModel) -> None:
    async with open_swarm(moe_model, all_of(moe_model, [0]), all_of(moe_model, [1, 2])) as swarm:
        left = swarm.make_plan(swarm.hosts[:1])
        experts, inputs = swarm.make_experts(refreshed=left), make_inputs(moe_model, 3)
        await compute(experts, 1, inputs)
        swarm.kill(swarm.hosts[1])
        await compute(experts, 0, inputs)
        with pytest.raises(NoPeerCouldServe, match="no live host for layers 1-2") as info:
            await compute(experts, 1, inputs)
        assert info.value.missing == {1: list(range(8)), 2: list(range(8))}
        assert swarm.refreshes == 1


async def test_a_host_that_came_later_is_found(moe_model: LocalModel) -> None:
    async with open_swarm(moe_model, all_of(moe_model), all_of(moe_model)) as swarm:
        gone: list[str] = []
        experts = swarm.make_experts(
            plan=swarm.make_plan(swarm.hosts[:1]), refreshed=swarm.make_plan(swarm.hosts[1:]), note_gone=gone.append
        )
        inputs = make_inputs(moe_model, 3)
        await compute(experts, 0, inputs)
        assert not gone
        swarm.kill(swarm.hosts[0])
        assert_same(await compute(experts, 1, inputs), compute_here(moe_model, 1, inputs))
        assert swarm.refreshes == 1 and len(experts.hosts) == 2
        assert set(gone) == {swarm.hosts[0].pool.peer_id}  # so that nobody else of this node waits for it


def lie_about_rows(host: Host, call: ExpertCall) -> tuple[Reply, Sequence[Any]]:
    return ExpertReply(rows=call.rows + 1, hidden=call.hidden), [bytes((call.rows + 1) * call.hidden * 4)]


def lie_about_width(host: Host, call: ExpertCall) -> tuple[Reply, Sequence[Any]]:
    return ExpertReply(rows=call.rows, hidden=1), [bytes(call.rows * 4)]


def send_too_little(host: Host, call: ExpertCall) -> tuple[Reply, Sequence[Any]]:
    return ExpertReply(rows=call.rows, hidden=call.hidden), [bytes(call.rows * call.hidden * 4 - 4)]


def send_nothing(host: Host, call: ExpertCall) -> tuple[Reply, Sequence[Any]]:
    return ExpertReply(rows=call.rows, hidden=call.hidden), []


def send_another_message(host: Host, call: ExpertCall) -> tuple[Reply, Sequence[Any]]:
    return Pong(), []


def send_nan(host: Host, call: ExpertCall) -> tuple[Reply, Sequence[Any]]:
    sums = torch.zeros(call.rows, call.hidden)
    sums[-1, -1] = float("nan")
    return ExpertReply(rows=call.rows, hidden=call.hidden), [as_bytes(sums)]


def send_infinity(host: Host, call: ExpertCall) -> tuple[Reply, Sequence[Any]]:
    sums = torch.full((call.rows, call.hidden), float("-inf"))
    return ExpertReply(rows=call.rows, hidden=call.hidden), [as_bytes(sums)]


def fail(host: Host, call: ExpertCall) -> tuple[Reply, Sequence[Any]]:
    raise ExpertError("out of memory")


def blame_the_user(host: Host, call: ExpertCall) -> tuple[Reply, Sequence[Any]]:
    raise ConfigError("your fault")


def refuse_the_size(host: Host, call: ExpertCall) -> tuple[Reply, Sequence[Any]]:
    raise TooLarge("too large for me")


@pytest.mark.parametrize(
    "misbehave",
    [
        lie_about_rows,
        lie_about_width,
        send_too_little,
        send_nothing,
        send_another_message,
        send_nan,
        send_infinity,
        fail,
        blame_the_user,
        refuse_the_size,
    ],
)
async def test_whatever_one_host_answers_another_does_better(moe_model: LocalModel, misbehave: Any) -> None:
    async def behave(host: Host, call: ExpertCall, body: memoryview) -> Any:
        return misbehave(host, call)

    async with open_swarm(moe_model, all_of(moe_model, [0]), all_of(moe_model, [0])) as swarm:
        inputs = make_inputs(moe_model, 3)
        for bad in swarm.hosts:
            experts = swarm.make_experts()
            bad.behave = behave
            assert_same(await compute(experts, 0, inputs), compute_here(moe_model, 0, inputs))
            assert experts.retries <= 1
            bad.behave = None
        assert any(host.calls for host in swarm.hosts)

        for host in swarm.hosts:
            host.behave = behave
        with pytest.raises(NoPeerCouldServe) as info:
            await compute(swarm.make_experts(), 0, inputs)
        assert 0 in info.value.missing and 1 <= swarm.refreshes <= 2  # once for each part of the layer


async def test_a_passing_fault_without_a_replica(moe_model: LocalModel) -> None:
    """Each layer may ask the swarm again: a long answer outlives more than one fault of its only host."""

    async def fail_once(host: Host, call: ExpertCall, body: memoryview) -> Any:
        host.behave = None
        raise ExpertError("just now")

    async with open_swarm(moe_model, all_of(moe_model)) as swarm:
        experts, inputs = swarm.make_experts(), make_inputs(moe_model, 3)
        for layer in (0, 1, 2):
            swarm.hosts[0].behave = fail_once
            assert_same(await compute(experts, layer, inputs), compute_here(moe_model, layer, inputs))
        assert experts.retries == swarm.refreshes == 3


async def test_a_busy_host_is_waited_for(moe_model: LocalModel) -> None:
    refused = 0

    async def refuse_thrice(host: Host, call: ExpertCall, body: memoryview) -> Any:
        nonlocal refused
        refused += 1
        if refused == 3:
            host.behave = None
        raise Busy("full", retry_after_s=0.001)

    async with open_swarm(moe_model, all_of(moe_model, [0])) as swarm:
        swarm.hosts[0].behave = refuse_thrice
        experts, inputs = swarm.make_experts(), make_inputs(moe_model, 3)
        assert_same(await compute(experts, 0, inputs), compute_here(moe_model, 0, inputs))
        assert refused == experts.retries == 3 and swarm.refreshes == 0


async def test_a_busy_host_is_not_waited_for_where_another_is_free(moe_model: LocalModel) -> None:
    async def refuse(host: Host, call: ExpertCall, body: memoryview) -> Any:
        raise Busy("full", retry_after_s=8.0)

    async with open_swarm(moe_model, all_of(moe_model, [0]), all_of(moe_model, [0])) as swarm:
        inputs = make_inputs(moe_model, 3)
        for busy in swarm.hosts:
            busy.behave = refuse
            with trio.fail_after(5):
                assert_same(await compute(swarm.make_experts(), 0, inputs), compute_here(moe_model, 0, inputs))
            busy.behave = None
        assert any(host.calls for host in swarm.hosts)


async def test_a_host_that_stays_busy_is_given_up(moe_model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swarm_experts, "BUSY_RETRIES", 3)

    async def refuse(host: Host, call: ExpertCall, body: memoryview) -> Any:
        raise Busy("full", retry_after_s=0.001)

    parts = [{0: [0, 1, 2, 3]}, {0: [4, 5, 6, 7]}]
    async with open_swarm(moe_model, *parts, *parts) as swarm:
        for host in swarm.hosts:
            host.behave = refuse
        with pytest.raises(NoPeerCouldServe):
            await compute(swarm.make_experts(), 0, make_inputs(moe_model, 9))


async def test_a_silent_host_is_given_up_for_a_replica(moe_model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swarm_experts, "REPLICA_PATIENCE_S", 0.1)

    async def be_silent(host: Host, call: ExpertCall, body: memoryview) -> Any:
        await trio.sleep_forever()

    async with open_swarm(moe_model, all_of(moe_model, [0]), all_of(moe_model, [0])) as swarm:
        inputs = make_inputs(moe_model, 3)
        for silent in swarm.hosts:
            silent.behave = be_silent
            experts = swarm.make_experts(call_timeout_s=25.0)
            with trio.fail_after(10):
                assert_same(await compute(experts, 0, inputs), compute_here(moe_model, 0, inputs))
            silent.behave = None
        assert any(host.calls for host in swarm.hosts)


async def test_a_silent_host_costs_its_time_once(moe_model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that failed is done again for each answer by itself: nobody waits for the same host again."""

    async def be_silent(host: Host, call: ExpertCall, body: memoryview) -> Any:
        await trio.sleep_forever()

    async with open_swarm(moe_model, {0: [0, 1, 2, 3]}, {0: [4, 5, 6, 7]}) as swarm:
        silent = swarm.hosts[0]
        silent.behave = be_silent
        experts = swarm.make_experts(call_timeout_s=0.1)
        for _ in range(5):
            with trio.fail_after(10), pytest.raises(NoPeerCouldServe):
                await compute(experts, 0, make_inputs(moe_model, 9))
        assert (len(silent.calls), swarm.refreshes) == (2, 1)
        silent.behave = None
        monkeypatch.setattr(swarm_experts, "SILENT_S", 0.0)
        inputs = make_inputs(moe_model, 9)
        assert_same(await compute(experts, 0, inputs), compute_here(moe_model, 0, inputs))


async def test_a_new_plan_gives_a_silent_host_another_chance(moe_model: LocalModel) -> None:
    async def be_silent(host: Host, call: ExpertCall, body: memoryview) -> Any:
        await trio.sleep_forever()

    async with open_swarm(moe_model, all_of(moe_model, [0])) as swarm:
        swarm.hosts[0].behave = be_silent
        experts, inputs = swarm.make_experts(call_timeout_s=0.1), make_inputs(moe_model, 3)
        with trio.fail_after(10), pytest.raises(NoPeerCouldServe):
            await compute(experts, 0, inputs)
        swarm.hosts[0].behave = None
        experts.use_plan(swarm.make_plan())
        assert_same(await compute(experts, 0, inputs), compute_here(moe_model, 0, inputs))


async def test_the_deadline_of_a_call_without_a_replica(moe_model: LocalModel) -> None:
    async def be_silent(host: Host, call: ExpertCall, body: memoryview) -> Any:
        await trio.sleep_forever()

    async with open_swarm(moe_model, all_of(moe_model, [0])) as swarm:
        swarm.hosts[0].behave = be_silent
        with trio.fail_after(10), pytest.raises(NoPeerCouldServe):
            await compute(swarm.make_experts(call_timeout_s=0.1), 0, make_inputs(moe_model, 3))


class Recorder:
    """Sees the calls that a requester submits; ``before`` may refuse one."""

    def __init__(self, swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
        self.deadlines: list[float] = []
        self.before: Any = lambda number: None
        self.wrap: Any = lambda pending: pending
        submit = swarm.requester.submit

        def record(*args: Any, deadline_s: float) -> Any:
            self.deadlines.append(deadline_s)
            self.before(len(self.deadlines))
            return self.wrap(submit(*args, deadline_s=deadline_s))

        monkeypatch.setattr(swarm.requester, "submit", record)


class Pauses(threading.Event):
    """Notes how long somebody would have waited, and doesn't."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.seconds.append(timeout)
        return self.is_set()


async def test_large_but_finite_sums_are_no_fault(moe_model: LocalModel) -> None:
    async def be_large(host: Host, call: ExpertCall, body: memoryview) -> Any:
        return ExpertReply(rows=call.rows, hidden=call.hidden), [as_bytes(torch.full((call.rows, call.hidden), 3e38))]

    async with open_swarm(moe_model, all_of(moe_model, [0])) as swarm:
        swarm.hosts[0].behave = be_large
        experts = swarm.make_experts()
        assert (await compute(experts, 0, make_inputs(moe_model, 3)) == 3e38).all() and experts.retries == 0


@pytest.mark.parametrize("where", ["rows", "weights"])
async def test_no_host_is_blamed_for_what_was_not_finite_before(moe_model: LocalModel, where: str) -> None:
    async with open_swarm(moe_model, all_of(moe_model, [0])) as swarm:
        rows, index, weights = make_inputs(moe_model, 3)
        assert weights is not None
        (rows if where == "rows" else weights)[1, 0] = float("nan")
        experts = swarm.make_experts()
        sums = await compute(experts, 0, (rows, index, weights))
        assert sums[1].isnan().any() and sums[[0, 2]].isfinite().all() and experts.retries == 0


async def test_a_host_that_others_replace_only_in_part_has_all_its_time(
    moe_model: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm(moe_model, all_of(moe_model, [0]), {0: [0]}) as swarm:
        recorder = Recorder(swarm, monkeypatch)
        experts = swarm.make_experts()
        inputs = make_inputs(moe_model, 9)
        whole, part = (host.pool.peer_id for host in swarm.hosts)
        share = Share(list(range(8)), inputs[0], None)
        assert experts._get_deadline_s(0, whole, share) == 10.0  # experts 1 to 7 have nobody else
        assert experts._get_deadline_s(0, whole, share.restrict([0])) == REPLICA_PATIENCE_S
        assert experts._get_deadline_s(0, part, share.restrict([0])) == REPLICA_PATIENCE_S
        for left_out in ("failed", "busy"):
            alone = share.restrict([0])
            getattr(alone, left_out).add(part)
            assert experts._get_deadline_s(0, whole, alone) == 10.0
        await compute(experts, 0, inputs)
        assert 10.0 in recorder.deadlines


async def test_after_asking_the_swarm_again_hosts_have_all_their_time(
    moe_model: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail_once(host: Host, call: ExpertCall, body: memoryview) -> Any:
        host.behave = None
        raise ExpertError("just now")

    async with open_swarm(moe_model, all_of(moe_model, [0]), all_of(moe_model, [0])) as swarm:
        for host in swarm.hosts:
            host.behave = fail_once
        recorder = Recorder(swarm, monkeypatch)
        await compute(swarm.make_experts(), 0, (make_inputs(moe_model, 1)))
        assert swarm.refreshes == 1 and recorder.deadlines[0] < 10.0 and recorder.deadlines[-1] == 10.0


async def test_parts_that_fail_together_ask_the_swarm_once(moe_model: LocalModel) -> None:
    async def fail_once(host: Host, call: ExpertCall, body: memoryview) -> Any:
        host.behave = None
        raise ExpertError("just now")

    async with open_swarm(moe_model, *({0: [n, n + 4]} for n in range(4))) as swarm:
        for host in swarm.hosts:
            host.behave = fail_once
        experts, inputs = swarm.make_experts(), make_inputs(moe_model, 40)
        assert_same(await compute(experts, 0, inputs), compute_here(moe_model, 0, inputs))
        assert (experts.retries, swarm.refreshes) == (4, 1)


async def test_busy_hosts_are_waited_for_once_and_together(
    moe_model: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holding, "HOLD_S", 0.0)  # its clock is not the one that the pauses below pass on

    async def refuse_once(host: Host, call: ExpertCall, body: memoryview) -> Any:
        host.behave = None
        raise Busy("full", retry_after_s=0.25 if host is swarm.hosts[0] else 0.5)

    async with open_swarm(moe_model, {0: [0, 1]}, {0: [2, 3]}, {0: [4, 5, 6, 7]}) as swarm:
        for host in swarm.hosts[:2]:
            host.behave = refuse_once
        experts, inputs = swarm.make_experts(), make_inputs(moe_model, 40)
        experts.stop = pauses = Pauses()
        assert_same(await compute(experts, 0, inputs), compute_here(moe_model, 0, inputs))
        assert pauses.seconds == [0.5]


async def test_a_busy_host_cannot_hold_an_answer_for_long(moe_model: LocalModel) -> None:
    async def refuse(host: Host, call: ExpertCall, body: memoryview) -> Any:
        raise Busy("full", retry_after_s=25.0)

    async with open_swarm(moe_model, all_of(moe_model, [0])) as swarm:
        swarm.hosts[0].behave = refuse
        experts = swarm.make_experts(call_timeout_s=5.0)
        experts.stop = pauses = Pauses()
        with pytest.raises(NoPeerCouldServe):
            await compute(experts, 0, make_inputs(moe_model, 3))
        assert max(pauses.seconds) == swarm_experts.BUSY_WAIT_S and sum(pauses.seconds) == 5.0
        assert experts.retries == len(pauses.seconds) + 2  # before and after asking the swarm again


@pytest.mark.parametrize("error", [TooLarge("ours"), LocalProtocolError("ours")])
async def test_what_goes_wrong_here_ends_the_calls_under_way(
    moe_model: LocalModel, error: DaaswarmError, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = trio.Event()

    async def be_silent(host: Host, call: ExpertCall, body: memoryview) -> Any:
        try:
            await trio.sleep_forever()
        finally:
            told.set()

    async with open_swarm(moe_model, {0: [0, 1, 2, 3]}, {0: [4, 5, 6, 7]}) as swarm:
        for host in swarm.hosts:
            host.behave = be_silent
        recorder = Recorder(swarm, monkeypatch)

        def refuse_the_second(number: int) -> None:
            if number == 2:
                while not any(host.calls for host in swarm.hosts):
                    time.sleep(0.001)  # the first is being computed
                raise error

        recorder.before = refuse_the_second
        experts = swarm.make_experts()
        with pytest.raises(type(error), match="ours"):
            await compute(experts, 0, make_inputs(moe_model, 9))
        with trio.fail_after(5):
            await told.wait()
        assert experts._in_flight == [] and experts.retries == 0 and swarm.refreshes == 0


async def test_nobody_left_for_one_part_ends_the_calls_for_the_others(moe_model: LocalModel) -> None:
    refused = 0

    async def fail(host: Host, call: ExpertCall, body: memoryview) -> Any:
        nonlocal refused
        refused += 1
        raise ExpertError("no")

    async def fail_then_be_silent(host: Host, call: ExpertCall, body: memoryview) -> Any:
        if len(host.calls) == 1:
            raise ExpertError("not yet")
        await trio.sleep_forever()

    async with open_swarm(moe_model, {0: [0, 1, 2, 3]}, {0: [4, 5, 6, 7]}) as swarm:
        # Shares are routed in the order of PeerIds: the first one's call is under way when the second finds nobody.
        first, second = sorted(swarm.hosts, key=lambda host: host.pool.peer_id)
        first.behave, second.behave = fail_then_be_silent, fail
        experts = swarm.make_experts(refreshed=swarm.make_plan([first]))
        with pytest.raises(NoPeerCouldServe):
            await compute(experts, 0, make_inputs(moe_model, 9))
        with trio.fail_after(5):  # less than the call's own deadline
            while not all(connection.is_idle for connection in swarm.requester.connections):  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert refused == 1


async def test_after_a_failure_the_router_is_told_so(moe_model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(host: Host, call: ExpertCall, body: memoryview) -> Any:
        raise ExpertError("no")

    async with open_swarm(moe_model, *[all_of(moe_model, [0])] * 3) as swarm:
        for host in swarm.hosts:
            host.behave = fail
        experts = swarm.make_experts()
        retries: list[bool] = []
        choose = experts._router.choose

        def record(*args: Any, is_retry: bool, **others: Any) -> Any:
            retries.append(is_retry)
            return choose(*args, is_retry=is_retry, **others)

        monkeypatch.setattr(experts._router, "choose", record)
        with pytest.raises(NoPeerCouldServe):
            await compute(experts, 0, make_inputs(moe_model, 1))
        assert not retries[0] and all(retries[1:]) and len(retries) > 3


async def test_a_host_is_charged_for_its_own_time_only(moe_model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Answered:
        latency_s = 0.125

        def __init__(self, pending: Any) -> None:
            self.wait, self.cancel = pending.wait, pending.cancel

    async with open_swarm(moe_model, all_of(moe_model, [0])) as swarm:
        Recorder(swarm, monkeypatch).wrap = Answered
        experts = swarm.make_experts()
        await compute(experts, 0, make_inputs(moe_model, 3))
        assert [use.latencies_s for use in experts.hosts.values()] == [[0.125]]


# -- giving up ----------------------------------------------------------------------------------------------------


async def run_until_cancelled(swarm: Swarm, experts: SwarmExperts, inputs: Inputs) -> BaseException | None:
    """The error that the model's thread got when ``cancel`` was called while a host was asked."""
    errors: list[BaseException] = []

    def in_thread() -> None:
        try:
            experts(0, *inputs)
        except (DaaswarmError, Stopped) as error:
            errors.append(error)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, in_thread)
            while not any(host.calls for host in swarm.hosts):  # noqa: ASYNC110 - the host is no event
                await trio.sleep(0.005)
            experts.cancel()
    return errors[0] if errors else None


async def test_cancel_ends_the_thread_at_once_and_tells_the_host(moe_model: LocalModel) -> None:
    told = trio.Event()

    async def be_silent(host: Host, call: ExpertCall, body: memoryview) -> Any:
        try:
            await trio.sleep_forever()
        finally:
            told.set()

    async with open_swarm(moe_model, all_of(moe_model, [0])) as swarm:
        swarm.hosts[0].behave = be_silent
        experts, inputs = swarm.make_experts(call_timeout_s=30.0), make_inputs(moe_model, 3)
        started = time.monotonic()
        assert isinstance(await run_until_cancelled(swarm, experts, inputs), Stopped)
        assert time.monotonic() - started < 5
        with trio.fail_after(5):
            await told.wait()
        with pytest.raises(Stopped):  # and it stays so
            await compute(experts, 0, inputs)


async def test_cancel_while_a_busy_host_is_waited_for(moe_model: LocalModel) -> None:
    async def refuse(host: Host, call: ExpertCall, body: memoryview) -> Any:
        raise Busy("full", retry_after_s=20.0)

    async with open_swarm(moe_model, all_of(moe_model, [0])) as swarm:
        swarm.hosts[0].behave = refuse
        experts = swarm.make_experts(call_timeout_s=30.0)
        assert isinstance(await run_until_cancelled(swarm, experts, make_inputs(moe_model, 3)), Stopped)


# -- shares -------------------------------------------------------------------------------------------------------


def test_a_part_of_a_share_carries_the_rows_it_needs() -> None:
    rows = torch.arange(12.0).view(4, 3)
    share = make_pair_share(
        [1, 2, 3],
        rows,
        None,
        torch.tensor([0, 1, 1, 3]),
        torch.tensor([1, 2, 3, 2]),
        torch.tensor([0.1, 0.2, 0.3, 0.4]),
    )
    share.failed.add(PeerId("x"))
    assert share.into is not None and share.into.tolist() == [0, 1, 3] and share.pair_rows is not None
    assert share.pair_rows.tolist() == [0, 1, 1, 2]
    assert share.get_demand() == {1: 1, 2: 2, 3: 1}
    share.waits, share.refreshed = 2, True
    part = share.restrict([2])
    assert part.into is not None and part.into.tolist() == [1, 3] and part.pair_rows is not None
    assert part.pair_rows.tolist() == [0, 1] and torch.equal(part.rows, rows[[1, 3]])
    assert (part.waits, part.refreshed, part.failed) == (2, True, {PeerId("x")})
    part.failed.add(PeerId("y"))
    assert share.failed == {PeerId("x")}

    dense = Share([0, 1], rows, None, waits=3)
    assert dense.get_demand() == {0: 4, 1: 4}
    assert (dense.restrict([1]).waits, dense.restrict([1]).experts) == (3, [1])
