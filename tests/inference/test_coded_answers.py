"""Rows and sums in a codec, between a requester and its hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from daaswarm.inference.plan import HostPlan
from daaswarm.messages import ExpertReply
from daaswarm.models.sources import LocalModel, find_model
from daaswarm.types import CODECS
from tests.inference.swarm_in_memory import Host, Swarm, open_swarm
from tests.inference.test_swarm_experts import all_of, assert_same, compute, compute_here, make_inputs


@pytest.fixture(scope="module", params=["moe", "dense"])
def model(request: pytest.FixtureRequest, cache: Path) -> LocalModel:
    return find_model(str(request.getfixturevalue(request.param)), cache)


def make_plan(swarm: Swarm, *willing: Host, codecs: Any = CODECS) -> HostPlan:
    plan = swarm.make_plan()
    plan.codecs.update({host.pool.peer_id: frozenset(codecs) for host in willing})
    return plan


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rows", [1, 40])
async def test_an_answer_in_a_codec(model: LocalModel, codec: Any, rows: int) -> None:
    n = model.layers[0]
    async with open_swarm(model, {0: list(range(n // 2))}, {0: list(range(n // 2, n))}) as swarm:
        inputs = make_inputs(model, rows)
        plain, coded = swarm.make_experts(), swarm.make_experts(make_plan(swarm, *swarm.hosts), codec=codec)
        wanted = await compute(plain, 0, inputs)
        got = await compute(coded, 0, inputs)
        assert (got - wanted).abs().max() <= 0.03 * wanted.abs().max() and coded.retries == 0
        for peer, use in coded.hosts.items():
            before = plain.hosts[peer]
            assert (use.calls, use.coded_calls) == (1, 1) and before.coded_calls == 0
            assert use.bytes_sent < before.bytes_sent and use.bytes_received < 0.6 * before.bytes_received


async def test_hosts_that_do_not_take_it_get_plain_rows(model: LocalModel) -> None:
    async with open_swarm(model, all_of(model, [0]), all_of(model, [1])) as swarm:
        one, other = swarm.hosts
        plan = make_plan(swarm, one, codecs=["f16"])
        experts = swarm.make_experts(plan, codec="f16")
        for layer in (0, 1):
            inputs = make_inputs(model, 3)
            torch.testing.assert_close(
                await compute(experts, layer, inputs), compute_here(model, layer, inputs), rtol=0.01, atol=0.01
            )
        assert [experts.hosts[host.pool.peer_id].coded_calls for host in (one, other)] == [1, 0]
        experts = swarm.make_experts(plan, codec="int8")
        assert_same(await compute(experts, 0, inputs), compute_here(model, 0, inputs))


async def test_rows_that_the_codec_cannot_say_go_as_they_are(model: LocalModel) -> None:
    async with open_swarm(model, all_of(model, [0])) as swarm:
        experts = swarm.make_experts(make_plan(swarm, *swarm.hosts), codec="f16")
        rows, index, weights = make_inputs(model, 2)
        inputs = rows * 1e5, index, weights
        got, wanted = await compute(experts, 0, inputs), compute_here(model, 0, inputs)
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=float(wanted.abs().max()) * 1e-3)
        assert swarm.hosts[0].calls[0].codec == ""


async def test_half_precision_rows_are_not_made_larger(model: LocalModel) -> None:
    async with open_swarm(model, all_of(model, [0]), dtype="bf16") as swarm:
        experts = swarm.make_experts(make_plan(swarm, *swarm.hosts), codec="f16")
        rows, index, weights = make_inputs(model, 2)
        await compute(experts, 0, (rows.bfloat16(), index, weights))
        call = swarm.hosts[0].calls[0]
        assert (call.codec, call.reply_codec) == ("", "f16")


async def test_a_host_that_names_none_as_a_codec(model: LocalModel) -> None:
    async with open_swarm(model, all_of(model, [0])) as swarm:
        experts, inputs = swarm.make_experts(make_plan(swarm, *swarm.hosts, codecs=["none", ""])), make_inputs(model, 2)
        assert_same(await compute(experts, 0, inputs), compute_here(model, 0, inputs))


@pytest.mark.parametrize("lie", ["other", "unasked", "short"])
async def test_a_host_that_answers_in_something_else_is_replaced(model: LocalModel, lie: str) -> None:
    async with open_swarm(model, all_of(model, [0]), all_of(model, [0])) as swarm:
        liar = swarm.hosts[0]

        async def answer(host: Host, call: Any, body: memoryview) -> Any:
            reply, parts = host.service.compute(call, body)
            assert isinstance(reply, ExpertReply)
            if lie == "short":
                return reply, [bytearray().join(parts)[:-2]]
            return replace(reply, codec="bf16"), parts

        liar.behave = answer
        willing = () if lie == "unasked" else swarm.hosts
        codec: Any = "none" if lie == "unasked" else "int8"
        experts = swarm.make_experts(make_plan(swarm, *willing), codec=codec)
        for _ in range(6):  # until the router chose the liar
            inputs = make_inputs(model, 2)
            got, wanted = await compute(experts, 0, inputs), compute_here(model, 0, inputs)
            assert (got - wanted).abs().max() <= 0.03 * wanted.abs().max()
        assert experts.retries == 1 or not liar.calls
