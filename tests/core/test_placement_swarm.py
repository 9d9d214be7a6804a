"""Hosts that each place experts for themselves: what comes of it, in a small simulation of a swarm."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from daaswarm.core.placement import LOST_S, REVIEW_S, UNEVEN_S, Change, Placement, choose_experts
from daaswarm.types import ExpertId, PeerId

LAYERS = dict.fromkeys(range(30), 8)
ALL = [ExpertId(layer, e) for layer, count in LAYERS.items() for e in range(count)]
SIZE = 10
MODEL_BYTES = SIZE * len(ALL)
LAG_S = 5.0  # what others did since isn't known yet


class Swarm:
    """Hosts on one clock. Each sees the others as they were :data:`LAG_S` ago."""

    def __init__(self, seed: int) -> None:
        print(f"seed {seed}")
        self.rng = random.Random(seed)
        self.now = 1_700_000_000.0
        self.held: dict[PeerId, set[ExpertId]] = {}
        self.placements: dict[PeerId, Placement] = {}
        self.due: dict[PeerId, float] = {}
        self.past: list[tuple[float, dict[PeerId, frozenset[ExpertId]]]] = [(0.0, {})]
        self.seen: dict[ExpertId, list[PeerId]] = {}
        self.moved = 0

    def start(self, memory: int) -> PeerId:
        peer = PeerId(f"peer-{self.rng.getrandbits(64):016x}")
        counts = Counter(expert for held in self.held.values() for expert in held)
        chosen = choose_experts(LAYERS, lambda layer: SIZE, memory, counts, self.rng)
        self.held[peer] = {ExpertId(layer, e) for layer, experts in chosen.items() for e in experts}
        own = random.Random(self.rng.getrandbits(64))
        self.placements[peer] = Placement(peer, LAYERS, lambda layer: SIZE, memory, own)
        self.due[peer] = self.now + self.placements[peer].get_pause_s()
        self.remember()
        return peer

    def stop(self, peer: PeerId) -> None:
        del self.held[peer], self.placements[peer], self.due[peer]
        self.remember()

    def remember(self) -> None:
        self.past.append((self.now, {peer: frozenset(held) for peer, held in self.held.items()}))

    def look(self) -> dict[ExpertId, list[PeerId]]:
        is_old = bool(self.seen)
        while len(self.past) > 1 and self.past[1][0] <= self.now - LAG_S:
            self.past.pop(0)
            is_old = False
        if not is_old:
            self.seen = {}
            for peer, held in self.past[0][1].items():
                for expert in held:
                    self.seen.setdefault(expert, []).append(peer)
        return self.seen

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.due and min(self.due.values()) <= end:
            peer = min(self.due, key=lambda p: (self.due[p], p))
            self.now = self.due[peer]
            placement = self.placements[peer]
            held: dict[int, list[int]] = {}
            for layer, expert in self.held[peer]:
                held.setdefault(layer, []).append(expert)
            if (change := placement.review(held, self.look(), self.now)) is not None:
                self.change(peer, change)
            self.due[peer] = self.now + placement.get_pause_s()
        self.now = end

    def change(self, peer: PeerId, change: Change) -> None:
        drop = {ExpertId(layer, e) for layer, experts in change.drop.items() for e in experts}
        add = {ExpertId(layer, e) for layer, experts in change.add.items() for e in experts}
        assert drop <= self.held[peer] and add and not add & self.held[peer]
        self.held[peer] = self.held[peer] - drop | add
        assert len(self.held[peer]) * SIZE <= self.placements[peer]._memory_bytes
        self.moved += len(add)
        self.remember()

    @property
    def counts(self) -> list[int]:
        counts = Counter(expert for held in self.held.values() for expert in held)
        return [counts[expert] for expert in ALL]

    @property
    def spread(self) -> int:
        return max(self.counts) - min(self.counts)

    @property
    def placed(self) -> int:
        return sum(map(len, self.held.values()))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("share", [0.2, 0.34, 0.4, 0.5, 1.2])
def test_six_hosts_one_by_one(seed: int, share: float) -> None:
    """Full coverage as soon as memory suffices, replicas even to within one, and a change of hosts moves next to
    nothing."""
    swarm = Swarm(seed)
    memory = int(MODEL_BYTES * share) // SIZE * SIZE
    hosts = []
    for number in range(1, 7):
        hosts.append(swarm.start(memory))
        swarm.run(120)
        assert (min(swarm.counts) >= 1) == (number * memory >= MODEL_BYTES)
        assert swarm.spread <= 1
    if 6 * memory >= 2 * MODEL_BYTES:
        assert min(swarm.counts) >= 2
    swarm.run(3 * UNEVEN_S)
    assert swarm.moved == 0, "what is even stays as it is"
    swarm.stop(hosts[2])
    swarm.run(60)
    swarm.start(memory)
    swarm.run(5 * UNEVEN_S)
    assert swarm.moved < 0.05 * swarm.placed
    assert swarm.spread <= 1 and (min(swarm.counts) >= 1) == (6 * memory >= MODEL_BYTES)


@pytest.mark.parametrize("seed", range(4))
def test_a_host_that_stays_away_is_made_up_for(seed: int) -> None:
    """Lost experts come back within minutes where somebody has a spare one; unevenness goes slowly, and then all is
    quiet."""
    swarm = Swarm(seed)
    hosts = [swarm.start(int(MODEL_BYTES * 0.3) // SIZE * SIZE) for _ in range(6)]  # 1.8 replicas
    for host in hosts[:2]:
        swarm.stop(host)  # 1.2 left
    lost = swarm.counts.count(0)
    swarm.run(4 * LOST_S + 4 * REVIEW_S + 60)
    assert min(swarm.counts) >= 1, f"{lost} were lost"
    swarm.run(6 * UNEVEN_S)
    assert swarm.spread <= 1
    moved = swarm.moved
    swarm.run(4 * 3600)
    assert swarm.moved == moved


@pytest.mark.parametrize("seed", range(2))
def test_fifty_hosts_with_churn(seed: int) -> None:
    """A host is replaced every two minutes for two hours: everything stays covered, few experts move, and when it is
    over the swarm is even and at rest."""
    swarm = Swarm(seed)
    memories = [int(MODEL_BYTES * swarm.rng.choice([0.03, 0.05, 0.1])) // SIZE * SIZE for _ in range(50)]
    for memory in memories:
        swarm.start(memory)
        swarm.run(10)
    # Hosts that start faster than they hear of each other take the same; that is evened out.
    swarm.run(4 * UNEVEN_S)
    assert swarm.spread <= 1 and min(swarm.counts) >= 2
    swarm.moved = 0
    uncovered = 0
    for _ in range(60):
        swarm.stop(swarm.rng.choice(sorted(swarm.held)))
        swarm.run(60)
        swarm.start(swarm.rng.choice(memories))
        swarm.run(60)
        uncovered += min(swarm.counts) == 0
    assert uncovered == 0
    assert swarm.moved < 0.05 * swarm.placed * 60 / 10, "per ten changes of hosts"
    swarm.run(6 * UNEVEN_S)
    assert swarm.spread <= 1
    moved = swarm.moved
    swarm.run(3600)
    assert swarm.moved == moved


def test_the_same_seed_gives_the_same_moves() -> None:
    def play() -> tuple[int, list[list[ExpertId]]]:
        swarm = Swarm(7)
        for _ in range(8):
            swarm.start(int(MODEL_BYTES * 0.3))
        for peer in sorted(swarm.held)[:3]:
            swarm.stop(peer)
        swarm.run(3600)
        return swarm.moved, [sorted(swarm.held[peer]) for peer in sorted(swarm.held)]

    assert play() == play()


def test_two_holders_never_give_up_the_same_expert_at_once() -> None:
    """Two experts have two hosts each and one has none: in the same moment only one of two identical hosts acts on
    each."""
    layers = {0: 3}
    held = {0: [0, 1]}
    holders = {ExpertId(0, 0): ["a", "b"], ExpertId(0, 1): ["a", "b"]}
    ever: list[int] = []
    for start in range(0, 600, 60):
        dropped: list[int] = []
        for name in ("a", "b"):
            placement = Placement(PeerId(name), layers, lambda layer: SIZE, 2 * SIZE, random.Random(0))
            placement.review(held, holders, start)  # type: ignore[arg-type]
            change = placement.review(held, holders, start + 3 * LOST_S)  # type: ignore[arg-type]
            dropped += change.drop[0] if change is not None else []
        assert len(dropped) == len(set(dropped)), start
        ever += dropped
    assert set(ever) == {0, 1}
