"""``daaswarm host-expert``: serve experts of a model."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from daaswarm.cli.complete import complete_dtypes, complete_layers
from daaswarm.cli.host_options import (
    DeviceOption,
    NiceOption,
    PauseWhenBusyOption,
    QuietHoursOption,
    ThreadsOption,
    UploadOption,
)
from daaswarm.cli.log_setup import log_to_file
from daaswarm.cli.options import (
    AnnounceOption,
    BootstrapOption,
    DataDirOption,
    JsonOption,
    LanOption,
    ListenOption,
    SwarmIdOption,
    SwarmKeyOption,
    open_data_dir,
    read_config,
)
from daaswarm.cli.output import Output
from daaswarm.cli.run import attach, is_node_running, refuse_attached, run_async, show
from daaswarm.cli.streams import never_wait_for_readers
from daaswarm.errors import ConfigError
from daaswarm.systems import expand_user
from daaswarm.types import DTYPES, parse_bytes, parse_range


def complete_models(incomplete: str) -> list[str]:
    from daaswarm.config import get_cache_dir
    from daaswarm.models.sources import DEFAULT_MODEL, list_models

    names = {DEFAULT_MODEL, *(model.name for model in list_models(get_cache_dir()))}
    return sorted(name for name in names if name.startswith(incomplete))


def locate_model(name: str) -> str:
    """A path made absolute, since the node that this command attaches to has a current folder of its own."""
    from daaswarm.models.sources import DEFAULT_MODEL

    if name.lower() in (DEFAULT_MODEL, "default"):
        return name
    path = expand_user(name)
    return str(path.absolute()) if path.exists() else name


def host_expert(
    model: Annotated[
        str,
        typer.Argument(
            autocompletion=complete_models,
            help="The default model's name, a folder in Hugging Face layout, or a GGUF file.",
        ),
    ],
    layers: Annotated[
        str | None,
        typer.Option("--layers", autocompletion=complete_layers, help="Layers to serve, like 0-14 (inclusive)."),
    ] = None,
    experts: Annotated[str | None, typer.Option("--experts", help="Experts of a mixture-of-experts model.")] = None,
    slices: Annotated[str | None, typer.Option("--slices", help="Slices of a dense model's feed-forward nets.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", autocompletion=complete_dtypes, help="Compute in f32, bf16 or f16.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Hold this much at most; with no ranges given, fill it with the experts that have fewest hosts.",
        ),
    ] = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    nice: NiceOption = None,
    quiet_hours: QuietHoursOption = None,
    pause_when_busy: PauseWhenBusyOption = None,
    upload: UploadOption = None,
    until_eof: Annotated[
        bool, typer.Option("--until-eof", help="Stop when standard input closes (for supervisors).")
    ] = False,
    bootstrap: BootstrapOption = None,
    swarm_id: SwarmIdOption = None,
    swarm_key: SwarmKeyOption = None,
    listen: ListenOption = None,
    announce: AnnounceOption = None,
    lan: LanOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve experts of a model until Ctrl-C. Reads only the bytes of those experts.

    Example: daaswarm host-expert smollm2-135m-instruct --layers 0-14 --bootstrap /ip4/…/tcp/…/p2p/…
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not served", hint=f"choose from {', '.join(DTYPES)}")
    if experts is not None and slices is not None:
        raise ConfigError(
            "--experts and --slices exclude each other",
            hint="--experts is for mixture-of-experts models, --slices for dense",
        )
    for option, text in (("--layers", layers), ("--experts", experts), ("--slices", slices)):
        if text is not None:
            parse_range(text, option=option)
    if memory is not None:
        parse_bytes(memory, option="--memory")
    config = read_config(
        folder,
        bootstrap=bootstrap,
        swarm_id=swarm_id,
        swarm_key=swarm_key,
        listen=listen,
        announce=announce,
        network__lan=lan,
        host__dtype=dtype,
        host__memory=memory,
        host__device=device,
        host__threads=threads,
        host__nice=nice,
        host__quiet_hours=quiet_hours or None,
        host__pause_when_busy=pause_when_busy,
        host__upload=upload,
    )
    params = {
        "model": locate_model(model),
        "layers": layers,
        "experts": experts,
        "slices": slices,
        "dtype": config.host.dtype,
        "memory_bytes": parse_bytes(config.host.memory, option="--memory"),
        "bootstrap": bootstrap or [],
    }

    async def run() -> None:
        from daaswarm.cli.supervise import ended_by_eof

        async with ended_by_eof(until_eof):
            if is_node_running(folder):
                refuse_attached(
                    folder,
                    listen=listen,
                    announce=announce,
                    swarm_id=swarm_id,
                    swarm_key=swarm_key,
                    device=device,
                    threads=threads,
                    nice=nice,
                    quiet_hours=quiet_hours,
                    pause_when_busy=pause_when_busy,
                    upload=upload,
                )
                await attach(folder, "host", params, partial(_show, output))
            else:
                from daaswarm.node.life import run_node

                never_wait_for_readers()
                with log_to_file(folder.log_path, config.log.file_level):
                    await run_node(folder, config, partial(_show, output), host=params)

    code = run_async(run, config)
    output.json({"event": "stopped"})
    output.message("stopped")
    raise typer.Exit(code)


async def _show(output: Output, event: dict[str, object]) -> None:
    show(event, output)
