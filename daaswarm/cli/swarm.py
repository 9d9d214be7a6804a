"""``daaswarm swarm``: private swarms, their keys, and whom this node meets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import trio
import typer

from daaswarm.cli.complete import complete_peers, complete_swarms
from daaswarm.cli.options import DataDirOption, JsonOption, name_folder, open_data_dir, read_config
from daaswarm.cli.output import Output
from daaswarm.cli.run import attach, is_node_running
from daaswarm.config import set_value
from daaswarm.core.allow_list import check_allowed
from daaswarm.core.swarm_keys import MAX_TEXT, TEXT_PREFIX, SwarmKey, parse_swarm_key
from daaswarm.errors import ConfigError, DaaswarmError
from daaswarm.store.data_dir import DataDir
from daaswarm.store.swarm_keys import (
    create_swarm_key,
    get_key_path,
    get_stored,
    list_stored,
    load_swarm_key,
    read_key_file,
    store_swarm_key,
)

app = typer.Typer(no_args_is_help=True, help="Private swarms: their keys, and whom this node meets.")

PeersArgument = Annotated[list[str], typer.Argument(autocompletion=complete_peers, help="PeerIds.", metavar="PEER...")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What to call it; its id gets a few letters more.")],
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a swarm that only nodes with its key can join. The key is kept in this node's folder, readable by you only.

    Example: daaswarm swarm create home
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    key = create_swarm_key(name)
    path = store_swarm_key(folder, key)
    output.json({"swarm_id": key.swarm_id, "name": key.name, "key_file": str(path)})
    output.result(key.swarm_id)
    output.message(f"its key: {path}. Whoever has it is in, so hand it over as you would a password.")
    output.message(f"join here:   daaswarm join --swarm-id {key.swarm_id}{name_folder(folder)}")
    output.message("elsewhere:   daaswarm swarm add FILE, with a copy of that file; then join in the same way")
    output.message(f"for good:    daaswarm config set network.swarm {key.swarm_id}{name_folder(folder)}")


@app.command()
def add(
    file: Annotated[str, typer.Argument(help="The key's file, or - to read it as a line.")],
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep the key of a private swarm in this node's folder.

    Example: daaswarm swarm add - <<< "$KEY"
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    if file.strip().lower().startswith(f"{TEXT_PREFIX}:"):  # it must not be repeated, in a log for example
        raise ConfigError(
            "this is a key, not the file of one, and every user of this machine can list arguments",
            hint="pass it on standard input: daaswarm swarm add -",
        )
    if file == "-":
        key = parse_swarm_key(sys.stdin.readline(MAX_TEXT + 1), source="standard input")
    else:
        key = read_key_file(Path(file))
    path = store_swarm_key(folder, key)
    output.json({"swarm_id": key.swarm_id, "name": key.name, "key_file": str(path)})
    output.result(key.swarm_id)
    output.message(f"join: daaswarm join --swarm-id {key.swarm_id}{name_folder(folder)}")


@app.command("list")
def list_(data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show the private swarms whose keys are here.

    Example: daaswarm swarm list --json
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    own = read_config(folder).network.swarm
    swarms = [
        {"swarm_id": swarm_id, "key_file": str(get_key_path(folder, swarm_id)), "own": swarm_id == own}
        for swarm_id in list_stored(folder)
    ]
    if as_json:
        output.json({"swarms": swarms})
    elif not swarms:
        output.message("no keys here: daaswarm swarm create NAME makes one, swarm add FILE takes one")
    else:
        rows = [(str(s["swarm_id"]), "this node's" if s["own"] else "", str(s["key_file"])) for s in swarms]
        output.table(["swarm", "", "key"], rows)


@app.command()
def show(
    swarm_id: Annotated[
        str | None, typer.Argument(autocompletion=complete_swarms, help="A private swarm's id; left out: this node's.")
    ] = None,
    with_key: Annotated[bool, typer.Option("--key", help="Print its key, a line, and nothing else.")] = False,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the swarm of the node that runs here, or else the one that the settings name; or another whose key is here.

    Example: daaswarm swarm show --key | ssh HOST daaswarm swarm add -
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    config = read_config(folder)
    if swarm_id is None and is_node_running(folder):  # perhaps in another than the settings name: join --swarm-id
        swarm = trio.run(attach, folder, "status", {}, _ignore)["swarm"]
        key = find_key(folder, swarm["id"]) if with_key and swarm["private"] else None
    else:
        key = load_swarm_key(folder, config) if swarm_id is None else find_key(folder, swarm_id)
        swarm = {"id": config.network.swarm if key is None else key.swarm_id, "private": key is not None}
    if with_key and key is None:
        raise ConfigError(f"{swarm['id']} has no key: anybody may join it", hint="see daaswarm swarm list")
    found: dict[str, Any] = {"swarm_id": swarm["id"], "private": swarm["private"], "allow": config.network.allow}
    if with_key and key is not None:
        found["key"] = key.text
    if as_json:
        output.json(found)
    elif with_key:
        output.result(found["key"])
    else:
        rows = [("swarm", found["swarm_id"]), ("who may join", "who has the key" if found["private"] else "anybody")]
        if swarm_id is None:
            rows += [("allowed", peer) for peer in found["allow"]] or [("allowed", "all of them")]
        output.rows(rows)


@app.command()
def remove(
    swarm_id: Annotated[str, typer.Argument(autocompletion=complete_swarms, help="Its id.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Without it nothing is removed.")] = False,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove the key of a private swarm from this node's folder. A node that runs in it stays there until it ends.

    Example: daaswarm swarm remove home@k3x7q2m4a5bcd2ef --yes
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    path = get_key_path(folder, swarm_id)
    if not path.exists():
        raise ConfigError(f"the key of {swarm_id} is not here", hint="see daaswarm swarm list")
    if not yes:
        raise ConfigError(
            f"if {path} is the only copy of the key, nobody can join {swarm_id} any more", hint="say so with --yes"
        )
    try:
        path.unlink()
    except OSError as error:
        raise ConfigError(f"{path} can't be removed: {error.strerror}", hint="check the folder's owner") from error
    output.json({"swarm_id": swarm_id, "removed": str(path)})
    output.message(f"removed {path}")


@app.command()
def allow(peers: PeersArgument, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Meet these peers, and nobody who isn't on the list. Others of the swarm are refused from the first one on.

    Example: daaswarm swarm allow 12D3KooW…
    """
    folder = open_data_dir(data_dir)
    check_allowed(peers)
    before = read_config(folder).network.allow
    change_allowed(folder, list(dict.fromkeys([*before, *peers])), Output(as_json=as_json))


@app.command()
def disallow(peers: PeersArgument, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Take peers off the list. The last one stays: an empty list would let in all of the swarm.

    Example: daaswarm swarm disallow 12D3KooW…
    """
    folder = open_data_dir(data_dir)
    before = read_config(folder).network.allow
    for peer in peers:
        if peer not in before:
            raise ConfigError(f"{peer} is not on the list", hint="daaswarm swarm show has it")
    after = [peer for peer in before if peer not in peers]
    if not after:
        raise ConfigError(
            "that would empty the list, and let in all of the swarm",
            hint="if you mean that: daaswarm config set network.allow '', and start the node anew",
        )
    change_allowed(folder, after, Output(as_json=as_json))


def change_allowed(folder: DataDir, peers: list[str], output: Output) -> None:
    """Write the list, and have a running node keep to it from now on."""
    check_allowed(peers)
    folder.create()
    set_value(folder.config_path, "network.allow", ",".join(peers))
    closed: list[str] | None = None
    if is_node_running(folder):
        try:
            closed = trio.run(attach, folder, "allow", {"peers": peers}, _ignore)["closed"]
        except DaaswarmError:
            output.message(
                "the list is written, but the node that runs doesn't know it yet: it will from its next start on"
            )
            raise
    output.json({"allow": peers, "running": closed is not None, "closed": closed or []})
    for peer in peers:
        output.result(peer)
    if closed:
        output.message(f"the running node hung up on {', '.join(closed)}")


def find_key(folder: DataDir, swarm_id: str) -> SwarmKey:
    """Raises:
    ConfigError: it isn't here.
    """
    key = get_stored(folder, swarm_id)
    if key is None:
        raise ConfigError(f"the key of {swarm_id} is not here", hint="see daaswarm swarm list")
    return key


async def _ignore(event: dict[str, Any]) -> None:
    """This method has no events."""
