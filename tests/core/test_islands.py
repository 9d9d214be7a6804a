"""Round trips and bandwidths told apart from service, islands that hold still, and who is asked first."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daaswarm.core.islands import (
    BELIEVED_SERVICE,
    LEFT_S,
    NEAR_S,
    WINDOW_S,
    Links,
    choose_preferred,
    find_islands,
)
from daaswarm.core.marks import get_mark
from daaswarm.core.router import EXPLORE_EVERY, ReplicaRouter
from daaswarm.types import ExpertId, PeerId

A, B, C, D = (PeerId(name) for name in "abcd")


@given(
    rtt_ms=st.floats(0.05, 300),
    mb_per_s=st.floats(1, 2_000),
    service_ms=st.floats(0, 50),
    seed=st.integers(0, 99),
)
def test_round_trip_bandwidth_and_service_are_told_apart(
    rtt_ms: float, mb_per_s: float, service_ms: float, seed: int
) -> None:
    rng = random.Random(seed)
    links = Links()
    for i in range(60):
        nbytes = (4_000, 2_000_000)[i % 2]
        noise_s = 0.0 if i < 4 else rng.expovariate(1 / 0.002)
        travelled_s = rtt_ms / 1e3 + nbytes / (mb_per_s * 1e6) + noise_s
        # What a peer says of its service is believed up to a share of the whole.
        service_s = min(service_ms / 1e3, travelled_s)
        links.note(A, nbytes, travelled_s + service_s, service_s, 1000.0 + i)
        links.validate()
    link = links.get(A)
    assert link is not None and link.bytes_per_s is not None
    own_s = 4_000 / (mb_per_s * 1e6)
    assert rtt_ms / 1e3 <= link.rtt_s <= rtt_ms / 1e3 + own_s + 1e-6
    beyond_s = 2_000_000 / (mb_per_s * 1e6)
    if beyond_s > rtt_ms / 1e3:  # else it is a lower bound
        assert link.bytes_per_s == pytest.approx(mb_per_s * 1e6, rel=0.05)
    else:
        assert link.bytes_per_s <= mb_per_s * 1e6 * 1.05


def test_a_peer_cannot_talk_itself_near() -> None:
    links = Links()
    for i in range(10):
        links.note(A, 100, 0.2, 0.2, float(i))
        links.note(B, 100, 0.2, 1e9, float(i))
        links.note(C, 100, 0.2, -5.0, float(i))
    for peer, least_s in ((A, 0.2 * (1 - BELIEVED_SERVICE)), (B, 0.2 * (1 - BELIEVED_SERVICE)), (C, 0.2)):
        link = links.get(peer)
        assert link is not None and link.rtt_s == pytest.approx(least_s)
    assert links.get_island() == frozenset()


def test_a_route_that_became_longer_is_noticed_within_two_windows() -> None:
    links = Links()
    links.note(A, 100, 0.001, 0, 0.0)
    for now in range(1, int(2 * WINDOW_S) + 1):
        links.note(A, 100, 0.080, 0, float(now))
    link = links.get(A)
    assert link is not None and link.rtt_s == 0.080 and not links.get_island()


def test_after_a_long_silence_only_the_new_answer_counts() -> None:
    links = Links()
    links.note(A, 100, 0.001, 0, 0.0)
    links.note(A, 100, 0.080, 0, 10 * WINDOW_S)
    link = links.get(A)
    assert link is not None and link.rtt_s == 0.080


def test_who_stands_at_the_edge_is_not_in_and_out() -> None:
    links = Links(peers=4)
    changes, last = 0, False
    for i in range(40):
        edge_s = NEAR_S + (LEFT_S - NEAR_S) * (-0.2 if i % 2 else 0.8)
        links.note(A, 100, edge_s, 0, i * 3 * WINDOW_S)
        changes += (A in links.get_island()) != last
        last = A in links.get_island()
        links.validate()
    assert changes == 1
    links.note(A, 100, LEFT_S * 1.1, 0, 1e6)
    assert not links.get_island()


def test_the_longest_unheard_of_is_forgotten() -> None:
    links = Links(peers=2)
    for i, peer in enumerate((A, B, A, C)):
        links.note(peer, 100, 0.001, 0, float(i))
    assert links.get(B) is None and links.get(A) is not None and links.get(C) is not None
    links.validate()


def test_islands_are_the_same_whatever_order_figures_come_in() -> None:
    own = PeerId("me")
    rtts = {A: 0.001, B: 0.080, C: 0.081, D: 0.030}
    told = {B: [C], C: [B], D: [A, D], A: [D]}
    expected = [[own, A], [D], [B, C]]
    for seed in range(5):
        peers = list(rtts)
        random.Random(seed).shuffle(peers)
        shuffled = {peer: rtts[peer] for peer in peers}
        assert find_islands(own, {A}, shuffled, {p: told[p] for p in peers}) == expected
    # What others say moves nobody into this node's island, nor out of it.
    assert find_islands(own, {A}, rtts, {B: [own, A], D: [own, A]})[0] == [own, A]


def test_what_peers_tell_places_them_beside_each_other() -> None:
    links = Links()
    for peer, rtt_s in ((A, 0.001), (B, 0.08), (C, 0.081), (D, 0.03)):
        links.note(peer, 100, rtt_s, 0, 0.0)
    links.note_told(B, [get_mark(C), get_mark(A), *range(200)])
    links.note_told(PeerId("stranger"), [get_mark(B)])
    links.validate()
    assert links.find_islands(PeerId("me")) == [["me", A], [D], [B, C]]


LAYERS = {0: 2, 1: 2}


def hold(*wholes: PeerId, **parts: dict[int, list[int]]) -> dict[ExpertId, list[PeerId]]:
    holders: dict[ExpertId, list[PeerId]] = {}
    for layer, count in LAYERS.items():
        for expert in range(count):
            holders[ExpertId(layer, expert)] = [
                *wholes,
                *(PeerId(name) for name, held in parts.items() if expert in held.get(layer, ())),
            ]
    return holders


def test_the_island_is_preferred_only_if_it_holds_the_whole_model() -> None:
    halves = hold(C, a={0: [0, 1]}, b={1: [0, 1]})
    assert choose_preferred(LAYERS, halves, {A, B, D}) == {A, B}
    assert choose_preferred(LAYERS, halves, {A, D}) == frozenset()
    assert choose_preferred(LAYERS, halves, {C}) == {C}
    assert choose_preferred(LAYERS, {}, {A, B}) == frozenset()


def warm(router: ReplicaRouter, figures: dict[PeerId, float]) -> None:
    for _ in range(20):
        for peer, elapsed_s in figures.items():
            router.note_reply(peer, 1, elapsed_s, 0.0, 0, 1.0)


def test_sharded_calls_stay_on_the_island_even_if_a_far_host_is_as_quick() -> None:
    router = ReplicaRouter(random.Random(0))
    warm(router, {A: 0.003, B: 0.003, C: 0.001})
    candidates = {0: [A, C], 1: [B, C]}
    preferred = frozenset({A, B})
    for _ in range(4 * EXPLORE_EVERY):
        plan = router.choose(0, {0: 1, 1: 1}, candidates, 1.0, preferred=preferred)
        assert C not in plan
    assert set(router.choose(0, {0: 1, 1: 1}, candidates, 1.0)) == {C}, "else the fastest"


def test_off_the_island_where_nobody_on_it_can() -> None:
    router = ReplicaRouter(random.Random(0))
    warm(router, {A: 0.001, B: 0.001, C: 0.050})
    candidates = {0: [A, C], 1: [B, C]}
    preferred = frozenset({A, B})
    assert router.choose(0, {0: 1, 1: 1}, candidates, 1.0, {A}, preferred=preferred) == {C: [0], B: [1]}
    router.note_failure(A, 1.0)  # it cools down
    assert router.choose(0, {0: 1, 1: 1}, candidates, 1.1, preferred=preferred) == {C: [0], B: [1]}
    # An expert that is not held on the island, though the others are.
    assert router.choose(0, {0: 1}, {0: [C]}, 1.1, preferred=preferred) == {C: [0]}


def test_exploring_stays_on_the_island() -> None:
    router = ReplicaRouter(random.Random(0))
    warm(router, {A: 0.001, B: 0.0015, C: 0.0012})
    asked = set()
    for _ in range(4 * EXPLORE_EVERY):
        asked |= set(router.choose(0, {0: 1}, {0: [A, B, C]}, 1.0, preferred=frozenset({A, B})))
    assert asked == {A, B}
