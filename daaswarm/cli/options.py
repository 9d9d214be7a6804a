"""Options that several commands share, and what they mean."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from daaswarm.config import ENV_SWARM_KEY, Config, get_default_data_dir, load_config
from daaswarm.core.swarm_keys import MAX_TEXT, parse_swarm_key
from daaswarm.errors import ConfigError
from daaswarm.store.data_dir import DataDir
from daaswarm.systems import expand_user

DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", envvar="DAASWARM_HOME", show_envvar=True, help="Folder of this node: key, settings, lock."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON lines on standard output, nothing else.")]
BootstrapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--bootstrap",
        metavar="ADDR",
        help="Address of any node of the swarm, as its ready line printed it: /ip4/…/tcp/…/p2p/…. Repeatable.",
    ),
]
ListenOption = Annotated[
    str | None,
    typer.Option("--listen", metavar="ADDR", help="Where to accept connections (default: loopback, a free port)."),
]
AnnounceOption = Annotated[
    list[str] | None,
    typer.Option("--announce", metavar="ADDR", help="Address to tell others instead of --listen's. Repeatable."),
]
LanOption = Annotated[
    bool | None,
    typer.Option("--lan/--no-lan", help="Find peers on the local network, and be found there (multicast DNS)."),
]
SwarmIdOption = Annotated[
    str | None,
    typer.Option("--swarm-id", metavar="ID", help="The swarm: a public one's name, or a private one's id, NAME@…."),
]
SwarmKeyOption = Annotated[
    str | None,
    typer.Option("--swarm-key", metavar="FILE", help="Key of a private swarm, if it isn't kept here; - reads a line."),
]


def open_data_dir(path: Path | None) -> DataDir:
    """The folder given, or the default one; it may be missing.

    Raises:
        ConfigError: it is something else than a folder.
    """
    folder = expand_user(path or get_default_data_dir())
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder", hint="choose another with --data-dir")
    return DataDir(folder)


def name_folder(data_dir: DataDir) -> str:
    """What a command that is proposed needs to find this folder: ``" --data-dir …"``, or nothing for the default."""
    return "" if data_dir.path == get_default_data_dir() else f" --data-dir {shlex.quote(str(data_dir.path))}"


def read_config(
    data_dir: DataDir,
    *,
    bootstrap: list[str] | None = None,
    listen: str | None = None,
    announce: list[str] | None = None,
    swarm_id: str | None = None,
    swarm_key: str | None = None,
    **flags: object,
) -> Config:
    """Settings with this command's flags on top; ``flags`` are keys with ``__`` for the dot."""
    if swarm_key == "-":
        # For this process and the hosts that it starts; others of this user can't see it in a list of processes.
        os.environ[ENV_SWARM_KEY] = sys.stdin.readline(MAX_TEXT + 1).strip()
        parse_swarm_key(os.environ[ENV_SWARM_KEY], source="standard input")
        swarm_key = ""  # also instead of a file that the settings name
    elif swarm_key == "":
        raise ConfigError("--swarm-key is empty", hint="name a file, or - for a line of standard input")
    given: dict[str, object] = {
        "network.bootstrap": bootstrap or None,
        "network.listen": listen,
        "network.announce": announce or None,
        "network.swarm": swarm_id,
        "network.swarm_key_file": swarm_key,
    }
    given.update({name.replace("__", "."): value for name, value in flags.items()})
    return load_config(data_dir.config_path, flags=given)
