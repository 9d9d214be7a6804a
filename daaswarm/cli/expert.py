"""``daaswarm expert``: what this node holds, what the swarm serves, and whether it is right."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

import typer

from daaswarm.cli.complete import complete_peers
from daaswarm.cli.host_expert import complete_models, locate_model
from daaswarm.cli.options import BootstrapOption, DataDirOption, JsonOption, open_data_dir, read_config
from daaswarm.cli.output import Output
from daaswarm.cli.run import attach, is_node_running, run_to_end, show
from daaswarm.config import Config
from daaswarm.errors import EXIT_FAILED, ConfigError, StorageError
from daaswarm.store.data_dir import DataDir
from daaswarm.types import DTYPES, format_bytes, format_range, parse_bytes, parse_range

SAMPLES = 8  # of each host; a host that cheats with one weight in ten is found with four chances in seven
SAMPLES_MAX = 10_000  # a day of them

app = typer.Typer(no_args_is_help=True, help="Experts: here, in the swarm, and whether they are right.")

ModelArgument = Annotated[
    str,
    typer.Argument(
        autocompletion=complete_models,
        help="The default model's name, a folder in Hugging Face layout, or a GGUF file.",
    ),
]
LayersOption = Annotated[str | None, typer.Option("--layers", help="Layers, like 0-14 (inclusive).")]
ExpertsOption = Annotated[str | None, typer.Option("--experts", help="Experts of a mixture-of-experts model.")]
SlicesOption = Annotated[str | None, typer.Option("--slices", help="Slices of a dense model's feed-forward nets.")]


@app.command("list")
def list_experts(
    available: Annotated[
        bool, typer.Option("--available", help="What the swarm serves, instead of this node.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", autocompletion=complete_models, help="Only this one: name, folder or root."),
    ] = None,
    tag: Annotated[
        str | None, typer.Option("--tag", help="Only hosts that say they are good at this (their host.tags).")
    ] = None,
    bootstrap: BootstrapOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which experts this node holds, or with --available who in the swarm serves what.

    The DHT can only be asked about a model: without --model that is the default one and those in the cache. For others
    and for --tag the question goes from neighbour to neighbour, a few steps far.

    Example: daaswarm expert list --available --model smollm2-135m-instruct
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    if not available:
        if model is not None:
            raise ConfigError("--model goes with --available", hint="daaswarm expert list shows all that is held here")
        if tag is not None:
            raise ConfigError("--tag goes with --available", hint="daaswarm expert list shows all that is held here")
        if bootstrap:
            raise ConfigError("--bootstrap goes with --available", hint="what is held here needs no swarm")
    config = read_config(folder, bootstrap=bootstrap)
    found: dict[str, Any] = {}

    async def run() -> None:
        if not available:
            found.update(await attach(folder, "experts", {}, partial(_show, output)) if is_node_running(folder) else {})
            return
        wanted = locate_model(model) if model is not None else None
        params = {"model": wanted, "tag": tag, "bootstrap": bootstrap or []}
        found.update(await ask_swarm(folder, config, "available", params, output))

    run_to_end(run, config, output)
    if not available and not found:
        found = read_deployments(folder)
    if as_json:
        output.json(found)
    elif available:
        show_available(found, output)
        if model is None:
            output.message("looked up: the default model, the models in the cache, and what known peers tell of others")
            output.message("another model: daaswarm expert list --available --model NAME_OR_ROOT")
    else:
        show_held(found, output)


@app.command()
def deploy(
    model: ModelArgument,
    layers: LayersOption = None,
    experts: ExpertsOption = None,
    slices: SlicesOption = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Compute in f32, bf16 or f16 (default: as what is here of it, else host.dtype)."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="With no ranges given: add this much, of the experts that have fewest hosts."),
    ] = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add experts to the running node, without a stop. They stay, also after the node is started again.

    With no ranges and no --memory: as many as fit into the node's memory limit.

    Example: daaswarm expert deploy ./OLMoE-1B-7B --layers 0-7 --experts 0-31
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not served", hint=f"choose from {', '.join(DTYPES)}")
    has_ranges = check_ranges(layers, experts, slices)
    if memory is not None:
        parse_bytes(memory, option="--memory")
        if has_ranges:
            raise ConfigError(
                "--memory and ranges exclude each other", hint="--memory lets the node choose; ranges say what to serve"
            )
    params = {
        "model": locate_model(model),
        "layers": layers,
        "experts": experts,
        "slices": slices,
        "dtype": dtype,
        "memory_bytes": parse_bytes(memory, option="--memory") if memory is not None else None,
    }
    found = ask_node(folder, "deploy", params, output)
    output.json(found)
    for line in found["lines"]:
        output.result(line)


@app.command()
def remove(
    model: Annotated[str, typer.Argument(help="Name, folder or root of a model deployed here.")],
    layers: LayersOption = None,
    experts: ExpertsOption = None,
    slices: SlicesOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take experts away from the running node, without a stop. Calls in flight are answered.

    Example: daaswarm expert remove ./OLMoE-1B-7B --layers 4-7
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    check_ranges(layers, experts, slices)
    params = {"model": locate_model(model), "layers": layers, "experts": experts, "slices": slices}
    found = ask_node(folder, "undeploy", params, output)
    output.json(found)
    output.result(f"removed from {found['model']}: {describe_held(found['removed'])}")
    if found["held"]:
        output.result(f"still deployed: {describe_held(found['held'])}")


@app.command()
def verify(
    model: ModelArgument,
    peer: Annotated[
        str | None, typer.Option("--peer", autocompletion=complete_peers, metavar="ID", help="Only this host.")
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, max=SAMPLES_MAX, help="Experts to ask of each host.")
    ] = SAMPLES,
    bootstrap: BootstrapOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send random rows to each live host, and compare with the same experts computed here from the checkpoint.

    Exit code 1 if a host answers wrongly; it is named.

    Example: daaswarm expert verify smollm2-135m-instruct --samples 20
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    if peer is not None:
        from daaswarm.core.signing import get_public_key

        get_public_key(peer)
    config = read_config(folder, bootstrap=bootstrap)
    params = {"model": locate_model(model), "peer": peer, "samples": samples, "bootstrap": bootstrap or []}
    found: dict[str, Any] = {}

    async def run() -> None:
        found.update(await ask_swarm(folder, config, "verify", params, output))

    run_to_end(run, config, output)
    output.json(found)
    if not as_json:
        rows = [
            (
                host["verdict"],
                host["peer_id"],
                host["dtype"],
                f"{host['samples']} samples, error {host['worst_error']:.1e} (allowed {host['tolerance']:.0e})",
                host["reason"],
            )
            for host in found["hosts"]
        ]
        output.table(["", "host", "dtype", "result", ""], rows)
    if found["wrong"]:
        output.message(f"wrong answers: {', '.join(found['wrong'])}")
        raise typer.Exit(EXIT_FAILED)


# -- in common ----------------------------------------------------------------------------------------------------


def check_ranges(layers: str | None, experts: str | None, slices: str | None) -> bool:
    """Whether there is one.

    Raises:
        ConfigError: one is none, or two that exclude each other.
    """
    if experts is not None and slices is not None:
        raise ConfigError(
            "--experts and --slices exclude each other",
            hint="--experts is for mixture-of-experts models, --slices for dense",
        )
    given = [(o, t) for o, t in (("--layers", layers), ("--experts", experts), ("--slices", slices)) if t is not None]
    for option, text in given:
        parse_range(text, option=option)
    return bool(given)


def ask_node(folder: DataDir, method: str, params: dict[str, Any], output: Output) -> dict[str, Any]:
    """What the running node answers.

    Raises:
        ConfigError: none runs.
    """
    if not is_node_running(folder):
        raise ConfigError(
            f"no node runs on {folder.path}",
            hint=f"start one: daaswarm join --data-dir {folder.path}, and run this beside it",
        )
    found: dict[str, Any] = {}

    async def run() -> None:
        found.update(await attach(folder, method, params, partial(_show, output)))

    run_to_end(run, read_config(folder), output)
    return found


async def ask_swarm(
    folder: DataDir, config: Config, method: str, params: dict[str, Any], output: Output
) -> dict[str, Any]:
    """Through the running node, or one that lives as long as this takes.

    Raises:
        ConfigError: none runs, and no address of the swarm is known.
    """
    if is_node_running(folder):
        return await attach(folder, method, params, partial(_show, output))
    if not config.network.bootstrap:
        raise ConfigError(
            "no node runs here, and no address of the swarm is given",
            hint="give --bootstrap ADDR, or start a node: daaswarm join",
        )
    async with _open_node(folder, config) as run:
        return await run(method, {**params, "bootstrap": config.network.bootstrap}, partial(_show, output))


@asynccontextmanager
async def _open_node(folder: DataDir, config: Config) -> AsyncIterator[Any]:
    from daaswarm.node.life import open_node

    async with open_node(folder, config, listen=False, libp2p=False) as node:
        yield node.operating.run


def read_deployments(folder: DataDir) -> dict[str, Any]:
    """What a node that starts here will serve."""
    from daaswarm.store.database import read_database

    try:
        with read_database(folder.database_path) as database:
            deployments = [] if database is None else database.get_deployments()
    except StorageError:
        deployments = []  # the next node sets the file aside, and says so
    hosted = [
        {
            "name": d.name,
            "root": d.model_root,
            "dtype": d.dtype,
            "bytes": 0,
            "calls": 0,
            "rows": 0,
            "held": {str(layer): ids for layer, ids in sorted(d.held.items())},
            "changed_files": [],
            "deployed": True,
            "error": "",
        }
        for d in deployments
    ]
    return {"running": False, "hosted": hosted}


def show_held(found: dict[str, Any], output: Output) -> None:
    if not found["hosted"]:
        output.message("no experts here: daaswarm expert deploy MODEL adds some to a running node")
        return
    if not found["running"]:
        output.message("no node runs here; one that is started will serve:")
    rows = []
    for model in found["hosted"]:
        notes = [] if model["deployed"] else ["while its host-expert runs"]
        notes += [f"not served: {model['error']}"] if model["error"] else []
        notes += [f"changed on disk: {', '.join(model['changed_files'])}"] if model["changed_files"] else []
        rows.append(
            (
                model["name"],
                model["dtype"],
                describe_held(model["held"]),
                format_bytes(model["bytes"]),
                f"{model['calls']}",
                f"{model['rows']}",
                "; ".join(notes),
            )
        )
    output.table(["model", "dtype", "layers", "memory", "calls", "rows", ""], rows)


def show_available(found: dict[str, Any], output: Output) -> None:
    if not found["hosts"]:
        output.message("nobody found serves experts: daaswarm host-expert MODEL is a beginning")
        return
    rows = [
        (
            host["model"],
            host["peer_id"] + (" (this node)" if host["self"] else ""),
            host["dtype"],
            describe_held(host["held"]),
            "paused" if host["paused"] else describe_load(host["load"], host["price"]),
            " ".join(host["tags"]),
            " ".join(host["addrs"]),
        )
        for host in found["hosts"]
    ]
    output.table(["model", "host", "dtype", "layers", "", "tags", "addresses"], rows)


def describe_load(load: float, price: float) -> str:
    """``"3 calls wait, price 0.5"``; nothing where there is nothing to say."""
    parts = [f"{load:g} call{'s wait' if load != 1 else ' waits'}"] if load else []
    parts += [f"price {price:g}"] if price else []
    return ", ".join(parts)


def describe_held(held: dict[str, list[int]]) -> str:
    """``"0-3: 0-7; 4: 0-2"``: layers, and the experts of each."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for layer, ids in held.items():
        groups.setdefault(tuple(ids), []).append(int(layer))
    return "; ".join(f"{format_range(layers)}: {format_range(list(ids))}" for ids, layers in groups.items())


async def _show(output: Output, event: dict[str, Any]) -> None:
    show(event, output)
