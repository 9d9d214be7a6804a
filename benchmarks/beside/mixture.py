"""Scenario 3: twenty experts on ten hosts, four for each row; then 30 % of the hosts crash, or fall silent.

Ours has each expert on four hosts, so that any three may go, and its answers stay whole. hivemind knows no replicas: it
leaves out the experts that don't answer.
"""

from __future__ import annotations

from benchmarks.beside.calls import DIM
from benchmarks.beside.figures import FLOOR, OURS, THEIRS, Figure, Figures, Target
from benchmarks.beside.running import Options, run_hivemind, run_ours

METRICS = ("p50_ms", "p99_ms", "max_ms", "calls_per_s", "failed", "wrong")
HEALTHY, CASES = "20 experts on 10 hosts", {"kill": "3 of them killed", "stop": "3 of them silent"}
BEFORE = "all hosts, before 3 fall silent"  # of the same run, so that the two can be compared
HOSTS, EXPERTS, GRID, K, DEAD = 10, 20, "4x5", 4, 0.3
REPLICAS = 4
HANDLERS = 1  # of each hivemind host: four would be sixty processes more


def _ours(case: str, metric: str) -> Figure:
    return Figure(OURS, case, metric)


TARGETS = (
    Target("3: healthy, P50 over hivemind's", _ours(HEALTHY, "p50_ms"), 1 / 5, Figure(THEIRS, HEALTHY, "p50_ms")),
    Target("3: 30 % killed, failed requests", _ours(CASES["kill"], "failed"), 0),
    Target("3: 30 % silent, failed requests", _ours(CASES["stop"], "failed"), 0),
    Target("3: 30 % silent, P50 over healthy", _ours(CASES["stop"], "p50_ms"), 2, _ours(BEFORE, "p50_ms")),
    Target("3: 30 % silent, P99 over healthy", _ours(CASES["stop"], "p99_ms"), 5, _ours(BEFORE, "p99_ms")),
)


def measure(library: str, options: Options, figures: Figures) -> None:
    """Hosts are started anew for each way to go. The floor has none."""
    if library == FLOOR:
        return
    for how, case in CASES.items():
        common = ["--hosts", f"{HOSTS}", "--k", f"{K}", "--dim", f"{DIM}", "--dead", f"{DEAD}", "--how", how]
        common += ["--seconds", f"{options.seconds}"]
        if library == OURS:
            ours = ["--experts", f"{EXPERTS}", "--replicas", f"{REPLICAS}"]
            done = run_ours(options, "bench", "moe", *ours, *common)
        else:
            [done] = run_hivemind(options, "moe.py", "--grid", GRID, *common, handlers=HANDLERS)
        figures.add(library, HEALTHY if how == "kill" else BEFORE, done["healthy"])
        figures.add(library, case, done["after"])
