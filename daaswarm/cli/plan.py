"""``daaswarm plan``: what a model takes, how fast it would be in which way, and whether to split it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import tomli
import typer
from msgspec import Meta

from daaswarm.cli.complete import complete_dtypes
from daaswarm.cli.host_expert import complete_models, locate_model
from daaswarm.cli.options import (
    BootstrapOption,
    DataDirOption,
    JsonOption,
    SwarmIdOption,
    SwarmKeyOption,
    open_data_dir,
    read_config,
)
from daaswarm.cli.output import Output
from daaswarm.cli.run import attach, is_node_running, refuse_attached, run_to_end, show
from daaswarm.errors import ConfigError
from daaswarm.types import DTYPES, format_bytes, parse_bytes

PROMPT_TOKENS = 128
FILE_BYTES = 1 << 20  # of --peers; a description of thousands of hosts is smaller
PEERS = 4_096
WAYS = {"whole": "whole, here", "sharded": "sharded", "pipeline": "pipeline", "ensemble": "ensemble"}


class PeerFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One host of ``--peers``."""

    name: str
    memory: str
    rtt_ms: Annotated[float, Meta(ge=0, le=600_000)]
    bandwidth: str = ""  # a second, like 100MB
    speed: Annotated[float, Meta(gt=0, le=1e6)] = 1.0  # times this machine's


class PeersFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    peers: Annotated[list[PeerFile], Meta(max_length=PEERS)]


def plan(
    model: Annotated[
        str,
        typer.Argument(
            autocompletion=complete_models,
            help="The default model's name, a folder in Hugging Face layout, or a GGUF file.",
        ),
    ],
    peers: Annotated[
        Path | None,
        typer.Option("--peers", help="Hosts described in a TOML or JSON file, instead of those that are live."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="What this machine may give (default: what is free now)."),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, max=100_000, help="Length of the prompt to think of.")
    ] = PROMPT_TOKENS,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", autocompletion=complete_dtypes, help="In f32, bf16 or f16 (default: best covered)."),
    ] = None,
    bootstrap: BootstrapOption = None,
    swarm_id: SwarmIdOption = None,
    swarm_key: SwarmKeyOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine and the live hosts, and say how fast a model would be: whole here, or split.

    Example: daaswarm plan smollm2-135m-instruct --bootstrap /ip4/…/tcp/…/p2p/…
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not known", hint=f"choose from {', '.join(DTYPES)}")
    config = read_config(folder, bootstrap=bootstrap, swarm_id=swarm_id, swarm_key=swarm_key)
    params: dict[str, Any] = {
        "model": locate_model(model),
        "peers": read_peers(peers) if peers is not None else None,
        "memory_bytes": parse_bytes(memory, option="--memory") if memory is not None else None,
        "prompt_tokens": prompt_tokens,
        "dtype": dtype,
        "bootstrap": bootstrap or [],
    }
    found: dict[str, Any] = {}

    async def run() -> None:
        emit = partial(_show, output)
        if is_node_running(folder):
            refuse_attached(folder, swarm_id=swarm_id, swarm_key=swarm_key)
            found.update(await attach(folder, "plan", params, emit))
            return
        from daaswarm.node.life import open_node

        swarm = config.network.bootstrap if peers is None else []
        async with open_node(folder, config, listen=False, libp2p=False) as node:
            found.update(await node.control("plan", {**params, "bootstrap": swarm}, emit))

    run_to_end(run, config, output)
    output.json(found)
    if not as_json:
        render(found, output)


def read_peers(path: Path) -> list[dict[str, Any]]:
    """The hosts of ``--peers``, for ``node.planning``.

    Raises:
        ConfigError: it can't be read, or isn't what it should be.
    """
    hint = "see docs/how-to/plan-before-you-split.md: name, memory and rtt_ms of each of [[peers]]"
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--peers {path}: {error.strerror or error}", hint=hint) from error
    if len(content) > FILE_BYTES:
        raise ConfigError(f"--peers {path} is larger than {format_bytes(FILE_BYTES)}", hint=hint)
    try:
        text = content.decode()
        raw = msgspec.json.decode(text) if text.lstrip().startswith("{") else tomli.loads(text)
        described = msgspec.convert(raw, PeersFile)
    except (ValueError, RecursionError) as error:  # also of msgspec and tomli
        raise ConfigError(f"--peers {path}: {error}", hint=hint) from error
    return [
        {
            "name": peer.name,
            "memory_bytes": _read_amount(path, peer, "memory"),
            "rtt_ms": peer.rtt_ms,
            "bytes_per_s": _read_amount(path, peer, "bandwidth") if peer.bandwidth else None,
            "speed": peer.speed,
        }
        for peer in described.peers
    ]


def _read_amount(path: Path, peer: PeerFile, name: str) -> int:
    try:
        return parse_bytes(getattr(peer, name), option=f"{name} of {peer.name!r}:")
    except ConfigError as error:
        raise ConfigError(f"--peers {path}: {error.message}", hint="write it like 4GB or 512MiB") from error


def render(found: dict[str, Any], output: Output) -> None:
    output.rows(
        [
            ("model", f"{found['model']} in {found['dtype']}, {found['kind']}"),
            ("this machine", f"holds {format_bytes(found['trunk_bytes'])} of it as requester"),
            ("experts", f"{format_bytes(found['experts_bytes'])} in all"),
            ("prompt", f"{found['prompt_tokens']} tokens"),
        ]
    )
    if found["peers"]:
        rows = [
            (
                peer["name"] if len(peer["name"]) <= 20 else f"…{peer['name'][-6:]}",
                f"{peer['round_ms']:.2f} ms",
                f"{format_bytes(peer['bytes_per_s'])}/s" if peer["bytes_per_s"] else "",
                f"{peer['layer_token_ms']:.2f} ms",
                format_bytes(peer["memory_bytes"]) if peer["memory_bytes"] else "",
                str(peer["experts"]),
                str(peer["used"]),
            )
            for peer in found["peers"]
        ]
        output.table(["peer", "a call", "bandwidth", "a layer", "memory", "experts", "used"], rows)
    for peer in found["silent"]:
        output.message(f"…{peer[-6:]} gave no answer, and is left out")
    rows = [
        (
            WAYS[option["way"]],
            f"{option['tokens_per_s']:.2f}" if option["is_possible"] else "no",
            f"{option['prefill_s']:.2f} s" if option["is_possible"] else "",
            str(option["rounds_per_token"]),
            format_bytes(option["bytes_per_token"]),
            format_bytes(option["bytes_per_prefill"]),
            option["note"],
        )
        for option in found["options"]
    ]
    output.table(["way", "tokens/s", "prompt", "rounds/token", "bytes/token", "bytes/prompt", ""], rows)
    output.result(found["verdict"]["text"])


async def _show(output: Output, event: dict[str, Any]) -> None:
    show(event, output)
