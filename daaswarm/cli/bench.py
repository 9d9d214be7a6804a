"""``daaswarm bench``: measure this machine and this program."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import trio
import typer

from daaswarm.cli.bench_byzantine import byzantine, serve_byzantine
from daaswarm.cli.bench_load import call_load, load
from daaswarm.cli.bench_moe import moe, serve_moe
from daaswarm.cli.bench_sim import simulate
from daaswarm.cli.complete import complete_codecs, complete_verify
from daaswarm.cli.host_expert import complete_models
from daaswarm.cli.options import BootstrapOption, DataDirOption, JsonOption, open_data_dir, read_config
from daaswarm.cli.output import Output
from daaswarm.cli.run import run_async, run_to_end, show
from daaswarm.core.verify import parse_verify
from daaswarm.errors import ConfigError
from daaswarm.limits import CALL_BODY_BYTES
from daaswarm.models.sources import DEFAULT_MODEL
from daaswarm.store.data_dir import DataDir
from daaswarm.types import CODECS, DTYPES, Codec, format_bytes, parse_bytes

FFN_DIM = 8_192  # the benchmark's weights take 2 GiB

app = typer.Typer(no_args_is_help=True, help="Measure this machine and this program.")
app.command("sim")(simulate)
app.command("moe")(moe)
app.command("serve-moe", hidden=True)(serve_moe)
app.command("byzantine")(byzantine)
app.command("serve-byzantine", hidden=True)(serve_byzantine)
app.command("load")(load)
app.command("call-load", hidden=True)(call_load)


@app.command("parity")
def parity(
    model: Annotated[str, typer.Option("--model", autocompletion=complete_models)] = DEFAULT_MODEL,
    hosts: Annotated[int, typer.Option("--hosts", min=1, max=64, help="Host processes to start.")] = 3,
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=4096, help="Greedy tokens to compare.")] = 32,
    across: Annotated[
        bool, typer.Option("--across/--by-layer", help="Cut every layer over all hosts, or give each whole layers.")
    ] = False,
    dtype: Annotated[str, typer.Option("--dtype")] = "f32",
    codec: Annotated[
        str, typer.Option("--codec", autocompletion=complete_codecs, help="Of hidden states: f16, bf16, int8 or none.")
    ] = "none",
    verify: Annotated[
        str,
        typer.Option(
            "--verify", autocompletion=complete_verify, help="Check hosts as infer does; measured without, too."
        ),
    ] = "off",
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Is the model on several hosts the same as the whole one, and how fast is it beside it?

    Example: daaswarm bench parity --model ./OLMoE-1B-7B --hosts 3
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not known", hint=f"choose from {', '.join(DTYPES)}")
    if codec not in ("none", *CODECS):
        raise ConfigError(f"--codec {codec!r} is not known", hint=f"choose from none, {', '.join(CODECS)}")
    checking = parse_verify(verify)
    output = Output(as_json=as_json)

    async def run(folder: DataDir, config: Any) -> dict[str, Any]:
        from daaswarm.bench.parity import run_parity

        return await run_parity(
            folder,
            config,
            model,
            hosts=hosts,
            tokens=tokens,
            dtype=dtype,
            across=across,
            codec=cast(Codec, codec),
            verify=checking,
            emit=partial(_show, output),
        )

    _measure(run, data_dir, output)


@app.command("generate")
def generate(
    model: Annotated[
        str, typer.Option("--model", autocompletion=complete_models, help="Name, folder or GGUF file.")
    ] = DEFAULT_MODEL,
    hosts: Annotated[int, typer.Option("--hosts", min=1, max=64, help="Host processes to start.")] = 2,
    answers: Annotated[int, typer.Option("--answers", min=1, max=64, help="At once, beside one alone.")] = 4,
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=4096, help="Of each answer.")] = 48,
    dtype: Annotated[str, typer.Option("--dtype", help="Compute in f32, bf16 or f16.")] = "f32",
    codec: Annotated[
        str, typer.Option("--codec", autocompletion=complete_codecs, help="Of hidden states: f16, bf16, int8 or none.")
    ] = "none",
    verify: Annotated[
        str, typer.Option("--verify", autocompletion=complete_verify, help="Check hosts as infer does.")
    ] = "off",
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tokens a second on several hosts: of one answer, and of several that share passes.

    Example: daaswarm bench generate --answers 8 --tokens 64
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not known", hint=f"choose from {', '.join(DTYPES)}")
    if codec not in ("none", *CODECS):
        raise ConfigError(f"--codec {codec!r} is not known", hint=f"choose from none, {', '.join(CODECS)}")
    checking = parse_verify(verify)
    output = Output(as_json=as_json)

    async def run(folder: DataDir, config: Any) -> dict[str, Any]:
        from daaswarm.bench.generate import run_generate

        return await run_generate(
            folder,
            config,
            model,
            hosts=hosts,
            answers=answers,
            tokens=tokens,
            dtype=dtype,
            codec=cast(Codec, codec),
            verify=checking,
            emit=partial(_show, output),
        )

    _measure(run, data_dir, output)


@app.command("net")
def net(
    body: Annotated[str, typer.Option("--body", metavar="SIZE", help="Of a large call, there and back.")] = "8MiB",
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, max=600, help="Of each measurement.")] = 2.0,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Connecting, pings, small and large bodies between two nodes on this machine, beside plain TCP.

    Example: daaswarm bench net --body 1MiB
    """
    nbytes = parse_bytes(body, option="--body")
    if not 1 <= nbytes <= CALL_BODY_BYTES:
        raise ConfigError(
            f"--body {body}: a call takes {format_bytes(CALL_BODY_BYTES)} at most", hint="give less, as 8MiB"
        )
    output = Output(as_json=as_json)

    async def run(folder: DataDir, config: Any) -> dict[str, Any]:
        from daaswarm.bench.net import run_net

        with tempfile.TemporaryDirectory(prefix="daaswarm-") as host_dir:
            return await run_net(folder, config, body_bytes=nbytes, seconds=seconds, host_dir=host_dir)

    _measure(run, data_dir, output)


@app.command("expert")
def expert(
    kind: Annotated[str, typer.Option("--expert", help="nop returns its rows, ffn is dim → 4 dim → dim.")] = "nop",
    dim: Annotated[int, typer.Option("--dim", min=1, max=65_536)] = 576,
    batch: Annotated[int, typer.Option("--batch", min=1, max=65_536, help="Rows a call.")] = 1,
    callers: Annotated[int, typer.Option("--callers", min=1, max=256, help="Calls at the same time.")] = 64,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, max=600)] = 5.0,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Calls a second to one expert in another process, and the time of one.

    Example: daaswarm bench expert --expert ffn --callers 64
    """
    if kind not in ("nop", "ffn"):
        raise ConfigError(f"--expert {kind!r} is not known", hint="choose nop or ffn")
    if dim * batch * 4 > CALL_BODY_BYTES:
        raise ConfigError(
            f"--dim {dim} --batch {batch}: a call takes {format_bytes(dim * batch * 4)}, "
            f"{format_bytes(CALL_BODY_BYTES)} are allowed",
            hint=f"--batch {max(1, CALL_BODY_BYTES // (4 * dim))} is the most",
        )
    if kind == "ffn" and dim > FFN_DIM:
        raise ConfigError(f"--expert ffn --dim {dim}: {FFN_DIM} is the limit", hint=f"choose --dim {FFN_DIM} or less")
    output = Output(as_json=as_json)

    async def run(folder: DataDir, config: Any) -> dict[str, Any]:
        from daaswarm.bench.expert_calls import run_expert_calls

        with tempfile.TemporaryDirectory(prefix="daaswarm-") as host_dir:
            return await run_expert_calls(
                folder, config, kind=kind, dim=dim, batch=batch, callers=callers, seconds=seconds, host_dir=host_dir
            )

    _measure(run, data_dir, output)


@app.command("serve-expert", hidden=True)
def serve_expert(
    kind: Annotated[str, typer.Option("--expert")] = "nop",
    dim: Annotated[int, typer.Option("--dim", min=1, max=65_536)] = 576,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """The host process of ``bench expert``."""
    from daaswarm.bench.expert_calls import serve
    from daaswarm.cli.supervise import ended_by_eof

    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    config = read_config(folder)

    async def run() -> None:
        async with ended_by_eof(True):
            await serve(folder, config, "ffn" if kind == "ffn" else "nop", dim, partial(_show, output))

    raise typer.Exit(run_async(run, config))


@app.command("dht")
def dht(
    peers: Annotated[int, typer.Option("--peers", min=2, max=512, help="Processes to start, 50 MB each.")] = 16,
    keys: Annotated[int, typer.Option("--keys", min=1, max=10_000, help="Keys to store and get.")] = 100,
    kill: Annotated[float, typer.Option("--kill", min=0, max=0.9, help="Share of the peers to kill.")] = 0.2,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which peers do what, and who dies.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Store and get over real sockets, before and after a part of the peers is killed. Takes over a minute: the
    last figures are of a minute after that.

    Example: daaswarm bench dht --peers 64 --json
    """
    output = Output(as_json=as_json)
    if round(kill * peers) > peers - 2:
        raise ConfigError(
            f"--kill {kill:g} of --peers {peers} leaves too few: at least two have to live",
            hint=f"--kill {math.floor(100 * (peers - 2) / peers) / 100:g} is the most",
        )

    async def run(folder: DataDir, config: Any) -> dict[str, Any]:
        from daaswarm.bench.dht import run_dht

        async def emit(event: dict[str, Any]) -> None:
            if not as_json:  # one result, one line
                output.event(event)

        return await run_dht(peers=peers, keys=keys, kill=kill, seed=seed, folder=folder.path, emit=emit)

    _measure(run, None, output)


@app.command("serve-dht", hidden=True)
def serve_dht(
    bootstrap: BootstrapOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """One peer of ``bench dht``: a line of JSON asks, a line answers, until standard input ends."""
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    config = read_config(folder, bootstrap=bootstrap)

    async def run() -> None:
        from daaswarm.bench.dht import serve

        await serve(folder, config, trio.lowlevel.FdStream(os.dup(0)), partial(_show, output))

    raise typer.Exit(run_async(run, config))


def _measure(run: Any, data_dir: Path | None, output: Output) -> None:
    """Run one benchmark with an identity of its own, unless a folder was named, and show its figures."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="daaswarm-") as folder:
        own = open_data_dir(data_dir) if data_dir is not None else DataDir(Path(folder))
        config = read_config(own)

        async def command() -> None:
            result.update(await run(own, config))

        run_to_end(command, config, output)
    if output.as_json:
        output.json(result)
    else:
        output.rows((name, f"{value}") for name, value in _flatten(result))


def _flatten(result: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in result.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


async def _show(output: Output, event: dict[str, Any]) -> None:
    show(event, output)
