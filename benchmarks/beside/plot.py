"""The figures as a picture: for each scenario its targets' ratios, and the times and rates of all libraries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.beside.figures import LIBRARIES, Figure, Figures, Verdict

WIDTH_INCHES, ROW_INCHES, HEAD_INCHES = 11, 0.3, 1.0
DPI = 120
COLORS = {"daaswarm": "#2a6f97", "hivemind": "#e07a1f", "floor": "#8d99ae"}
APART = 0.22  # of a row, between two libraries
UNITS = {
    "p50_ms": "P50, ms",
    "p99_ms": "P99, ms",
    "calls_per_s": "calls a second",
    "rows_per_s": "rows a second",
    "ready_s": "start to ready, s",
    "pss_mb": "PSS, MB",
    "import_s": "import, s",
}
"""Metrics that are drawn. All on a logarithmic scale: the libraries are orders of magnitude apart."""


def is_possible() -> bool:
    """Whether matplotlib is installed: asked before a long run, not after it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def draw(path: Path, scenarios: Mapping[str, Figures], verdicts: Sequence[Verdict], title: str) -> None:
    """One PNG: a panel for each scenario and metric, points (medians) and whiskers (min, max); then the targets."""
    from matplotlib.figure import Figure as Picture  # not pyplot: it looks for a window system

    panels = [
        (name, metric, cases)
        for name, figures in scenarios.items()
        for metric in UNITS
        if (cases := list(dict.fromkeys(f.case for f in figures.get_all() if f.metric == metric)))
    ]
    rows = [len(cases) * 2 for _, _, cases in panels] + [max(len(verdicts), 1)]
    height = sum(rows) * ROW_INCHES + (len(rows) + 1) * HEAD_INCHES
    picture = Picture(figsize=(WIDTH_INCHES, height), dpi=DPI, layout="constrained")
    picture.suptitle(title, fontsize=9)
    axes: Any = picture.subplots(
        len(rows), 1, squeeze=False, height_ratios=[n + HEAD_INCHES / ROW_INCHES for n in rows]
    )
    for (name, metric, cases), panel in zip(panels, axes[:-1, 0], strict=True):
        _draw_figures(panel, scenarios[name], metric, cases)
        panel.set_title(f"{name}: {UNITS[metric]}", fontsize=10, loc="left")
    _draw_targets(axes[-1, 0], verdicts)
    picture.savefig(path)


def _draw_figures(axes: Any, figures: Figures, metric: str, cases: Sequence[str]) -> None:
    for number, library in enumerate(LIBRARIES):
        found = [(at, figures.get_spread(Figure(library, case, metric))) for at, case in enumerate(cases)]
        spreads = [(at, spread) for at, spread in found if spread is not None and spread.low > 0]
        if not spreads:
            continue
        axes.errorbar(
            [spread.median for _, spread in spreads],
            [at + (number - 1) * APART for at, _ in spreads],
            xerr=[[s.median - s.low for _, s in spreads], [s.high - s.median for _, s in spreads]],
            fmt="o",
            color=COLORS[library],
            label=library,
            capsize=2,
        )
    _set_scales(axes, cases)
    axes.legend(fontsize=7, loc="best")


def _draw_targets(axes: Any, verdicts: Sequence[Verdict]) -> None:
    """How many times better than its limit each is: right of 1 is met."""
    shown = [v for v in verdicts if v.spread is not None and v.target.limit and v.spread.low > 0]
    for at, (target, spread, met) in enumerate(shown):
        assert spread is not None
        times = [value / target.limit if target.at_least else target.limit / value for value in spread]
        middle, low, high = times[1], min(times), max(times)
        color = "#4c956c" if met else "#c1121f"
        axes.errorbar(middle, at, xerr=[[middle - low], [high - middle]], fmt="o", color=color, capsize=2, ms=4)
    axes.axvline(1, color="black", lw=1)
    _set_scales(axes, [verdict.target.text for verdict in shown])
    axes.set_title("targets: times better than asked (right of the line: met)", fontsize=10, loc="left")


def _set_scales(axes: Any, names: Sequence[str]) -> None:
    """A row for each name, the first on top; plain numbers at 1, 2 and 5 of each power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
