"""``daaswarm peers``: whom this node knows."""

from __future__ import annotations

import time
from typing import Any

import trio
import typer

from daaswarm.cli.options import DataDirOption, JsonOption, open_data_dir
from daaswarm.cli.output import Output
from daaswarm.cli.run import attach, is_node_running
from daaswarm.store.data_dir import DataDir

app = typer.Typer(no_args_is_help=True, help="Other nodes.")


@app.callback()
def peers() -> None:
    pass


@app.command("list")
def list_peers(data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show the peers that this node knows, connected ones first; from disk when none runs.

    Example: daaswarm peers list --json
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    found = trio.run(attach, folder, "peers", {}, _ignore) if is_node_running(folder) else read_disk(folder)
    if as_json:
        output.json(found)
        return
    if not found["peers"]:
        output.message("no peers known: daaswarm join --bootstrap ADDR meets some")
        return
    if not found["running"]:
        output.message("no node runs here; earlier ones met:")
    rows = [
        (
            peer["peer_id"],
            "by relay" if peer["relayed"] else "connected" if peer["connected"] else "",
            f"{peer['rtt_ms']:.1f} ms" if peer["rtt_ms"] is not None else "",
            format_age(time.time() - peer["last_seen"]),
            peer["agent"],
            " ".join(peer["addrs"]),
        )
        for peer in found["peers"]
    ]
    output.table(["peer", "", "round trip", "seen", "agent", "addresses"], rows)


def read_disk(folder: DataDir) -> dict[str, Any]:
    """Whom earlier runs met."""
    from daaswarm.store.database import read_database

    with read_database(folder.database_path) as database:
        known = [] if database is None else database.get_peers()
    return {
        "running": False,
        "peers": [
            {
                "peer_id": peer.peer_id,
                "addrs": peer.addrs,
                "connected": False,
                "relayed": False,
                "agent": peer.agent,
                "last_seen": peer.last_seen,
                "rtt_ms": None,
            }
            for peer in known
        ],
    }


def format_age(seconds: float) -> str:
    """``"5 min ago"``."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


async def _ignore(event: dict[str, Any]) -> None:
    """This method has no events."""
