"""``daaswarm bench load``: a host that is asked for more than it can compute."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import msgspec
import trio
import typer

from daaswarm.cli.options import DataDirOption, JsonOption, open_data_dir, read_config
from daaswarm.cli.output import Output
from daaswarm.cli.run import run_async, run_to_end, show
from daaswarm.config import Config
from daaswarm.errors import ConfigError
from daaswarm.messages import Contact

ROWS = 4_096  # of a call; what a host takes
DIM = 8_192  # the expert's weights take 2 GiB
CALLERS = 64  # processes of 200 MB each

DimOption = Annotated[
    int, typer.Option("--dim", min=1, max=DIM, help="Width of a row; the expert is dim → 4 dim → dim.")
]
BatchOption = Annotated[int, typer.Option("--batch", min=1, max=ROWS, help="Rows a call.")]


def load(
    dim: DimOption = 2_048,
    batch: BatchOption = 16,
    callers: Annotated[int, typer.Option("--callers", min=1, max=CALLERS, help="Processes that call.")] = 4,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, max=600, help="Of each step.")] = 3.0,
    deadline: Annotated[float, typer.Option("--deadline", min=0.01, max=30, help="Of each call, in seconds.")] = 1.0,
    plot: Annotated[Path | None, typer.Option("--plot", help="PNG to write; needs daaswarm[plots].")] = None,
    as_json: JsonOption = False,
) -> None:
    """Load on one host, from half of what it can compute to four times that, from callers that don't wait for answers.

    The first caller asks for half of everything. What a host can't compute by the deadline it refuses with "busy".

    Example: daaswarm bench load --callers 4 --seconds 5 --plot load.png
    """
    output = Output(as_json=as_json)
    if plot is not None:
        from daaswarm.sim.plots import check_plots

        if plot.is_dir() or not plot.parent.is_dir():
            raise ConfigError(f"--plot {plot} can't be written", hint="name a file in a folder that exists")
        check_plots()
    result: dict[str, Any] = {}

    async def emit(event: dict[str, Any]) -> None:
        if not as_json:  # one result, one line
            output.event(event)

    with tempfile.TemporaryDirectory(prefix="daaswarm-") as folder:

        async def command() -> None:
            from daaswarm.bench.load import run_load

            result.update(
                await run_load(
                    dim=dim,
                    batch=batch,
                    callers=callers,
                    seconds=seconds,
                    deadline_s=deadline,
                    folder=Path(folder),
                    emit=emit,
                )
            )

        run_to_end(command, Config(), output)
    if plot is not None:
        from daaswarm.bench.load_plot import draw

        draw(plot, result)
    if as_json:
        output.json(result)
        return
    steps: list[dict[str, Any]] = result.pop("steps")
    output.rows((name, f"{value}") for name, value in result.items())
    output.result("")
    metrics = [metric for metric in steps[0] if metric != "load"]
    rows = [[metric, *(f"{step[metric]}" for step in steps)] for metric in metrics]
    output.table(("load", *(f"{step['load']:g} x" for step in steps)), rows)


def call_load(
    contact: Annotated[str, typer.Option("--contact", help="The host's, as JSON.")],
    dim: DimOption = 2_048,
    batch: BatchOption = 16,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """A caller process of ``bench load``: a line of JSON orders, a line answers, until standard input ends."""
    from daaswarm.bench.load_caller import call_on_orders

    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    config = read_config(folder)
    host = msgspec.json.decode(contact, type=Contact)

    async def emit(event: dict[str, Any]) -> None:
        show(event, output)

    async def run() -> None:
        orders = trio.lowlevel.FdStream(os.dup(0))
        await call_on_orders(folder, config, host, dim=dim, batch=batch, seed=seed, orders=orders, emit=emit)

    raise typer.Exit(run_async(run, config))
