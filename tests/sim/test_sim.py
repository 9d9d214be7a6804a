"""What a simulation shows: the same for the same seed, and what is promised of churn, cuts, lies and size."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from nacl.signing import SigningKey

from daaswarm.errors import RemoteProtocolError
from daaswarm.messages import Pointer
from daaswarm.sim.figures import get_percentile
from daaswarm.sim.heap import START, Heap
from daaswarm.sim.notary import Registry, SimNotary
from daaswarm.sim.running import run_growth, run_simulation, shorten
from daaswarm.sim.scenario import Cut, Scenario, Storm, Surge, load_scenario, scale

OF_THIS_MACHINE = ("wall", "rss", "events_per_s")


def run(**settings: Any) -> dict[str, Any]:
    """All figures but those of the machine; afterwards every core is as it should be."""
    figures, world = run_simulation(load_scenario(None, **settings), lambda done, total: None)
    world.validate()
    return {name: value for name, value in figures.items() if not any(part in name for part in OF_THIS_MACHINE)}


def test_the_same_seed_gives_the_same_figures_and_another_seed_others() -> None:
    settings: dict[str, Any] = {"nodes": 60, "minutes": 0.5, "churn": 0.2, "hostile": 0.1, "probes": 30, "loss": 0.02}
    first = msgspec.json.encode(run(seed=7, **settings))
    assert msgspec.json.encode(run(seed=7, **settings)) == first
    assert msgspec.json.encode(run(seed=8, **settings)) != first


def test_lookups_and_calls_succeed_while_a_fifth_of_the_nodes_is_replaced() -> None:
    figures = run(nodes=100, minutes=2, churn=0.2, probes=40)
    assert figures["lookup_success"] >= 0.999 and figures["lookups"] > 50
    assert figures["call_success"] >= 0.99 and figures["calls"] > 1_500
    assert figures["calls_to_silent_hosts"] > 0, "nobody was called who had died"
    assert figures["stale_offers_60_s"] == 0, "who died is offered to nobody a minute later"
    assert figures["misbehaved"] == 0


def test_both_sides_of_a_cut_see_everything_within_a_minute_and_nothing_expired() -> None:
    # Five minutes are less than an advert's 15, so none may be lost; everybody hosts the same, so all see all.
    cut = Cut(at_s=60, for_s=300, share=0.5)
    figures = run(nodes=30, experts=1, users=30, minutes=8, cuts=[cut], probes=20)
    healing = figures["healing"]
    assert healing["healed_after_s"] is not None and healing["healed_after_s"] <= 60
    assert healing["coverage_60_s"] == 1 and healing["expired_wrongly"] == 0


@pytest.mark.parametrize("lie", ["each other", "garbage", "own records", "the dead", "nothing"])
def test_a_fifth_that_lies_hides_nothing(lie: str) -> None:
    figures = run(nodes=100, minutes=0.5, hostile=0.2, lies=[lie], settled=0.0, probes=40)
    assert figures["lookup_success"] >= 0.99 and figures["lookups"] > 50
    assert (figures["misbehaved"] > 0) == (lie == "garbage")


def test_hops_grow_like_the_logarithm() -> None:
    rows = run_growth(load_scenario(None, nodes=1_000, minutes=0.2), lambda done, total: None)
    (small,) = rows
    assert small["nodes"] == 100 and small["hops_p99"] <= 4
    large = run(nodes=400, minutes=0.1, probes=60)
    assert small["hops_p50"] <= large["hops_p50"] <= small["hops_p50"] + 2, "log2(4) more at most"


def test_storms_and_surges_come() -> None:
    calm = run(nodes=40, minutes=1, probes=0)
    storm, surge = Storm(at_s=10, for_s=10, nodes=20), Surge(at_s=0, for_s=60, factor=3)
    wild = run(nodes=40, minutes=1, probes=0, storms=[storm], surges=[surge])
    assert wild["calls"] > 1.5 * calm["calls"] and wild["dialled"] > calm["dialled"]
    assert wild["lookup_success"] == 1


def test_shrunk_and_shortened_scenarios_keep_their_proportions() -> None:
    scenario = Scenario(nodes=10_000, experts=1_000, users=100_000, minutes=10, churn=0.2)
    small = shorten(scale(scenario, 100))
    assert (small.nodes, small.experts, small.users, small.minutes) == (100, 10, 1_000, 2)
    assert small.churn == pytest.approx(0.04)


def test_things_happen_in_order_and_those_of_one_time_as_they_were_planned() -> None:
    heap, seen = Heap(), []

    def note(name: str, _: Any) -> None:
        seen.append((name, heap.now - START))
        if name == "b":
            heap.at(heap.now, note, "soon")

    for when, name in ((5.0, "d"), (0.01, "b"), (0.01, "c"), (0.0, "a"), (70.0, "late")):
        heap.at(START + when, note, name)
    heap.run(START + 5)
    assert [name for name, _ in seen] == ["a", "b", "c", "soon", "d"] and heap.now == START + 5
    heap.run(START + 70)
    assert seen[-1] == ("late", 70.0) and heap.events == 6


def test_a_signature_that_was_never_given_is_refused() -> None:
    registry = Registry()
    keys = [SigningKey(bytes([n]) * 32) for n in (1, 2)]
    honest, liar = (SimNotary(bytes(key.verify_key), registry) for key in keys)
    pointer = Pointer(
        key=bytes(32), peer_id=honest.peer_id, addrs=["/ip4/10.0.0.1/tcp/1"], seq=1, expires_at=START + 60
    )
    signed = honest.seal_pointer(pointer)
    assert honest.open_pointer(signed, START) == pointer
    for forged in (
        msgspec.structs.replace(signed, signature=bytes(64)),
        msgspec.structs.replace(signed, payload=signed.payload + b"x"),
        msgspec.structs.replace(signed, public_key=bytes(keys[1].verify_key)),
        liar.seal_pointer(pointer),  # says that it is somebody else's
    ):
        with pytest.raises(RemoteProtocolError):
            honest.open_pointer(forged, START)
    with pytest.raises(RemoteProtocolError, match="expired"):
        honest.open_pointer(signed, START + 61)
    registry.forget_expired(START + 61)
    assert not len(registry)


def test_percentiles_are_of_the_nearest_rank() -> None:
    assert get_percentile([], 0.5) == 0
    assert get_percentile([1, 2, 3, 4], 0.5) == 2 and get_percentile([1, 2, 3, 4], 0.99) == 4
