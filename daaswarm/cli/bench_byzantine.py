"""``daaswarm bench byzantine``: honest and hostile hosts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from daaswarm.cli.complete import complete_verify
from daaswarm.cli.options import DataDirOption, JsonOption, open_data_dir, read_config
from daaswarm.cli.output import Output
from daaswarm.cli.run import run_async, run_to_end
from daaswarm.core.verify import parse_verify
from daaswarm.errors import ConfigError
from daaswarm.store.data_dir import DataDir

STRATEGIES = ("independent", "colluding", "evasive", "sleeper", "rare", "replay", "quantised", "refuse", "slow")
DIM = 8_192
SEED = 2**63 - 1


def complete_strategies(incomplete: str) -> list[str]:
    return [name for name in STRATEGIES if name.startswith(incomplete)]


def byzantine(
    hosts: Annotated[int, typer.Option("--hosts", min=4, max=256, help="Hosts, several in a process.")] = 20,
    fraction: Annotated[float, typer.Option("--fraction", min=0, max=0.9, help="Share of the hosts that lie.")] = 0.2,
    requests: Annotated[int, typer.Option("--requests", min=1, max=10_000_000, help="One after the other.")] = 10_000,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            autocompletion=complete_strategies,
            help="What liars do: independent, colluding (all tell the same lie), evasive (honest where they see the "
            "check), sleeper (after 100 calls), rare (1 % of calls), replay, quantised, refuse; or slow (and honest).",
        ),
    ] = "independent",
    verify: Annotated[
        str, typer.Option("--verify", autocompletion=complete_verify, help="Check hosts as infer does.")
    ] = "every",
    dim: Annotated[int, typer.Option("--dim", min=8, max=DIM, help="Width of a row.")] = 576,
    width: Annotated[int, typer.Option("--width", min=8, max=4 * DIM, help="Of the expert: dim → width → dim.")] = 1536,
    batch: Annotated[int, typer.Option("--batch", min=1, max=512, help="Rows a request.")] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, max=SEED, help="Weights, rows, and who lies when.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Requests to honest and hostile hosts: how many wrong rows get through, who is banned, what it costs.

    Example: daaswarm bench byzantine --hosts 12 --requests 1000 --strategy colluding --verify sample
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"--strategy {strategy!r} is not known", hint=f"choose from {', '.join(STRATEGIES)}")
    checking = parse_verify(verify)
    if checking.kind == "off":
        raise ConfigError("--verify off checks nothing", hint="what happens then is measured in every run: see none")
    output = Output(as_json=as_json)
    result: dict[str, Any] = {}

    async def emit(event: dict[str, Any]) -> None:
        if not as_json:
            output.event(event)

    with tempfile.TemporaryDirectory(prefix="daaswarm-") as folder:
        own = DataDir(Path(folder) / "requester")
        config = read_config(own)

        async def command() -> None:
            from daaswarm.bench.byzantine import run_byzantine

            result.update(
                await run_byzantine(
                    own,
                    config,
                    hosts=hosts,
                    fraction=fraction,
                    requests=requests,
                    strategy=strategy,
                    verify=checking,
                    dim=dim,
                    width=width,
                    batch=batch,
                    seed=seed,
                    folder=Path(folder),
                    emit=emit,
                )
            )

        run_to_end(command, config, output)
    if as_json:
        output.json(result)
        return
    others = {name: result.pop(name) for name in ("none", "majority_of_three")}
    output.rows((name, f"{value}") for name, value in result.items())
    output.result("")
    ways = {result["verify"]: result, **others}
    head = ("", *ways)
    names = ("requests", "rows", "wrong_delivered")
    output.table(head, [[name, *(f"{way[name]}" for way in ways.values())] for name in names])


def serve_byzantine(
    strategies: Annotated[str, typer.Option("--strategies", help="One for each host, with commas between.")] = "honest",
    dim: Annotated[int, typer.Option("--dim", min=8, max=DIM)] = 576,
    width: Annotated[int, typer.Option("--width", min=8, max=4 * DIM)] = 1536,
    seed: Annotated[int, typer.Option("--seed", min=0, max=SEED)] = 1,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hosts of ``bench byzantine``."""
    from daaswarm.bench.hostile import serve
    from daaswarm.cli.supervise import ended_by_eof

    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    config = read_config(folder)

    async def emit(event: dict[str, Any]) -> None:
        output.json(event)

    async def run() -> None:
        async with ended_by_eof(True):
            await serve(folder.path, config, strategies.split(","), dim, width, seed, emit)

    raise typer.Exit(run_async(run, config))
