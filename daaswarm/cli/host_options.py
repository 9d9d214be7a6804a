"""Options of the commands that start a node: what it may take of its owner's machine."""

from __future__ import annotations

from typing import Annotated

import typer

from daaswarm.cli.complete import complete_devices

MemoryOption = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="Hold this much of experts at most, all together: 4GB, 512MiB."),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=0, max=1024, help="Threads to compute with; 0 for one per core.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        autocompletion=complete_devices,
        help="Compute on the processor (cpu), a GPU (cuda, cuda:1), or a GPU if there is one (auto).",
    ),
]
NiceOption = Annotated[
    int | None, typer.Option("--nice", min=0, max=19, help="Let other programs go first: 19 is the most polite.")
]
QuietHoursOption = Annotated[
    list[str] | None,
    typer.Option(
        "--quiet-hours",
        metavar="FROM-TO",
        help="Compute nothing for others then: 08:00-18:00, local time; may span midnight. Repeatable.",
    ),
]
PauseWhenBusyOption = Annotated[
    float | None,
    typer.Option(
        "--pause-when-busy",
        metavar="SHARE",
        min=0.0,
        max=1.0,
        help="Pause while other programs use more than this share of all cores: 0.5 is half; 0 never pauses.",
    ),
]
UploadOption = Annotated[
    str | None,
    typer.Option("--upload", metavar="SIZE", help="Send at most this much a second to others: 50MB."),
]
