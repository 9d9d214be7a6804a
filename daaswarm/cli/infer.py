"""``daaswarm infer``: ask a model whose experts are elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daaswarm.cli.complete import complete_codecs, complete_dtypes, complete_verify
from daaswarm.cli.host_expert import complete_models, locate_model
from daaswarm.cli.host_options import DeviceOption
from daaswarm.cli.options import (
    AnnounceOption,
    BootstrapOption,
    DataDirOption,
    JsonOption,
    ListenOption,
    SwarmIdOption,
    SwarmKeyOption,
    open_data_dir,
    read_config,
)
from daaswarm.cli.output import WAITING, Output, describe_retries
from daaswarm.cli.run import attach, is_node_running, refuse_attached, run_async, show
from daaswarm.config import Config
from daaswarm.core.verify import parse_verify
from daaswarm.errors import EXIT_INTERRUPTED, ConfigError, Interrupted
from daaswarm.store.data_dir import DataDir
from daaswarm.types import DTYPES, format_bytes

if TYPE_CHECKING:
    from daaswarm.cli.chat import Reader


def infer(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to ask; - reads it from standard input. Without it, on a terminal: a chat."),
    ] = None,
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
        str | None,
        typer.Option(
            "--dtype", autocompletion=complete_dtypes, help="Ask for f32, bf16 or f16 (default: best covered)."
        ),
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            "--codec",
            autocompletion=complete_codecs,
            help="Send hidden states to hosts in fewer bytes, with some error: f16, bf16, int8 "
            "(default: infer.codec, none).",
        ),
    ] = None,
    verify: Annotated[
        str | None,
        typer.Option(
            "--verify",
            autocompletion=complete_verify,
            help="Check what hosts answer: off, sample or sample=0.1 (some calls, all of unknown hosts), every, or "
            "twin (a second host computes the same) (default: infer.verify, sample).",
        ),
    ] = None,
    device: DeviceOption = None,
    embedded: Annotated[
        int | None,
        typer.Option("--embedded", min=1, max=64, help="Start this many host processes here, for this run only."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Don't ask whether splitting the model is a good idea.")
    ] = False,
    bootstrap: BootstrapOption = None,
    swarm_id: SwarmIdOption = None,
    swarm_key: SwarmKeyOption = None,
    listen: ListenOption = None,
    announce: AnnounceOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a model and watch the answer come. The experts' weights stay with their hosts.

    Without a prompt it is a chat: /help shows its commands.

    Example: daaswarm infer "What is the capital of France?" --temperature 0
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not known", hint=f"choose from {', '.join(DTYPES)}")
    for option, given in (("--system", system), *(("--stop", text) for text in stop or [])):
        if given is not None and not is_utf8(given):
            raise ConfigError(f"{option} is not UTF-8 text", hint="convert it first, with iconv for example")
    if "" in (stop or []):
        raise ConfigError("--stop is empty", hint="give the text to end before, or leave --stop away")
    if raw and system is not None:
        raise ConfigError(
            "--system needs a chat template; --raw leaves it out", hint="put the instruction into the prompt"
        )
    if announce and listen is None:
        raise ConfigError("--announce has no meaning without --listen", hint="give both, or neither")
    if seed is not None and not 0 <= seed < 2**63:
        raise ConfigError(f"--seed {seed} is out of range", hint="choose a number from 0 to 2^63 - 1")
    config = read_config(
        folder,
        bootstrap=bootstrap,
        swarm_id=swarm_id,
        swarm_key=swarm_key,
        listen=listen,
        announce=announce,
        infer__model=model,
        infer__max_tokens=max_tokens,
        infer__temperature=temperature,
        infer__top_p=top_p,
        infer__codec=codec,
        infer__verify=str(parse_verify(verify)) if verify is not None else None,
        infer__device=device,
    )
    own = {  # settings of a node of its own
        "listen": listen,
        "announce": announce,
        "swarm_id": swarm_id,
        "swarm_key": swarm_key,
        "device": device,
    }
    params: dict[str, Any] = {
        "prompt": read_prompt(prompt) if prompt is not None else None,
        "model": locate_model(config.infer.model),
        "max_tokens": config.infer.max_tokens,
        "temperature": config.infer.temperature,
        "top_p": config.infer.top_p,
        "seed": seed,
        "prompt_lookup": config.infer.prompt_lookup,
        "system": system,
        "history": [],
        "stop": stop or [],
        "raw": raw,
        "dtype": dtype,
        "codec": config.infer.codec,
        "verify": config.infer.verify,
        "embedded": embedded,
        "force": force,
        "bootstrap": bootstrap or [],
    }
    if prompt is None:
        check_terminal(output, raw=raw)
        if is_node_running(folder):
            refuse_attached(folder, **own)
        raise typer.Exit(chat(folder, config, params, output, serve=listen is not None))
    result: dict[str, Any] = {}
    written: list[str] = []

    async def show_and_keep(event: dict[str, Any]) -> None:
        if event.get("event") == "text":
            written.append(event["text"])
        show(event, output)

    async def run() -> None:
        if is_node_running(folder):
            refuse_attached(folder, **own)
            result.update(await attach(folder, "infer", params, show_and_keep))
        else:
            from daaswarm.node.life import ask_once

            result.update(await ask_once(folder, config, show_and_keep, params, serve=listen is not None))

    def interrupt() -> Interrupted:
        return Interrupted("the answer was interrupted", text="".join(written))

    output.progress(WAITING, 0, 0)
    code = run_async(run, config, give_up=lambda: output.error(interrupt()), told=EXIT_INTERRUPTED)
    if not result:  # by Ctrl-C, or told to stop by SIGTERM or SIGHUP
        raise interrupt()
    output.end_line()
    output.json(result)
    output.message(summarise(result))
    raise typer.Exit(code)


def check_terminal(output: Output, *, raw: bool) -> None:
    """Raises:
    ConfigError: a chat was asked for where there can't be one.
    """
    if output.as_json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(
            "the prompt is missing, and without a terminal there is no chat",
            hint='write it like: daaswarm infer "What is a hash table?", or - to read it from standard input',
        )
    if raw:
        raise ConfigError("--raw needs a prompt: a chat is made of turns", hint="give the text to continue")


def chat(folder: DataDir, config: Config, params: dict[str, Any], output: Output, *, serve: bool) -> int:
    """A chat on this terminal, until whoever sits there leaves; the exit code."""
    from daaswarm.cli.chat import Chat, open_caller

    opened: list[Chat] = []

    async def run() -> None:
        folder.create()
        async with open_caller(folder, config, params, serve=serve) as call:
            opened.append(Chat(call, params, output, make_reader(folder)))
            await opened[0].run()

    return run_async(run, config, told=EXIT_INTERRUPTED, on_interrupt=lambda: bool(opened) and opened[0].interrupt())


def make_reader(folder: DataDir) -> Reader:
    """Reads what is typed, as well as the terminal can."""
    from daaswarm.cli.plain_reader import PlainReader, is_plain

    if is_plain():
        return PlainReader()
    from daaswarm.cli.chat import complete
    from daaswarm.cli.line_reader import LineReader

    return LineReader(folder.history_path, complete)


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
    retries = f", {describe_retries(result['retries'])}" if result["retries"] else ""
    moved = sum(host["bytes_sent"] + host["bytes_received"] for host in result["hosts"])
    coded = sum(host["coded_calls"] for host in result["hosts"])
    codec = "" if result["codec"] == "none" else f" ({coded} of these calls in {result['codec']})"
    return (
        f"[{result['completion_tokens']} tokens, {result['tokens_per_s']:.1f}/s, by {where}: {hosts}; "
        f"{result['calls']} calls, {format_bytes(moved)}{codec}{retries}; {describe_checks(result)}]"
    )


def describe_checks(result: dict[str, Any]) -> str:
    """What was checked, and how: ``"31 calls checked by sketches, all right"``."""
    audits = result["verify"]
    ways = [
        f"{audits[key]} calls checked {how}"
        for key, how in (("sketched", "by sketches"), ("compared", "by a second host"), ("recomputed", "here"))
        if audits[key]
    ]
    wrong = [f"…{each['peer_id'][-6:]} {each['calls']} wrong, replaced" for each in audits["wrong"]]
    if audits["unchecked"]:
        ways.append(f"{audits['unchecked']} could not be checked")
    if not ways:
        return "nothing checked: own hosts" if result["embedded"] else "nothing checked"
    return ", ".join(ways + (wrong or ["all right"] * (len(ways) > bool(audits["unchecked"]))))
