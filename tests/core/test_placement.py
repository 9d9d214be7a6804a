"""Placement fills memory with the scarcest experts, in whole layers where it can."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daaswarm.core.placement import choose_experts
from daaswarm.errors import ConfigError
from daaswarm.types import ExpertId

LAYERS = dict.fromkeys(range(30), 8)


def choose(memory: int, live: dict[ExpertId, int] | None = None, seed: int = 0, size: int = 10) -> dict[int, list[int]]:
    return choose_experts(LAYERS, lambda layer: size, memory, live or {}, random.Random(seed))


@given(
    layers=st.dictionaries(st.integers(0, 12), st.integers(0, 6), min_size=1),
    sizes=st.lists(st.integers(1, 9), min_size=13, max_size=13),
    memory=st.integers(0, 300),
    hosts=st.dictionaries(st.tuples(st.integers(0, 12), st.integers(0, 6)), st.integers(0, 3)),
    seed=st.integers(0, 9),
)
def test_memory_is_filled_with_the_scarcest(
    layers: dict[int, int], sizes: list[int], memory: int, hosts: dict[tuple[int, int], int], seed: int
) -> None:
    live = {ExpertId(*key): count for key, count in hosts.items()}
    everything = [ExpertId(layer, e) for layer, count in layers.items() for e in range(count)]
    if not everything or min(sizes[e.layer] for e in everything) > memory:
        with pytest.raises(ConfigError):
            choose_experts(layers, sizes.__getitem__, memory, live, random.Random(seed))
        return
    chosen = choose_experts(layers, sizes.__getitem__, memory, live, random.Random(seed))
    assert chosen == choose_experts(layers, sizes.__getitem__, memory, live, random.Random(seed))
    taken = [ExpertId(layer, e) for layer, experts in chosen.items() for e in experts]
    assert taken == sorted(set(taken)) and set(taken) <= set(everything)
    left = memory - sum(sizes[e.layer] for e in taken)
    assert left >= 0
    for other in set(everything) - set(taken):
        assert sizes[other.layer] > left, "room is left for another expert"
    if len(set(sizes)) == 1:
        rest = set(everything) - set(taken)
        assert max(live.get(e, 0) for e in taken) <= min((live.get(e, 0) for e in rest), default=9)


def test_the_scarcest_go_first() -> None:
    live = {ExpertId(layer, e): 1 for layer in range(30) for e in range(8)}
    for expert in (2, 5):
        live[ExpertId(7, expert)] = 0
    chosen = choose(100, live)
    assert chosen[7][:1] and {2, 5} <= set(chosen[7])
    assert sum(map(len, chosen.values())) == 10


def test_whole_layers_in_a_run_and_hosts_that_start_together_differ() -> None:
    starts = set()
    for seed in range(20):
        chosen = choose(8 * 10 * 5, seed=seed)
        assert all(experts == list(range(8)) for experts in chosen.values()) and len(chosen) == 5
        layers = sorted(chosen)
        gaps = sum((b - a) % 30 != 1 for a, b in zip(layers, [*layers[1:], layers[0]], strict=True))
        assert gaps == 1, "one contiguous run, modulo the number of layers"
        starts.add(tuple(layers))
    assert len(starts) > 5


def test_a_layer_that_fits_whole_goes_before_a_part_of_another() -> None:
    for seed in range(5):
        assert choose_experts({0: 8, 1: 4}, lambda layer: 10, 45, {}, random.Random(seed)) == {1: [0, 1, 2, 3]}


def test_two_hosts_one_after_the_other_cover_everything() -> None:
    half = 15 * 8 * 10
    first = choose(half, seed=1)
    live = {ExpertId(layer, e): 1 for layer, experts in first.items() for e in experts}
    second = choose(half, live, seed=2)
    assert sorted([*first, *second]) == list(range(30))


def test_too_little_memory_names_sizes() -> None:
    with pytest.raises(ConfigError, match=r"12\.6 MB, 4\.0 MB"):
        choose(4_000_000, size=12_600_000)
    with pytest.raises(ConfigError, match="no experts"):
        choose_experts({0: 0}, lambda layer: 1, 100, {}, random.Random(0))
