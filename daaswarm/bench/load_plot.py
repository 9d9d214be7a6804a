"""The picture of ``bench load``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from daaswarm.errors import ConfigError

SIZE_INCHES = (11, 7)
DPI = 120


def draw(path: Path, result: dict[str, Any]) -> None:
    """Throughput, times, fairness and memory by load, as a PNG.

    Raises:
        ConfigError: ``path`` can't be written.
    """
    from matplotlib.figure import Figure  # not pyplot: it looks for a window system

    steps: list[dict[str, Any]] = result["steps"]
    at = [step["load"] for step in steps]
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    top, bottom = figure.subplots(2, 2)
    top[0].set_title("calls a second")
    top[0].plot(at, [step["asked_per_s"] for step in steps], marker="o", label="asked")
    top[0].plot(at, [step["served_per_s"] for step in steps], marker="o", label="served")
    top[1].set_title("time, ms")
    for name, metric in {"an answer": "answer", "busy": "busy"}.items():
        for percent in (50, 99):
            times = [step[f"{metric}_p{percent}_ms"] for step in steps]
            known = [(load, time) for load, time in zip(at, times, strict=True) if time is not None]
            if known:
                top[1].plot(*zip(*known, strict=True), marker="o", label=f"{name}, P{percent}")
    top[1].set_yscale("log")
    bottom[0].set_title("served, by caller (the first asks for half of all)")
    for number, served in enumerate(zip(*(step["served_by_caller"] for step in steps), strict=True), 1):
        bottom[0].plot(at, served, marker="o", label=f"{number}")
    bottom[1].set_title("the host's memory, MiB")
    bottom[1].plot(range(len(result["rss_mib"])), result["rss_mib"])
    bottom[1].set_xlabel("seconds")
    for axes in (*top, bottom[0]):
        axes.set_xlabel("load over capacity")
        axes.legend()
    for axes in (top[0], *bottom):
        axes.set_ylim(bottom=0)
    for axes in (*top, *bottom):
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}", hint="choose another --plot") from error
