"""``bench sim``: one scenario from its start to its figures."""

from __future__ import annotations

import gc
import time
from typing import Any

import msgspec
import psutil

from daaswarm.sim.huge_pages import collapse
from daaswarm.sim.scenario import Scenario, scale
from daaswarm.sim.wires import get_idle_bytes_s
from daaswarm.sim.world import Progress, World

GROWTH = ("nodes", "hops_p50", "hops_p99", "record_hops_p50", "record_hops_p99", "lookup_requests_mean")
SMALLEST = 100  # nodes: below this everybody knows everybody
GROWTH_MINUTES = 2.0  # hops need no more
GROWTH_PROBES = 300  # P99 needs some hundreds
GROWN = 1.1  # times the memory in large pages; then what is new goes there too


def run_simulation(scenario: Scenario, progress: Progress) -> tuple[dict[str, Any], World]:
    """The figures, and the world as it is at the end. Keys that hold ``wall``, ``rss`` or ``events_per_s`` are of this
    machine; all others depend on the scenario alone."""
    started = time.perf_counter()
    was_enabled = gc.isenabled()
    gc.disable()  # a swarm is millions of objects, none of them garbage; looking for some takes half of the time
    try:
        world = World(scenario)
        world.populate()
        collapse()
        warm_s = time.perf_counter() - started
        process = psutil.Process()
        collapsed = peak = process.memory_info().rss

        def note(done: float, total: float) -> None:
            nonlocal collapsed, peak
            peak = max(peak, process.memory_info().rss)
            if peak > collapsed * GROWN:
                collapse()
                collapsed = peak
            progress(done, total)

        world.run(note)
    finally:
        if was_enabled:
            gc.enable()
    wall_s = time.perf_counter() - started
    return summarise(world) | {
        "wall_warm_s": round(warm_s, 2),
        "wall_s": round(wall_s, 2),
        "rss_bytes": peak,
        "events_per_s": round(world.heap.events / max(wall_s - warm_s, 1e-9)),
    }, world


def run_growth(scenario: Scenario, progress: Progress) -> list[dict[str, Any]]:
    """How lookups grow: the same scenario with a hundredth and a tenth of the nodes, users and experts, where that are
    :data:`SMALLEST` nodes or more; for :data:`GROWTH_MINUTES` at most, and with :data:`GROWTH_PROBES` lookups."""
    sizes = [scenario.nodes // part for part in (100, 10) if scenario.nodes // part >= SMALLEST]
    return [pick_growth(run_simulation(shorten(scale(scenario, nodes)), progress)[0]) for nodes in sizes]


def pick_growth(result: dict[str, Any]) -> dict[str, Any]:
    """A row of the table of sizes."""
    return {name: result[name] for name in GROWTH}


def shorten(scenario: Scenario) -> Scenario:
    """The same for a short time, with as many deaths a minute."""
    minutes = min(scenario.minutes, GROWTH_MINUTES)
    churn = scenario.churn * minutes / scenario.minutes
    return msgspec.structs.replace(scenario, minutes=minutes, churn=churn, probes=GROWTH_PROBES)


def summarise(world: World) -> dict[str, Any]:
    """The figures of a run, without those of the machine."""
    scenario, figures, carrier = world.scenario, world.figures, world.carrier
    served = world.get_served()
    mean = sum(served) / len(served)
    node_s = len(world.slots) * scenario.duration_s
    links = world.wires.count_links()
    return {
        "nodes": scenario.nodes,
        "experts": scenario.experts,
        "users": scenario.users,
        "minutes": scenario.minutes,
        "churn": scenario.churn,
        "hostile": scenario.hostile,
        "seed": scenario.seed,
        **figures.summarise(),
        "load_max_over_mean": round(max(served) / mean, 3) if mean else 0.0,
        "bytes_per_node_s": round(carrier.bytes / node_s, 1),
        "bytes_per_node_s_idle_links": round(get_idle_bytes_s(links) / len(world.slots), 1),
        "links_per_node": round(2 * links / len(world.slots), 1),
        "messages_per_node_s": round(carrier.messages / node_s, 3),
        "messages": dict(sorted((kind.__name__, count) for kind, count in carrier.by_kind.items())),
        "dialled": world.wires.dialled,
        "events": world.heap.events,
        **({"healing": healing} if (healing := world.healing.summarise()) else {}),
    }
