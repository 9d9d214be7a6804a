"""``daaswarm join``: run a node in the foreground."""

from __future__ import annotations

from functools import partial

import typer

from daaswarm.cli.host_options import (
    DeviceOption,
    MemoryOption,
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
from daaswarm.cli.run import run_async, show
from daaswarm.cli.streams import never_wait_for_readers


def join(
    bootstrap: BootstrapOption = None,
    swarm_id: SwarmIdOption = None,
    swarm_key: SwarmKeyOption = None,
    listen: ListenOption = None,
    announce: AnnounceOption = None,
    lan: LanOption = None,
    memory: MemoryOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    nice: NiceOption = None,
    quiet_hours: QuietHoursOption = None,
    pause_when_busy: PauseWhenBusyOption = None,
    upload: UploadOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a node until Ctrl-C. Other commands on the same folder attach to it.

    Example: daaswarm join --listen /ip4/0.0.0.0/tcp/4001
    """
    from daaswarm.node.life import run_node

    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    config = read_config(
        folder,
        bootstrap=bootstrap,
        swarm_id=swarm_id,
        swarm_key=swarm_key,
        listen=listen,
        announce=announce,
        network__lan=lan,
        host__memory=memory,
        host__device=device,
        host__threads=threads,
        host__nice=nice,
        host__quiet_hours=quiet_hours or None,
        host__pause_when_busy=pause_when_busy,
        host__upload=upload,
    )

    async def run() -> None:
        never_wait_for_readers()
        with log_to_file(folder.log_path, config.log.file_level):
            await run_node(folder, config, partial(_show, output))

    code = run_async(run, config)
    output.json({"event": "stopped"})
    output.message("stopped")
    raise typer.Exit(code)


async def _show(output: Output, event: dict[str, object]) -> None:
    show(event, output)
