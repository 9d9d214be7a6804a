"""Measurements of several libraries in several rounds, as min/median/max, and as ratios within a round."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

OURS, THEIRS, FLOOR = "daaswarm", "hivemind", "floor"
LIBRARIES = (OURS, THEIRS, FLOOR)


class Figure(NamedTuple):
    """One number that a library has in each round: what was done (``case``), and what was measured of it."""

    library: str
    case: str
    metric: str


class Spread(NamedTuple):
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Target:
    """What has to be shown: a figure, or how it compares with another of the same round.

    ``limit``: the most, or with ``at_least`` the least, that the median over the rounds may be.
    """

    text: str
    figure: Figure
    limit: float
    over: Figure | None = None
    at_least: bool = False


class Verdict(NamedTuple):
    """``met`` is ``None`` where nothing was measured."""

    target: Target
    spread: Spread | None
    met: bool | None


@dataclass
class Figures:
    """All that was measured of some ``metrics``: a number, or none, for each figure and round."""

    metrics: Sequence[str]
    rounds: list[dict[Figure, float]] = field(default_factory=list)

    def add(self, library: str, case: str, metrics: dict[str, Any]) -> None:
        """In the latest round. What else was said with them is left out."""
        for metric in self.metrics:
            if metric in metrics:
                self.rounds[-1][Figure(library, case, metric)] = float(metrics[metric])

    def get_all(self) -> list[Figure]:
        """Every figure, in the order of its first measurement."""
        return list(dict.fromkeys(figure for measured in self.rounds for figure in measured))

    def get_spread(self, figure: Figure, over: Figure | None = None) -> Spread | None:
        """Of the rounds that have it; ``None`` if none has."""
        values: list[float] = []
        for measured in self.rounds:
            value = measured.get(figure)
            if value is None:
                continue
            if over is not None:
                beside = measured.get(over)
                if not beside:
                    continue
                value /= beside
            values.append(value)
        return Spread(min(values), statistics.median(values), max(values)) if values else None

    def judge(self, targets: Iterable[Target]) -> list[Verdict]:
        verdicts = []
        for target in targets:
            spread = self.get_spread(target.figure, target.over)
            met = None
            if spread is not None:
                met = spread.median >= target.limit if target.at_least else spread.median <= target.limit
            verdicts.append(Verdict(target, spread, met))
        return verdicts

    def to_json(self, targets: Iterable[Target]) -> dict[str, Any]:
        """Everything, as plain objects."""
        return {
            "figures": [
                {**figure._asdict(), **_round(self.get_spread(figure)), "rounds": self._get_rounds(figure)}
                for figure in self.get_all()
            ],
            "targets": [
                {
                    "text": verdict.target.text,
                    "limit": verdict.target.limit,
                    "at_least": verdict.target.at_least,
                    "met": verdict.met,
                    **_round(verdict.spread),
                }
                for verdict in self.judge(targets)
            ],
        }

    def _get_rounds(self, figure: Figure) -> list[float | None]:
        return [measured.get(figure) for measured in self.rounds]


def _round(spread: Spread | None) -> dict[str, float | None]:
    names = ("min", "median", "max")
    if spread is None:
        return dict.fromkeys(names)
    return {name: float(f"{value:.5g}") for name, value in zip(names, spread, strict=True)}


def format_spread(spread: Spread | None) -> str:
    return "–" if spread is None else " / ".join(format_number(value) for value in spread)


def format_number(value: float) -> str:
    """Three digits at least, and none behind the point of a thousand or more."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def format_figures(figures: Figures) -> str:
    """A table: a line for each case and metric, a column for each library, and our median over theirs."""
    head = ("case", "metric", *LIBRARIES, "ours / hivemind", "ours / floor")
    rows: list[tuple[str, ...]] = []
    for case, metric in dict.fromkeys((figure.case, figure.metric) for figure in figures.get_all()):
        ours = Figure(OURS, case, metric)
        spreads = [figures.get_spread(Figure(library, case, metric)) for library in LIBRARIES]
        ratios = [figures.get_spread(ours, Figure(library, case, metric)) for library in (THEIRS, FLOOR)]
        rows.append((case, metric, *map(format_spread, spreads + ratios)))
    return format_table(head, rows)


def format_verdicts(verdicts: Iterable[Verdict]) -> str:
    """A table of what has to be shown, what was measured, and whether that is enough."""
    rows = []
    for target, spread, met in verdicts:
        limit = f"{'>=' if target.at_least else '<='} {format_number(target.limit)}"
        rows.append((target.text, limit, format_spread(spread), {True: "met", False: "MISSED", None: "–"}[met]))
    return format_table(("target", "limit", "min / median / max", ""), rows)


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
