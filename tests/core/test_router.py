"""ReplicaRouter: every expert once, work where it ends soonest, failing peers last."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swarm_driver import NOW

from daaswarm.core.router import (
    COOLDOWN_MAX_S,
    COOLDOWN_S,
    EXPLORE_EVERY,
    FORGET_CHOICES,
    FORGET_S,
    PLAN_S,
    ReplicaRouter,
)
from daaswarm.errors import NoPeerCouldServe
from daaswarm.types import PeerId

A, B, C = PeerId("peer-a"), PeerId("peer-b"), PeerId("peer-c")
SLICES = dict.fromkeys(range(8), 1)


def held_by(*peers: PeerId, experts: int = 8) -> dict[int, list[PeerId]]:
    return {expert: list(peers) for expert in range(experts)}


def make(seed: int = 0, **unit_s: float) -> ReplicaRouter:
    """A router that knows peers a, b, c with these service times per unit and 300 us round trips."""
    router = ReplicaRouter(random.Random(seed))
    for name, unit in unit_s.items():
        reply(router, PeerId(f"peer-{name}"), unit)
    return router


def reply(
    router: ReplicaRouter,
    peer: PeerId,
    unit_s: float,
    *,
    fixed_s: float = 300e-6,
    queue: int = 0,
    now: float = NOW,
    times: int = 1,
) -> None:
    for _ in range(times):
        router.note_reply(peer, 8, fixed_s + 8 * unit_s, 8 * unit_s, queue, now, experts=8)


def counts(plan: dict[PeerId, list[int]]) -> dict[str, int]:
    return {peer: len(experts) for peer, experts in sorted(plan.items())}


@given(
    st.dictionaries(
        st.integers(0, 20), st.tuples(st.integers(1, 100), st.sets(st.sampled_from("abcdef"), min_size=1)), max_size=12
    ),
    st.sets(st.sampled_from("abcdef")),
    st.sets(st.sampled_from("abcdef")),
    st.integers(0, 3),
)
@settings(deadline=None)
def test_every_expert_goes_once_to_one_of_its_usable_holders(
    calls: dict[int, tuple[int, set[str]]], failing: set[str], excluded: set[str], seed: int
) -> None:
    router = ReplicaRouter(random.Random(seed))
    for peer in sorted(failing):
        router.note_failure(PeerId(peer), NOW)
    rows = {expert: n for expert, (n, _) in calls.items()}
    candidates = {expert: [PeerId(p) for p in sorted(peers)] for expert, (_, peers) in calls.items()}
    missing = sorted(expert for expert, (_, peers) in calls.items() if peers <= excluded)
    exclude = {PeerId(p) for p in excluded}
    if missing:
        with pytest.raises(NoPeerCouldServe) as caught:
            router.choose(4, rows, candidates, NOW, exclude)
        assert caught.value.missing == {4: missing}
        return
    plan = router.choose(4, rows, candidates, NOW, exclude)
    assert sorted(e for experts in plan.values() for e in experts) == sorted(rows)
    for peer, experts in plan.items():
        assert experts and peer not in excluded
        for expert in experts:
            holders = calls[expert][1]
            assert peer in holders
            assert peer not in failing or holders - excluded <= failing, "a cooling peer only if nobody else can"


def test_two_equal_idle_hosts_split_the_slices_in_half() -> None:
    assert counts(make(a=100e-6, b=100e-6).choose(0, SLICES, held_by(A, B), NOW)) == {A: 4, B: 4}
    # Also before anything is known.
    heavy = dict.fromkeys(range(8), 8)
    assert counts(make().choose(0, heavy, held_by(A, B), NOW)) == {A: 4, B: 4}


def test_a_host_three_times_as_fast_gets_three_times_as_much() -> None:
    assert counts(make(a=100e-6, b=300e-6).choose(0, SLICES, held_by(A, B), NOW)) == {A: 6, B: 2}


def test_tiny_calls_are_not_scattered() -> None:
    router = make(a=2e-6, b=2e-6, c=2e-6)
    assert len(router.choose(0, SLICES, held_by(A, B, C), NOW)) == 1
    assert len(make(a=1e-3, b=1e-3, c=1e-3).choose(0, SLICES, held_by(A, B, C), NOW)) == 3


def test_requesters_break_ties_differently() -> None:
    first = {next(iter(make(seed, a=2e-6, b=2e-6).choose(0, SLICES, held_by(A, B), NOW))) for seed in range(20)}
    assert first == {A, B}


def test_an_expert_that_one_host_holds_goes_there_and_the_rest_evens_out() -> None:
    router = make(a=100e-6, b=100e-6)
    candidates = {**held_by(A, B), 0: [A], 1: [A]}
    plan = router.choose(0, SLICES, candidates, NOW)
    assert {0, 1} <= set(plan[A]) and counts(plan) == {A: 4, B: 4}


def test_a_far_host_is_left_out_and_a_queue_counts_while_it_is_fresh() -> None:
    router = make(a=100e-6)
    reply(router, B, 100e-6, fixed_s=50e-3)
    assert counts(router.choose(0, SLICES, held_by(A, B), NOW)) == {A: 8}
    router = make(a=100e-6, b=100e-6)
    reply(router, B, 100e-6, queue=50)
    assert counts(router.choose(0, SLICES, held_by(A, B), NOW)) == {A: 8}
    assert counts(router.choose(0, SLICES, held_by(A, B), NOW + 2)) == {A: 4, B: 4}


def test_plans_follow_a_host_that_becomes_slow_and_ignore_noise() -> None:
    router = make(a=100e-6, b=100e-6)
    plan = router.choose(0, SLICES, held_by(A, B), NOW)
    reply(router, B, 110e-6)
    assert router.choose(0, SLICES, held_by(A, B), NOW) is plan, "reused"
    reply(router, B, 700e-6, times=10)
    assert counts(router.choose(0, SLICES, held_by(A, B), NOW))[A] >= 6


def test_a_cached_plan_is_for_the_same_rows_and_holders_only() -> None:
    router = make(a=100e-6, b=100e-6)
    router.choose(0, SLICES, held_by(A, B), NOW)
    assert counts(router.choose(0, SLICES, held_by(A), NOW)) == {A: 8}
    assert counts(router.choose(0, {0: 1}, held_by(B), NOW)) == {B: 1}
    assert counts(router.choose(0, SLICES, held_by(A, B), NOW, {A})) == {B: 8}
    with pytest.raises(NoPeerCouldServe):
        router.choose(0, SLICES, {}, NOW)


def test_failures_cool_down_exponentially_and_a_reply_forgives() -> None:
    router = make(a=100e-6, b=100e-6)
    router.choose(0, SLICES, held_by(A, B), NOW)
    now = NOW
    for n in range(10):
        router.note_failure(B, now)
        cool_s = min(COOLDOWN_S * 2**n, COOLDOWN_MAX_S)
        assert router.is_cooling(B, now + cool_s - 0.01) and not router.is_cooling(B, now + cool_s)
        assert counts(router.choose(0, SLICES, held_by(A, B), now)) == {A: 8}
        now += cool_s
    assert B in router.choose(0, SLICES, held_by(A, B), now + PLAN_S), "tried again"
    router.note_failure(B, now)
    assert counts(router.choose(0, SLICES, held_by(B), now)) == {B: 8}, "better than nobody"
    reply(router, B, 100e-6, now=now)
    assert not router.is_cooling(B, now)
    reply(router, A, 100e-6, now=now)
    assert counts(router.choose(0, SLICES, held_by(A, B), now)) == {A: 4, B: 4}
    router.note_failure(B, now)
    assert not router.is_cooling(B, now + COOLDOWN_S), "the count began anew"


def test_newcomers_are_tried_and_old_grudges_end() -> None:
    router = make(a=100e-6)
    assert B in router.choose(0, SLICES, held_by(A, B), NOW)
    reply(router, B, 10e-3)
    assert B not in router.choose(0, SLICES, held_by(A, B), NOW)
    later = NOW + FORGET_S + 1
    reply(router, A, 100e-6, now=later)
    assert B not in router.choose(0, SLICES, held_by(A, B), later), "who asks rarely doesn't forget so soon"
    for _ in range(FORGET_CHOICES):
        router.choose(0, SLICES, held_by(A, B), later)
    assert B in router.choose(0, SLICES, held_by(A, B), later + PLAN_S)


def test_batches_and_single_rows_are_learnt_apart() -> None:
    router = make(a=100e-6, b=100e-6)
    for peer in (A, B):  # per row a batch of 256 costs a hundredth
        router.note_reply(peer, 8 * 256, 300e-6 + 8 * 256e-6, 8 * 256e-6, 0, NOW, experts=8)
    assert counts(router.choose(0, SLICES, held_by(A, B), NOW)) == {A: 4, B: 4}
    assert router.get_estimate_s(A, 1, 8, NOW) == pytest.approx(300e-6 + 800e-6)
    assert router.get_estimate_s(A, 256, 8, NOW) == pytest.approx(300e-6 + 8 * 256e-6)


def test_a_host_cannot_talk_itself_fast() -> None:
    router = make()
    router.note_reply(A, 8, 10e-3, -5.0, 0, NOW, experts=8)
    router.note_reply(B, 8, 10e-3, 99.0, -7, NOW, experts=8)
    assert router.get_estimate_s(A, 1, 8, NOW) == router.get_estimate_s(B, 1, 8, NOW) == pytest.approx(10e-3)


def test_memory_of_peers_and_plans_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daaswarm.core.router.PEERS", 5)
    monkeypatch.setattr("daaswarm.core.router.PLANS", 5)
    router = make()
    for n in range(50):
        router.choose(0, {n: 1}, {n: [PeerId(f"p{n}")]}, NOW + n)
    assert len(router._peers) == 5 and len(router._plans) <= 5


def test_now_and_then_a_replica_that_is_left_out_is_heard_again_unless_far_or_failing() -> None:
    def count_b(router: ReplicaRouter) -> int:
        return sum(B in router.choose(0, {0: 1}, {0: [A, B]}, NOW) for _ in range(3 * EXPLORE_EVERY))

    assert count_b(make(a=100e-6, b=400e-6)) == 3
    far = make(a=100e-6)
    reply(far, B, 100e-6, fixed_s=50e-3)
    assert count_b(far) == 0
    failing = make(a=100e-6, b=400e-6)
    failing.note_failure(B, NOW)
    assert count_b(failing) == 0


def test_a_retry_goes_to_a_peer_that_has_answered_before() -> None:
    router = make(a=20e-6, b=500e-6)
    newcomers = [PeerId(f"new-{n}") for n in range(20)]
    candidates = held_by(A, B, *newcomers)
    assert not {A, B} & router.choose(0, SLICES, candidates, NOW, {A}).keys()
    assert router.choose(0, SLICES, candidates, NOW, {A}, is_retry=True).keys() == {B}
    router.note_failure(B, NOW)  # one that cools down isn't better than a newcomer
    assert not {A, B} & router.choose(0, SLICES, candidates, NOW, {A}, is_retry=True).keys()
    for peer in newcomers:
        router.note_failure(peer, NOW)
    assert router.choose(0, SLICES, candidates, NOW, {A}, is_retry=True).keys() == {B}
    # A peer that nobody else can replace is used, known or not.
    alone = {**held_by(A, B, experts=7), 7: [newcomers[0]]}
    assert router.choose(0, SLICES, alone, NOW, {A}, is_retry=True) == {B: list(range(7)), newcomers[0]: [7]}
