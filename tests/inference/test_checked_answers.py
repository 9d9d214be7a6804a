"""Answers of hosts that lie, over the in-memory network: caught, replaced, and whoever lied is asked no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from daaswarm.core.reputation import PROBATION, Reputation
from daaswarm.core.verify import Verify, parse_verify
from daaswarm.errors import Busy, ConnectionLost, ExpertError, NoPeerCouldServe
from daaswarm.inference.auditing import Auditor, Ledger
from daaswarm.inference.recomputing import Recomputer
from daaswarm.inference.swarm_experts import SwarmExperts
from daaswarm.messages import ExpertCall
from daaswarm.models.secrets import Secrets, make_secrets
from daaswarm.models.sources import LocalModel, find_model
from tests.inference.swarm_in_memory import Host, Swarm, open_swarm
from tests.inference.test_swarm_experts import all_of, assert_same, compute, compute_here, make_inputs


@pytest.fixture(scope="module", params=["moe", "dense"])
def model(request: pytest.FixtureRequest, cache: Path) -> LocalModel:
    return find_model(str(request.getfixturevalue(request.param)), cache)


@pytest.fixture(scope="module")
def secrets(model: LocalModel, tmp_path_factory: pytest.TempPathFactory) -> Secrets:
    path = tmp_path_factory.mktemp("audit") / "secrets"
    make_secrets(model, "f32", path)
    return Secrets(path, model.root, "f32")


class Checking:
    """An auditor, and what it knows."""

    def __init__(self, model: LocalModel, secrets: Secrets | None, verify: str, *, recompute: bool = True) -> None:
        self.ledger = Ledger(Reputation())
        recomputer = Recomputer(model, "f32") if recompute else None
        self.auditor = Auditor(parse_verify(verify), self.ledger, model.root, secrets, recomputer)

    def earn_trust(self, host: Host, model: LocalModel) -> None:
        for _ in range(PROBATION + 200):
            self.ledger.note(host.pool.peer_id, model.root, right=True)


async def lie(host: Host, call: ExpertCall, body: memoryview) -> Any:
    """The sums are wrong in one place; what is opened fits honest ones."""
    reply, parts = host.service.compute(call, body)
    sums = torch.frombuffer(bytearray(parts[0]), dtype=torch.float32).clone()
    sums[0] += 0.01 * sums.abs().max()
    return reply, [sums.numpy().data.cast("B"), *parts[1:]]


async def lie_unless_opened(host: Host, call: ExpertCall, body: memoryview) -> Any:
    return host.service.compute(call, body) if call.opened else await lie(host, call, body)


async def answer(swarm: Swarm, experts: SwarmExperts, model: LocalModel, rows: int = 3) -> None:
    inputs = make_inputs(model, rows)
    assert_same(await compute(experts, 0, inputs), compute_here(model, 0, inputs))


@pytest.mark.parametrize("verify", ["every", "sample", "sample=1", "twin=1"])
async def test_honest_hosts_pass(verify: str, model: LocalModel, secrets: Secrets) -> None:
    checking = Checking(model, secrets, verify)
    async with open_swarm(model, all_of(model, [0]), all_of(model, [0])) as swarm:
        experts = swarm.make_experts(auditor=checking.auditor)
        for _ in range(5):
            await answer(swarm, experts, model, 5)
    use = experts.take_audits()
    assert use.compared + use.sketched >= 5 and not use.wrong and not use.recomputed and not use.unchecked
    assert bool(use.compared) == verify.startswith("twin") and not checking.ledger.get_banned()


async def test_nothing_is_checked_where_that_is_off_or_needless(model: LocalModel, secrets: Secrets) -> None:
    for verify in ("off", "every"):
        checking = Checking(model, secrets, verify)
        async with open_swarm(model, all_of(model, [0])) as swarm:
            checking.ledger.exempt.add(swarm.hosts[0].pool.peer_id)
            experts = swarm.make_experts(auditor=checking.auditor)
            await answer(swarm, experts, model)
            assert not any(call.opened for call in swarm.hosts[0].calls)
        assert experts.take_audits().sketched == 0


@pytest.mark.parametrize("verify", ["every", "sample", "twin=1"])
async def test_a_liar_is_caught_replaced_and_asked_no_more(verify: str, model: LocalModel, secrets: Secrets) -> None:
    checking = Checking(model, secrets, verify)
    async with open_swarm(model, all_of(model, [0]), all_of(model, [0]), all_of(model, [0])) as swarm:
        liar = swarm.hosts[1]
        liar.behave = lie
        experts = swarm.make_experts(auditor=checking.auditor)
        for _ in range(12):
            await answer(swarm, experts, model)  # every answer is right
        use = experts.take_audits()
        assert set(use.wrong) == {liar.pool.peer_id} and checking.ledger.get_banned() == set(use.wrong)
        liar.calls.clear()
        for _ in range(5):
            await answer(swarm, experts, model)
        assert not liar.calls


async def test_a_liar_that_is_honest_when_it_sees_the_check(model: LocalModel, secrets: Secrets) -> None:
    """It passes probation, whose calls are opened at once; then the coin comes after its answer."""
    checking = Checking(model, secrets, "sample=1")
    async with open_swarm(model, all_of(model, [0]), all_of(model, [0])) as swarm:
        liar = swarm.hosts[0]
        liar.behave = lie_unless_opened
        for host in swarm.hosts:
            checking.earn_trust(host, model)
        # With a share of one the rate is always one: opened at once. A trusted host's coin is tossed afterwards.
        checking.auditor.opens = lambda peer, layer: False  # type: ignore[method-assign]
        experts = swarm.make_experts(auditor=checking.auditor)
        for _ in range(12):
            await answer(swarm, experts, model)
        assert checking.ledger.get_banned() == {liar.pool.peer_id}


async def test_the_only_host_lies(model: LocalModel, secrets: Secrets) -> None:
    checking = Checking(model, secrets, "every")
    async with open_swarm(model, all_of(model, [0])) as swarm:
        swarm.hosts[0].behave = lie
        experts = swarm.make_experts(auditor=checking.auditor)
        with pytest.raises(NoPeerCouldServe):
            await answer(swarm, experts, model)


async def test_who_refuses_to_open_is_not_believed(model: LocalModel, secrets: Secrets) -> None:
    async def refuse(host: Host, call: ExpertCall, body: memoryview) -> Any:
        if call.opened:
            raise ExpertError("not today")
        return host.service.compute(call, body)

    checking = Checking(model, secrets, "sample=1")
    async with open_swarm(model, all_of(model, [0]), all_of(model, [0])) as swarm:
        host = swarm.hosts[0]
        host.behave = refuse
        checking.auditor.opens = lambda peer, layer: False  # type: ignore[method-assign]
        experts = swarm.make_experts(auditor=checking.auditor)
        for _ in range(6):
            await answer(swarm, experts, model)
        assert set(experts.take_audits().wrong) == {host.pool.peer_id}
        [standing] = [each for each in checking.ledger.get_standings() if each.peer_id == host.pool.peer_id]
        assert standing.suspicion > 0 and "not opened" in standing.reason


@pytest.mark.parametrize("error", [Busy("full", retry_after_s=0.01), ConnectionLost("gone")])
async def test_who_can_not_open_is_not_blamed_but_its_answer_is_not_used(
    error: Exception, model: LocalModel, secrets: Secrets
) -> None:
    async def fail(host: Host, call: ExpertCall, body: memoryview) -> Any:
        if call.opened:
            raise error
        return await lie(host, call, body)

    checking = Checking(model, secrets, "sample=1")
    async with open_swarm(model, all_of(model, [0]), all_of(model, [0])) as swarm:
        swarm.hosts[0].behave = fail
        checking.auditor.opens = lambda peer, layer: False  # type: ignore[method-assign]
        experts = swarm.make_experts(auditor=checking.auditor)
        for _ in range(4):
            await answer(swarm, experts, model)
        assert not checking.ledger.get_banned()


async def test_a_frame_up_by_the_twin(model: LocalModel) -> None:
    """The second host lies about an honest one's call: what is computed here decides."""
    checking = Checking(model, None, "twin=1")
    async with open_swarm(model, all_of(model, [0]), all_of(model, [0])) as swarm:
        honest, liar = swarm.hosts
        liar.behave = lie
        experts = swarm.make_experts(auditor=checking.auditor)
        for _ in range(8):
            await answer(swarm, experts, model)
        use = experts.take_audits()
        assert set(use.wrong) == {liar.pool.peer_id} and use.recomputed >= 1
        assert checking.ledger.get_banned() == {liar.pool.peer_id}
        assert honest.pool.peer_id not in use.wrong


async def test_two_disagree_and_nobody_can_decide(model: LocalModel) -> None:
    """Three hosts, one lies, the weights aren't here: a majority is no proof, and no lie is used."""
    checking = Checking(model, None, "twin=1", recompute=False)
    async with open_swarm(model, *[all_of(model, [0])] * 4) as swarm:
        swarm.hosts[2].behave = lie
        experts = swarm.make_experts(auditor=checking.auditor)
        for _ in range(6):
            await answer(swarm, experts, model)
        assert not checking.ledger.get_banned()


async def test_no_twin_and_no_secrets(model: LocalModel) -> None:
    checking = Checking(model, None, "sample=1")
    async with open_swarm(model, all_of(model, [0])) as swarm:
        experts = swarm.make_experts(auditor=checking.auditor)
        await answer(swarm, experts, model)
        assert experts.take_audits().unchecked >= 1


async def test_checks_end_when_the_answer_is_cancelled(model: LocalModel, secrets: Secrets) -> None:
    opened = trio.Event()

    async def never(host: Host, call: ExpertCall, body: memoryview) -> Any:
        if call.opened:
            opened.set()
            await trio.sleep_forever()
        return host.service.compute(call, body)

    from daaswarm.inference.swarm_experts import Stopped

    checking = Checking(model, secrets, "sample=1")
    async with open_swarm(model, all_of(model, [0])) as swarm, trio.open_nursery() as nursery:
        swarm.hosts[0].behave = never
        checking.auditor.opens = lambda peer, layer: False  # type: ignore[method-assign]
        experts = swarm.make_experts(auditor=checking.auditor)

        async def ask() -> None:
            with pytest.raises(Stopped):
                await compute(experts, 0, make_inputs(model, 3))

        nursery.start_soon(ask)
        await opened.wait()
        experts.cancel()


def test_the_rate_of_checks() -> None:
    ledger = Ledger(Reputation())
    root: Any = "a" * 64
    auditor = Auditor(Verify("sample", 0.1), ledger, root, None, None)
    peer: Any = "peer"
    assert all(auditor.draws(peer) for _ in range(50))
    for _ in range(PROBATION + 200):
        ledger.note(peer, root, right=True)
    drawn = sum(auditor.draws(peer) for _ in range(4000))
    assert 280 < drawn < 530  # 400 expected; six sigmas
