"""``bench sim``: one scenario from its start to its figures."""

from __future__ import annotations

import gc
import time
from typing import Any

import psutil

from daaswarm.sim.scenario import Scenario, scale
from daaswarm.sim.wires import get_idle_bytes_s
from daaswarm.sim.world import Progress, World

GROWTH = ("nodes", "hops_p50", "hops_p99", "record_hops_p50", "record_hops_p99", "lookup_requests_mean")


def run_simulation(scenario: Scenario, progress: Progress) -> tuple[dict[str, Any], World]:
    """The figures, and the world as it is at the end. Keys that hold ``wall``, ``rss`` or ``events_per_s`` are of this
    machine; all others depend on the scenario alone."""
    started = time.perf_counter()
    was_enabled = gc.isenabled()
    gc.disable()  # a swarm is millions of objects, none of them garbage; looking for some takes half of the time
    try:
        world = World(scenario)
        world.populate()
        warm_s = time.perf_counter() - started
        process, peak = psutil.Process(), 0

        def note(done: float, total: float) -> None:
            nonlocal peak
            peak = max(peak, process.memory_info().rss)
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


def run_growth(scenario: Scenario, sizes: list[int], progress: Progress) -> list[dict[str, Any]]:
    """How lookups grow: the same scenario at each of ``sizes`` nodes, with users and experts in proportion."""
    rows: list[dict[str, Any]] = []
    for nodes in sizes:
        result, _ = run_simulation(scale(scenario, nodes), progress)
        rows.append({name: result[name] for name in GROWTH})
    return rows


def summarise(world: World) -> dict[str, Any]:
    """The figures of a run, without those of the machine."""
    scenario, figures, carrier = world.scenario, world.figures, world.carrier
    served = [before + node.served for before, node in zip(world.served, world.slots, strict=True) if node.liar is None]
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
        "messages": dict(sorted(carrier.by_kind.items())),
        "dialled": world.wires.dialled,
        "events": world.heap.events,
        **({"healing": healing} if (healing := world.healing.summarise()) else {}),
    }
