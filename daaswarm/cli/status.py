"""``daaswarm status``: what runs here, what it holds, whom it knows."""

from __future__ import annotations

from typing import Any

import trio
from rich.table import Table

from daaswarm.cli.options import DataDirOption, JsonOption, open_data_dir
from daaswarm.cli.output import Output, escape
from daaswarm.cli.run import attach, is_node_running
from daaswarm.config import get_cache_dir, load_config
from daaswarm.store.data_dir import DataDir
from daaswarm.types import format_bytes, format_range


def status(data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show the running node, or what is on disk when none runs.

    Example: daaswarm status --json
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    if is_node_running(folder):
        found = trio.run(attach, folder, "status", {}, _ignore)
    else:
        found = read_disk(folder)
    if as_json:
        output.json(found)
    else:
        render(found, output)


def read_disk(folder: DataDir) -> dict[str, Any]:
    """What can be said without a node."""
    from daaswarm.core.signing import get_peer_id
    from daaswarm.models.sources import list_models

    load_config(folder.config_path)
    return {
        "running": False,
        "peer_id": get_peer_id(folder.load_key().verify_key.encode()) if folder.has_key() else None,
        "data_dir": str(folder.path),
        "addrs": [],
        "known_peers": [contact.peer_id for contact in folder.load_contacts()],
        "hosted": [],
        "models": [{"name": m.name, "root": m.root, "folder": str(m.folder)} for m in list_models(get_cache_dir())],
    }


def render(found: dict[str, Any], output: Output) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    state = f"running (process {found['pid']})" if found["running"] else "not running"
    table.add_row("node", state)
    table.add_row("peer id", found["peer_id"] or "none yet: daaswarm init")
    table.add_row("folder", escape(found["data_dir"]))
    for address in found["addrs"]:
        table.add_row("address", address)
    table.add_row("peers", f"{len(found['known_peers'])} known")
    for model in found["hosted"]:
        held = ", ".join(f"{format_range(layers)}: {format_range(ids)}" for layers, ids in group_layers(model["held"]))
        size, calls = format_bytes(model["bytes"]), model["calls"]
        table.add_row("serves", escape(f"{model['name']} {model['dtype']}, {size}, layers {held}; {calls} calls"))
    for model in found["models"]:
        table.add_row("model", escape(f"{model['name']} ({model['root'][:12]}) in {model['folder']}"))
    output.answers.print(table)


def group_layers(held: dict[str, list[int]]) -> list[tuple[list[int], list[int]]]:
    """Layers with the same experts together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for layer, ids in held.items():
        groups.setdefault(tuple(ids), []).append(int(layer))
    return [(layers, list(ids)) for ids, layers in groups.items()]


async def _ignore(event: dict[str, Any]) -> None:
    """``status`` has no events."""
