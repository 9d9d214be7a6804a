"""What a busy peer would refuse isn't sent, and everything else is."""

from __future__ import annotations

import pytest
from net_helpers import get_call, get_identity, serve

from daaswarm.errors import Busy
from daaswarm.messages import ExpertCall, ExpertReply, Failure, GetModelPart
from daaswarm.net import holding as holding_module
from daaswarm.net.holding import HOLD_S, Holding
from daaswarm.net.memory import MemoryHub

REFUSAL = Failure(code="busy", message="this host's queue is full", retry_after_s=0.1)


@pytest.fixture
def refused() -> Holding:
    """A call of 1,000 bytes with a deadline of 2 s was refused at 10.0 for 0.1 s."""
    holding = Holding()
    holding.note(ExpertCall, 1000, 2.0, REFUSAL, 10.0)
    return holding


@pytest.mark.parametrize(("nbytes", "deadline_s"), [(1000, 2.0), (5000, 2.0), (1000, 0.5)])
def test_what_would_be_refused_again_waits_for_the_hint(refused: Holding, nbytes: int, deadline_s: float) -> None:
    with pytest.raises(Busy, match="queue is full") as caught:
        refused.check(ExpertCall, nbytes, deadline_s, 10.04)
    assert caught.value.retry_after_s == pytest.approx(0.06)
    refused.check(ExpertCall, nbytes, deadline_s, 10.1)


def test_what_the_peer_might_take_is_sent(refused: Holding) -> None:
    refused.check(ExpertCall, 999, 2.0, 10.0)  # smaller: it may be computed at once
    refused.check(ExpertCall, 1000, 2.1, 10.0)  # it can wait longer
    refused.check(GetModelPart, 1000, 2.0, 10.0)


def test_what_is_no_hint_holds_nothing() -> None:
    holding = Holding()
    holding.note(ExpertCall, 1000, 2.0, Failure(code="busy", message="full"), 10.0)
    holding.note(ExpertCall, 1000, 2.0, Failure(code="error", message="broken", retry_after_s=9.0), 10.0)
    holding.note(ExpertCall, 0, 2.0, REFUSAL, 10.0)
    holding.check(ExpertCall, 1000, 2.0, 10.0)
    holding.check(ExpertCall, 0, 2.0, 10.0)


def test_a_hint_of_an_hour_is_not_believed_for_long() -> None:
    holding = Holding()
    holding.note(ExpertCall, 1000, 2.0, Failure(code="busy", message="paused", retry_after_s=3600.0), 10.0)
    with pytest.raises(Busy):
        holding.check(ExpertCall, 1000, 2.0, 10.0 + HOLD_S - 0.01)
    holding.check(ExpertCall, 1000, 2.0, 10.0 + HOLD_S)


async def test_a_connection_that_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    async def refuse(peer_id, contact, message, body, deadline_s):
        asked.append(len(body))
        if len(body) < 100:
            return ExpertReply(rows=1, hidden=8), [body]
        raise Busy("this host's queue is full", retry_after_s=600.0)

    monkeypatch.setattr(holding_module, "HOLD_S", 600.0)  # no clock decides
    hub = MemoryHub()
    async with (
        hub.open_node(get_identity(1), handler=serve) as a,
        hub.open_node(get_identity(2), handler=refuse) as b,
    ):
        await a.connect(b.contact)
        for _ in range(3):
            with pytest.raises(Busy, match="queue is full"):
                await a.call(b.contact, get_call(), [bytes(100)], deadline_s=5)
        await a.call(b.contact, get_call(), [bytes(99)], deadline_s=5)
        assert asked == [100, 99]
