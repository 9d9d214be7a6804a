"""``daaswarm bench sim``: a swarm of any size on one machine, in simulated time."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated, Any

import trio
import typer

from daaswarm.cli.options import JsonOption
from daaswarm.cli.output import Output
from daaswarm.cli.run import run_to_end
from daaswarm.config import Config
from daaswarm.sim.scenario import NODES, USERS

MEANINGS = {
    "lookup_success": "lookups of an expert that found a live host of it",
    "hops": "requests one after the other to whoever is nearest, P50 / P99",
    "stale_answers": "lookups that named a host that is gone",
    "call": "calls, from asking to the answer, ms, P50 / P95 / P99",
    "load_max_over_mean": "calls of the busiest node beside the mean",
    "bytes_per_node_s": "sent by each node a second, without idle links",
}


class _Stopped(Exception):
    """The command ended while the simulation ran."""


def simulate(
    scenario: Annotated[Path | None, typer.Argument(help="TOML file; docs/how-to/simulate-a-swarm.md")] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=2, max=NODES, help="How many nodes.")] = None,
    experts: Annotated[
        int | None, typer.Option("--experts", min=1, max=NODES, help="Spread evenly over the nodes.")
    ] = None,
    users: Annotated[int | None, typer.Option("--users", min=0, max=USERS, help="Each calls once a minute.")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", min=0.01, max=1_440, help="Simulated time.")] = None,
    churn: Annotated[float | None, typer.Option("--churn", min=0, help="Share of the nodes replaced.")] = None,
    hostile: Annotated[float | None, typer.Option("--hostile", min=0, max=0.9, help="Share that lies.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="The same seed, the same result.")] = None,
    growth: Annotated[
        bool, typer.Option("--growth/--no-growth", help="Also run a hundredth and a tenth of it, for hops by size.")
    ] = True,
    plots: Annotated[Path | None, typer.Option("--plots", help="Folder for PNGs of latency, hops and load.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Thousands of nodes with the very core of a real one, in simulated time.

    Example: daaswarm bench sim --nodes 500 --users 2000 --minutes 2
    """
    from daaswarm.sim.plots import check_plots, draw
    from daaswarm.sim.running import pick_growth, run_growth, run_simulation
    from daaswarm.sim.scenario import load_scenario

    output = Output(as_json=as_json)
    wanted = load_scenario(
        scenario,
        nodes=nodes,
        experts=experts,
        users=users,
        minutes=minutes,
        churn=churn,
        hostile=hostile,
        seed=seed,
    )
    if plots is not None:
        check_plots()
    result: dict[str, Any] = {}
    stop = threading.Event()

    def note(done: float, total: float) -> None:
        if stop.is_set():
            raise _Stopped
        output.progress("simulating", int(done * 10), int(total * 10))

    def run() -> None:
        try:
            rows = run_growth(wanted, note) if growth else []
            figures, world = run_simulation(wanted, note)
            rows.append(pick_growth(figures))
            result.update(figures, growth=rows)
            if plots is not None:
                drawn = draw(plots, world.figures.series, world.get_served(), rows)
                result["plots"] = [str(path) for path in drawn]
        except _Stopped:
            return

    async def command() -> None:
        output.progress("simulating", 0, 1)
        try:
            await trio.to_thread.run_sync(run, abandon_on_cancel=True)
        finally:
            stop.set()

    run_to_end(command, Config(), output)
    if as_json:
        output.json(result)
    else:
        _show(output, result)


def _show(output: Output, result: dict[str, Any]) -> None:
    growth: list[dict[str, Any]] = result.pop("growth")
    shown = dict(result)
    joined = {
        "hops": [shown.pop(f"hops_p{p}") for p in (50, 99)],
        "call": [shown.pop(f"call_p{p}_ms") for p in (50, 95, 99)],
    }
    texts = {name: " / ".join(f"{value}" for value in values) for name, values in joined.items()}
    texts |= {name: str(shown.pop(name)) for name in MEANINGS if name in shown}
    output.table(("figure", "value", "what it is"), [(name, texts[name], MEANINGS[name]) for name in MEANINGS])
    output.result("")
    output.rows((name, _describe(value)) for name, value in shown.items())
    if len(growth) > 1:
        output.result("")
        output.table(list(growth[0]), [[f"{value}" for value in row.values()] for row in growth])


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"
