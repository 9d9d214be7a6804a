"""``daaswarm bench moe``: a mixture of experts whose hosts die."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from daaswarm.cli.options import DataDirOption, JsonOption, open_data_dir, read_config
from daaswarm.cli.output import Output
from daaswarm.cli.run import run_async, run_to_end, show
from daaswarm.errors import ConfigError
from daaswarm.store.data_dir import DataDir

ROWS = 4_096  # of a request; what a host takes in one call
DIM = 8_192  # one expert's weights take 2 GiB
SEED = 2**63 - 1  # what torch takes
WAYS = ("kill", "stop")

DimOption = Annotated[int, typer.Option("--dim", min=1, max=DIM, help="Width of a row; experts are dim → 4 dim → dim.")]


def moe(
    hosts: Annotated[int, typer.Option("--hosts", min=1, max=64, help="Host processes to start.")] = 10,
    experts: Annotated[int, typer.Option("--experts", min=1, max=1024, help="Experts of the layer.")] = 20,
    replicas: Annotated[int, typer.Option("--replicas", min=1, max=64, help="Hosts that each expert is on.")] = 4,
    k: Annotated[int, typer.Option("--k", min=1, max=64, help="Experts that each row goes to.")] = 4,
    dim: DimOption = 576,
    batch: Annotated[int, typer.Option("--batch", min=1, max=ROWS, help="Rows a request.")] = 1,
    dead: Annotated[float, typer.Option("--dead", min=0, max=0.9, help="Share of the hosts that goes.")] = 0.3,
    how: Annotated[str, typer.Option("--how", help="kill: it crashes; stop: it falls silent.")] = "kill",
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, max=600, help="Of each of the two phases.")] = 5.0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=SEED, help="Which rows are sent, and who goes.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Requests to a mixture of experts on several hosts, before and after a part of them is gone.

    Example: daaswarm bench moe --hosts 10 --dead 0.3 --how stop
    """
    if how not in WAYS:
        raise ConfigError(f"--how {how!r} is not known", hint="choose kill or stop")
    if k > experts:
        raise ConfigError(f"--k {k} of --experts {experts}: there are too few", hint=f"--k {experts} is the most")
    if replicas > hosts:
        raise ConfigError(
            f"--replicas {replicas} on --hosts {hosts}: there are too few", hint=f"--replicas {hosts} is the most"
        )
    if experts + replicas <= hosts:
        raise ConfigError(
            f"--experts {experts} with --replicas {replicas} on --hosts {hosts}: some hosts would have none",
            hint=f"--hosts {experts + replicas - 1} is the most",
        )
    output = Output(as_json=as_json)
    result: dict[str, Any] = {}

    async def emit(event: dict[str, Any]) -> None:
        if not as_json:  # one result, one line
            output.event(event)

    with tempfile.TemporaryDirectory(prefix="daaswarm-") as folder:
        own = DataDir(Path(folder) / "requester")
        config = read_config(own)

        async def command() -> None:
            from daaswarm.bench.moe import run_moe

            result.update(
                await run_moe(
                    own,
                    config,
                    hosts=hosts,
                    experts=experts,
                    replicas=replicas,
                    k=k,
                    dim=dim,
                    batch=batch,
                    dead=dead,
                    how="stop" if how == "stop" else "kill",
                    seconds=seconds,
                    seed=seed,
                    folder=Path(folder),
                    emit=emit,
                )
            )

        run_to_end(command, config, output)
    if as_json:
        output.json(result)
        return
    phases = {name: result.pop(name) for name in ("healthy", "after") if name in result}
    output.rows((name, f"{value}") for name, value in result.items())
    output.result("")
    rows = [[metric, *(f"{phase[metric]}" for phase in phases.values())] for metric in phases["healthy"]]
    output.table(("", *phases), rows)


def serve_moe(
    experts: Annotated[str, typer.Option("--experts", help="Numbers with commas between.")] = "0",
    dim: DimOption = 576,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """A host process of ``bench moe``."""
    from daaswarm.bench.moe import serve
    from daaswarm.cli.supervise import ended_by_eof

    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    config = read_config(folder)
    held = [int(expert) for expert in experts.split(",")]

    async def emit(event: dict[str, Any]) -> None:
        show(event, output)

    async def run() -> None:
        async with ended_by_eof(True):
            await serve(folder, config, dim, held, emit)

    raise typer.Exit(run_async(run, config))
