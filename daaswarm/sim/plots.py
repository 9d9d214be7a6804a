"""Pictures of a run, by matplotlib if it's installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from daaswarm.errors import ConfigError

SIZE_INCHES = (8, 4.5)
DPI = 120
FEW = 20  # points are marked one by one: a line through a single one is invisible


def check_plots() -> None:
    """Before a long run, not after it.

    Raises:
        ConfigError: matplotlib isn't installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plots needs matplotlib", hint='pip install "daaswarm[plots]"') from error


def draw(
    folder: Path, series: Sequence[dict[str, float]], served: Sequence[int], growth: Sequence[dict[str, Any]]
) -> list[Path]:
    """Writes latency.png, hops.png and load.png, and returns where.

    Args:
        series: the figures of every ten seconds.
        served: calls that each node computed.
        growth: hops by number of nodes; drawn if there are several.

    Raises:
        ConfigError: ``folder`` can't be written.
    """
    minutes = [step["at_s"] / 60 for step in series]
    latency = {f"P{p}": [step[f"p{p}_ms"] for step in series] for p in (50, 99)}
    if len(growth) > 1:
        sizes = [row["nodes"] for row in growth]
        hops = {f"P{p}": [row[f"hops_p{p}"] for row in growth] for p in (50, 99)}
        hops_of, hops_at = "nodes", sizes
    else:
        hops = {f"P{p}": [step[f"hops_p{p}"] for step in series] for p in (50, 99)}
        hops_of, hops_at = "minutes", minutes
    load = {"calls": sorted(served, reverse=True)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [
            _draw(folder / "latency.png", "calls to known hosts", "minutes", "ms", minutes, latency),
            _draw(folder / "hops.png", "lookups", hops_of, "hops", hops_at, hops, log=hops_of == "nodes"),
            _draw(folder / "load.png", "load", "nodes, the busiest first", "calls computed", range(len(served)), load),
        ]
    except OSError as error:
        raise ConfigError(f"{folder} can't be written: {error.strerror}", hint="choose another --plots") from error


def _draw(
    path: Path, title: str, x: str, y: str, at: Sequence[float], lines: dict[str, list[Any]], *, log: bool = False
) -> Path:
    from matplotlib.figure import Figure  # not pyplot: it looks for a window system

    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x, ylabel=y)
    for name, values in lines.items():
        axes.plot(list(at), values, label=name, marker="o" if log or len(at) < FEW else "")
    if log:
        axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    figure.savefig(path)
    return path
