"""Hedging: the delay is the replica's own 95th percentile, the budget a share of all calls; who is late cools down."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swarm_driver import NOW

from daaswarm.core import hedging
from daaswarm.core.hedging import BURST, DELAY_MIN_S, KEPT, LEAST, SHARE, Hedging
from daaswarm.core.router import COOLDOWN_MAX_S, COOLDOWN_S, LATE_LIMIT, ReplicaRouter
from daaswarm.types import PeerId

A, B, C = PeerId("peer-a"), PeerId("peer-b"), PeerId("peer-c")
ONE = {0: 1}


def make_router(*peers: PeerId, seconds: float = 0.01) -> ReplicaRouter:
    """A router that had many answers of each peer, in 10 ms."""
    router = ReplicaRouter(random.Random(0))
    for peer in peers:
        for _ in range(LEAST):
            router.note_reply(peer, 1, seconds, seconds / 2, 0, NOW)
    return router


def test_the_delay_is_what_19_of_20_calls_take() -> None:
    book = Hedging()
    for number in range(KEPT):
        book.note_latency(A, 1, 0.1 if number % 32 == 7 else 0.01)  # 2 of 64 are slow
    assert book.get_delay_s(A, 1) == 0.01
    for _ in range(6):
        book.note_latency(A, 1, 0.1)
        for _ in range(7):
            book.note_latency(A, 1, 0.01)
    assert book.get_delay_s(A, 1) == 0.1  # 6 to 8 of 64 are
    book.validate()


def test_each_replica_and_size_has_its_own_delay() -> None:
    book = Hedging()
    for _ in range(LEAST):
        book.note_latency(A, 1, 0.01)
        book.note_latency(B, 1, 0.05)
        book.note_latency(A, 512, 0.3)
    assert (book.get_delay_s(A, 1), book.get_delay_s(B, 1), book.get_delay_s(A, 512)) == (0.01, 0.05, 0.3)
    assert book.get_delay_s(C, 1) == 0.05  # of all
    assert book.get_delay_s(C, 100_000) is None


def test_nobody_is_hedged_before_anything_is_known() -> None:
    book = Hedging()
    for _ in range(LEAST - 1):
        book.note_latency(A, 1, 0.01)
        assert book.get_delay_s(A, 1) is None
    book.note_latency(A, 1, 1e-6)
    book.note_latency(B, 1, 1e-6)
    assert book.get_delay_s(A, 1) == 0.01
    for _ in range(2 * KEPT):
        book.note_latency(B, 1, 1e-6)
    assert book.get_delay_s(B, 1) == DELAY_MIN_S


def test_a_call_that_another_replica_answered_first_counts_with_what_it_took_at_least() -> None:
    router = make_router(A, B)
    for _ in range(KEPT):
        router.note_late(A, 1, 0.2, NOW)
    assert router.get_hedge_delay_s(A, 1) == 0.2 and router.get_hedge_delay_s(B, 1) == 0.01


@given(st.lists(st.sampled_from(["call", "hedge", "pair", "busy"]), max_size=300))
@settings(deadline=None)
def test_hedges_stay_a_small_share_of_all_calls(steps: list[str]) -> None:
    book = Hedging()
    for step in steps:
        if step == "call":
            book.note_call()
        elif step == "busy":
            book.note_busy()
        else:
            book.take(2 if step == "pair" else 1)
        book.validate()


def test_when_all_is_slow_the_budget_ends_hedging() -> None:
    book = Hedging()
    calls = 10_000
    for _ in range(calls):
        book.note_call()
        book.take(1)
    assert SHARE * calls <= book.hedges <= SHARE * calls + BURST


def test_where_hosts_refuse_there_are_no_hedges() -> None:
    book = Hedging()
    hedges = 0
    for number in range(1_000):
        book.note_call()
        if number % 8 == 0:
            book.note_busy()
        if number >= 900:  # what was saved up is gone
            hedges += book.take(1)
    assert hedges == 0


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hedging, "TABLE", 50)
    book = Hedging()
    for number in range(100):
        book.note_latency(PeerId(f"peer-{number}"), 1, 0.01)
    book.validate()


# -- in the router -------------------------------------------------------------------------------------------------


def test_a_hedge_goes_to_another_replica_that_answers() -> None:
    router = make_router(A, B, C)
    assert router.hedge(0, ONE, {0: [A, B]}, NOW, {A}) == {B: [0]}
    assert router.hedge(0, ONE, {0: [A]}, NOW, {A}) == {}
    router.note_failure(B, NOW)
    assert router.hedge(0, ONE, {0: [A, B]}, NOW, {A}) == {}
    assert router.hedge(0, ONE, {0: [A, B, C]}, NOW, {A}) == {C: [0]}
    # When it has cooled down it is better than nobody, once.
    later = NOW + 2 * COOLDOWN_S
    assert router.hedge(0, ONE, {0: [A, B, C]}, later, {A}) == {C: [0]}
    assert router.hedge(0, ONE, {0: [A, B]}, later, {A}) == {B: [0]}
    assert router.hedge(0, ONE, {0: [A, B]}, later, {A}) == {}


def test_a_hedge_is_not_split_where_one_replica_has_all_of_it() -> None:
    router = make_router(A, B, C)
    rows = {0: 100, 1: 100}
    assert len(router.choose(0, rows, {0: [B, C], 1: [B, C]}, NOW)) == 2
    assert len(router.hedge(0, rows, {0: [A, B, C], 1: [A, B, C]}, NOW, {A})) == 1
    assert router.hedge(0, rows, {0: [A, B], 1: [A, C]}, NOW, {A}) == {B: [0], C: [1]}
    assert router.hedging.hedges == 3


def test_without_budget_there_is_no_hedge() -> None:
    router = make_router(A, B)
    for _ in range(int(BURST)):
        assert router.hedge(0, ONE, {0: [A, B]}, NOW, {A}) == {B: [0]}
    assert router.hedge(0, ONE, {0: [A, B]}, NOW, {A}) == {}
    for _ in range(11):
        router.note_call()
    assert router.hedge(0, ONE, {0: [A, B]}, NOW, {A}) == {B: [0]}
    assert router.hedge(0, ONE, {0: [A, B]}, NOW, {A}) == {}


def test_who_is_late_twice_in_a_row_is_left_out_at_once() -> None:
    router = make_router(A, seconds=0.005)
    router.note_reply(B, 1, 0.01, 0.005, 0, NOW)
    held = {0: [A, B]}
    assert router.choose(0, ONE, held, NOW) == {A: [0]}
    for _ in range(LATE_LIMIT - 1):
        assert not router.note_late(A, 1, 0.01, NOW)
        assert not router.is_cooling(A, NOW)
    router.note_reply(A, 1, 0.005, 0.002, 0, NOW)  # it lives: counted anew
    for _ in range(LATE_LIMIT - 1):
        assert not router.note_late(A, 1, 0.01, NOW)
    assert router.note_late(A, 1, 0.01, NOW)
    assert router.is_cooling(A, NOW) and router.choose(0, ONE, held, NOW) == {B: [0]}


def test_being_late_once_costs_a_little_trust() -> None:
    router = make_router(A, B)
    before = router.get_estimate_s(A, 1, 1, NOW)
    router.note_late(A, 1, 0.1, NOW)
    assert before < router.get_estimate_s(A, 1, 1, NOW) < 0.1
    assert router.get_estimate_s(B, 1, 1, NOW) == before


def test_after_its_pause_a_failed_replica_is_tried_by_one_call() -> None:
    router = make_router(A, seconds=0.005)
    router.note_reply(B, 1, 0.01, 0.005, 0, NOW)
    held = {0: [A, B]}
    router.note_failure(A, NOW)
    later = NOW + COOLDOWN_S + 0.1
    chosen = [next(iter(router.choose(0, ONE, held, later))) for _ in range(10)]
    assert chosen.count(A) == 1
    router.note_reply(A, 1, 0.005, 0.002, 0, later)
    assert router.choose(0, ONE, held, later) == {A: [0]}


def test_waiting_for_a_silent_replica_takes_a_tenth_of_the_time_at_most() -> None:
    router = make_router(A, B)
    router.note_failure(A, NOW, 2.0)
    assert router.is_cooling(A, NOW + 19.0) and not router.is_cooling(A, NOW + 21.0)
    router.note_failure(B, NOW, 30.0)
    assert router.is_cooling(B, NOW + COOLDOWN_MAX_S - 1) and not router.is_cooling(B, NOW + COOLDOWN_MAX_S + 1)


def test_a_silent_replica_is_tried_ever_more_rarely() -> None:
    """Five minutes with a replica that never answers, ten calls a second: each try costs somebody a delay."""
    router = make_router(A, seconds=0.005)
    router.note_reply(B, 1, 0.01, 0.005, 0, NOW)
    tries = 0
    for number in range(3_000):
        now = NOW + number / 10
        (peer,) = router.choose(0, ONE, {0: [A, B]}, now)
        if peer == A:
            tries += 1
            router.note_late(A, 1, 0.01, now + 0.02)
        else:
            router.note_reply(B, 1, 0.01, 0.005, 0, now + 0.01)
    assert LATE_LIMIT <= tries <= 12
