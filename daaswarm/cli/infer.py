"""``daaswarm infer``: ask a model whose experts are elsewhere."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from daaswarm.cli.host_expert import complete_models, locate_model
from daaswarm.cli.options import (
    AnnounceOption,
    BootstrapOption,
    DataDirOption,
    JsonOption,
    ListenOption,
    open_data_dir,
    read_config,
)
from daaswarm.cli.output import Output
from daaswarm.cli.run import attach, is_node_running, run_async, show
from daaswarm.errors import ConfigError, Interrupted
from daaswarm.types import DTYPES, format_bytes


def infer(
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from standard input.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            autocompletion=complete_models,
            help="Name, folder or GGUF file (default: infer.model).",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Longest answer (default: infer.max_tokens).")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="0 (default): the same answer every time; higher: more varied."),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Draw from the likeliest tokens up to this share (default: 1, all).")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes a draw at a temperature repeatable.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="Instruction put before the prompt.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End the answer before this text. Repeatable.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it stands, without the chat template.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Ask for f32, bf16 or f16 (default: best covered).")
    ] = None,
    embedded: Annotated[
        int | None,
        typer.Option("--embedded", min=1, max=64, help="Start this many host processes here, for this run only."),
    ] = None,
    bootstrap: BootstrapOption = None,
    listen: ListenOption = None,
    announce: AnnounceOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a model and watch the answer come. The experts' weights stay with their hosts.

    Example: daaswarm infer "What is the capital of France?" --temperature 0
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not known", hint=f"choose from {', '.join(DTYPES)}")
    for option, given in (("--system", system), *(("--stop", text) for text in stop or [])):
        if given is not None and not is_utf8(given):
            raise ConfigError(f"{option} is not UTF-8 text", hint="convert it first, with iconv for example")
    if seed is not None and not 0 <= seed < 2**63:
        raise ConfigError(f"--seed {seed} is out of range", hint="choose a number from 0 to 2^63 - 1")
    config = read_config(
        folder,
        bootstrap=bootstrap,
        listen=listen,
        announce=announce,
        infer__model=model,
        infer__max_tokens=max_tokens,
        infer__temperature=temperature,
        infer__top_p=top_p,
    )
    params: dict[str, Any] = {
        "prompt": read_prompt(prompt),
        "model": locate_model(config.infer.model),
        "max_tokens": config.infer.max_tokens,
        "temperature": config.infer.temperature,
        "top_p": config.infer.top_p,
        "seed": seed,
        "system": system,
        "stop": stop or [],
        "raw": raw,
        "dtype": dtype,
        "embedded": embedded,
        "bootstrap": bootstrap or [],
    }
    result: dict[str, Any] = {}
    written: list[str] = []

    async def show_and_keep(event: dict[str, Any]) -> None:
        if event.get("event") == "text":
            written.append(event["text"])
        show(event, output)

    async def run() -> None:
        if is_node_running(folder):
            result.update(await attach(folder, "infer", params, show_and_keep))
        else:
            from daaswarm.node import ask_once

            result.update(await ask_once(folder, config, show_and_keep, params, serve=listen is not None))

    code = run_async(run, config)
    if not result:  # by Ctrl-C, or told to stop by SIGTERM
        raise Interrupted("the answer was interrupted", text="".join(written))
    output.end_line()
    output.json(result)
    output.message(summarise(result))
    raise typer.Exit(code)


def read_prompt(prompt: str) -> str:
    """The argument, or standard input for ``-``.

    Raises:
        ConfigError: empty, or not UTF-8.
    """
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
    except UnicodeDecodeError:
        text = "\udcff"
    if not is_utf8(text):
        raise ConfigError("the prompt is not UTF-8 text", hint="convert it first, with iconv for example")
    if not text.strip():
        raise ConfigError("the prompt is empty", hint='write it like: daaswarm infer "What is a hash table?"')
    return text


def is_utf8(text: str) -> bool:
    """False for what arrived as other bytes: Python hands those on as lone surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def summarise(result: dict[str, Any]) -> str:
    """The line that says who computed the answer."""
    hosts = ", ".join(f"…{host['peer_id'][-6:]} {host['calls']} calls" for host in result["hosts"])
    where = f"{len(result['hosts'])} {'embedded ' if result['embedded'] else ''}host{'s' * (len(result['hosts']) != 1)}"
    retries = f", {result['retries']} retries" if result["retries"] else ""
    moved = sum(host["bytes_sent"] + host["bytes_received"] for host in result["hosts"])
    return (
        f"[{result['completion_tokens']} tokens, {result['tokens_per_s']:.1f}/s, by {where}: {hosts}; "
        f"{result['calls']} calls, {format_bytes(moved)}{retries}]"
    )
