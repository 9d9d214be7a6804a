"""Scenarios 1 and 2: one remote expert, called by one and by many."""

from __future__ import annotations

from benchmarks.beside.figures import FLOOR, OURS, THEIRS, Figure, Figures, Target
from benchmarks.beside.running import Options, run_hivemind, run_json, run_ours

DIM = 576
METRICS = ("p50_ms", "p99_ms", "calls_per_s", "rows_per_s")
IDENTITY_CELLS = ((1, 1), (1, 64))  # rows, callers
FFN_CELLS = ((1, 1), (128, 1), (128, 64))


def name(kind: str, rows: int, callers: int) -> str:
    what = {"nop": "identity", "ffn": "FFN"}[kind]
    return f"{what}, {rows} row{'s' * (rows > 1)}, {callers} caller{'s' * (callers > 1)}"


def _of(library: str, kind: str, rows: int, callers: int, metric: str) -> Figure:
    return Figure(library, name(kind, rows, callers), metric)


def _against(text: str, kind: str, cell: tuple[int, int], metric: str, limit: float, other: str) -> Target:
    figure, over = (_of(library, kind, *cell, metric) for library in (OURS, other))
    return Target(text, figure, limit, over, at_least=metric != "p50_ms")


IDENTITY_TARGETS = (
    _against("1: identity, 1 caller, P50 over hivemind's", "nop", (1, 1), "p50_ms", 1 / 10, THEIRS),
    _against("1: identity, 1 caller, P50 over a raw TCP echo", "nop", (1, 1), "p50_ms", 5, FLOOR),
    _against("1: identity, 64 callers, calls/s over hivemind's", "nop", (1, 64), "calls_per_s", 10, THEIRS),
    Target("1: identity, 64 callers, calls/s", _of(OURS, "nop", 1, 64, "calls_per_s"), 5_000, at_least=True),
)
FFN_TARGETS = (
    _against("2: FFN, 1 row, P50 over hivemind's", "ffn", (1, 1), "p50_ms", 1 / 8, THEIRS),
    _against("2: FFN, 128 rows, P50 over torch's", "ffn", (128, 1), "p50_ms", 1.3, FLOOR),
    _against("2: FFN, 128 rows x 64 callers, rows/s over hivemind's", "ffn", (128, 64), "rows_per_s", 3, THEIRS),
    _against("2: FFN, 128 rows x 64 callers, rows/s over torch's", "ffn", (128, 64), "rows_per_s", 0.8, FLOOR),
)


def measure_identity(library: str, options: Options, figures: Figures) -> None:
    _measure(library, "nop", IDENTITY_CELLS, options, figures)


def measure_ffn(library: str, options: Options, figures: Figures) -> None:
    _measure(library, "ffn", FFN_CELLS, options, figures)


def _measure(library: str, kind: str, cells: tuple[tuple[int, int], ...], options: Options, figures: Figures) -> None:
    common = ["--dim", f"{DIM}", "--seconds", f"{options.seconds}"]
    if library == OURS:
        for rows, callers in cells:
            load = ["--batch", f"{rows}", "--callers", f"{callers}"]
            done = run_ours(options, "bench", "expert", "--expert", kind, *common, *load)
            figures.add(OURS, name(kind, rows, callers), done)
    elif library == THEIRS:
        wanted = ",".join(f"{rows}x{callers}" for rows, callers in cells)
        for done in run_hivemind(options, "expert.py", "--expert", kind, "--cells", wanted, *common):
            figures.add(THEIRS, name(kind, done["batch"], done["callers"]), done)
    else:
        _measure_floor(kind, cells, options, figures)


def _measure_floor(kind: str, cells: tuple[tuple[int, int], ...], options: Options, figures: Figures) -> None:
    """Of many callers the floor is what one gets without a pause: the arithmetic has all cores either way."""
    wanted = sorted({rows for rows, _ in cells}) if kind == "ffn" else []
    command = ["-m", "benchmarks.beside.floor", "--dim", f"{DIM}", "--seconds", f"{options.seconds}"]
    command += ["--threads", f"{options.threads}", "--rows", *map(str, wanted)]
    what = "ffn" if kind == "ffn" else "echo"
    found = {done["batch"]: done for done in run_json(options, command) if done["what"] == what}
    for rows, callers in cells:
        metrics = METRICS if callers == 1 else ("rows_per_s",)
        if kind == "ffn" or callers == 1:
            figures.add(FLOOR, name(kind, rows, callers), {metric: found[rows][metric] for metric in metrics})
