"""What a plan computes from figures: by hand where it can be, and by what must hold where it can't."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daaswarm.core.estimate import (
    FRAME_BYTES,
    USABLE_TOKENS_PER_S,
    Here,
    Peer,
    Shape,
    compute_pipeline,
    compute_sharded,
    compute_whole,
    estimate,
    place,
)
from daaswarm.core.router import EXTRA_PEER_S

DENSE = Shape(
    kind="dense", layers=dict.fromkeys(range(30), 8), expert_bytes=dict.fromkeys(range(30), 1_000_000),
    trunk_bytes=200_000_000, hidden=576, item_bytes=4, chosen=8, prompt_tokens=128,
)  # fmt: skip
MIXTURE = Shape(
    kind="moe", layers=dict.fromkeys(range(16), 64), expert_bytes=dict.fromkeys(range(16), 1_000_000),
    trunk_bytes=200_000_000, hidden=2048, item_bytes=4, chosen=8, prompt_tokens=128,
)  # fmt: skip


def make_here(memory: int = 1_000_000_000) -> Here:
    return Here(trunk_token_s=0.02, trunk_prefill_s=0.1, layer_token_s=0.001, layer_prefill_s=0.01, memory_bytes=memory)


def make_peer(name: str, rtt_s: float, *layers: int, shape: Shape = DENSE, slower: float = 1.0) -> Peer:
    held = {layer: list(range(shape.layers[layer])) for layer in layers}
    return Peer(
        name=name, round_s=rtt_s, layer_token_s=0.001 * slower, layer_prefill_s=0.01 * slower, held=held or None,
        memory_bytes=None if held else 400_000_000,
    )  # fmt: skip


def halves(rtt_s: float) -> list[Peer]:
    return [make_peer("a", rtt_s, *range(15)), make_peer("b", rtt_s, *range(15, 30))]


def test_two_halves_by_hand() -> None:
    found = estimate(DENSE, make_here(), halves(0.0005))
    sharded = found.get("sharded")
    assert sharded.token_s == pytest.approx(0.02 + 30 * (0.0005 + 0.001))
    assert sharded.prefill_s == pytest.approx(0.1 + 30 * (0.0005 + 0.01))
    assert sharded.waiting_s == pytest.approx(30 * 0.0005)
    assert sharded.rounds_per_token == sharded.rounds_per_prefill == 30
    assert sharded.bytes_per_token == 30 * (576 * 8 + FRAME_BYTES)
    assert sharded.bytes_per_prefill == 30 * (128 * 576 * 8 + FRAME_BYTES)
    assert found.get("whole").token_s == pytest.approx(0.02 + 30 * 0.001)
    assert [fit.used for fit in found.fits] == [120, 120]


def test_it_says_no_at_fifty_milliseconds_and_yes_where_it_has_to() -> None:
    small = make_here(memory=300_000_000)  # holds the trunk, not the experts
    near, far = estimate(DENSE, small, halves(0.0005)), estimate(DENSE, small, halves(0.05))
    assert near.verdict.split and near.verdict.way == "sharded" and near.verdict.number > USABLE_TOKENS_PER_S
    assert not far.verdict.split and far.verdict.way == "none"
    assert far.verdict.number == pytest.approx(1500) and far.verdict.unit == "ms of waiting a token"
    for rtt_s in (0.0005, 0.05):  # where it fits here, waiting only adds
        verdict = estimate(DENSE, make_here(), halves(rtt_s)).verdict
        assert verdict.way == "whole" and not verdict.split


def test_hosts_that_are_quicker_than_the_wait_are_worth_it() -> None:
    peers = [make_peer("gpu", 0.0001, *range(30), slower=0.1)]
    verdict = estimate(DENSE, make_here(), peers).verdict
    assert verdict.way == "sharded" and "whole on this machine" in verdict.text


def test_what_is_missing_is_said() -> None:
    found = estimate(DENSE, make_here(memory=300_000_000), [make_peer("a", 0.001, *range(15))])
    assert not found.get("sharded").is_possible and "120 of 240 slices" in found.get("sharded").note
    assert found.verdict.way == "none" and "240" in found.verdict.text
    tiny = estimate(DENSE, make_here(memory=1), halves(0.001))
    assert "requester's part" in tiny.get("sharded").note


def test_a_layer_takes_as_long_as_its_slowest_host() -> None:
    held = [{layer: list(range(4)) for layer in range(30)}, {layer: list(range(4, 8)) for layer in range(30)}]
    peers = [make_peer("a", 0.001), make_peer("b", 0.004)]
    option = compute_sharded(DENSE, make_here(), peers, held)
    assert option.token_s == pytest.approx(0.02 + 30 * (0.004 + 0.5 * 0.001 + EXTRA_PEER_S))


def test_of_a_mixture_only_what_is_chosen_travels() -> None:
    one = compute_sharded(MIXTURE, make_here(), [make_peer("a", 0.001)], [{n: list(range(64)) for n in range(16)}])
    assert one.bytes_per_token == 16 * (2048 * 8 + FRAME_BYTES + 8 * 12)
    two = compute_sharded(
        MIXTURE,
        make_here(),
        [make_peer("a", 0.001), make_peer("b", 0.001)],
        [{n: list(range(32)) for n in range(16)}, {n: list(range(32, 64)) for n in range(16)}],
    )
    assert one.bytes_per_token < two.bytes_per_token <= 2 * one.bytes_per_token


def test_a_pipeline_waits_once_a_stage() -> None:
    peers = [make_peer("a", 0.05), make_peer("b", 0.05)]  # 400 MB each: 440 MB are needed
    option = compute_pipeline(DENSE, make_here(), peers)
    assert option.is_possible and "2 stages" in option.note
    assert option.waiting_s == pytest.approx(0.075)
    assert option.token_s == pytest.approx(0.02 + 30 * 0.001 + 0.075)
    assert not compute_pipeline(DENSE, make_here(), peers[:1]).is_possible


def test_an_ensemble_takes_two_whole_models() -> None:
    able = Peer(name="a", round_s=0.05, layer_token_s=0.002, layer_prefill_s=0.02, memory_bytes=10**9)
    found = estimate(DENSE, make_here(), [able]).get("ensemble")
    assert found.is_possible and found.token_s == pytest.approx(2 * (0.02 + 30 * 0.001))
    assert not estimate(DENSE, make_here(), []).get("ensemble").is_possible


@given(
    memories=st.lists(st.integers(0, 300), max_size=6),
    rtts=st.lists(st.floats(0, 0.2), min_size=6, max_size=6),
    memory=st.integers(1, 600),
)
def test_every_expert_has_one_place_and_memory_is_kept(memories: list[int], rtts: list[float], memory: int) -> None:
    peers = [
        Peer(name=str(i), round_s=rtts[i], layer_token_s=0.001, layer_prefill_s=0.01, memory_bytes=size * 1_000_000)
        for i, size in enumerate(memories)
    ]
    held = place(DENSE, peers)
    used = [sum(map(len, part.values())) for part in held]
    assert all(count <= size for count, size in zip(used, memories, strict=True))
    assert sum(used) == min(240, sum(memories))
    here = make_here(memory * 1_000_000)
    found = estimate(DENSE, here, peers)
    assert found == estimate(DENSE, here, peers)
    assert found.get("sharded").is_possible == (sum(used) == 240 and memory >= 200)
    assert compute_whole(DENSE, here).is_possible == (memory >= 440)
    assert found.verdict.split == (found.verdict.way == "sharded")
