"""``daaswarm peers``: whom this node knows."""

from __future__ import annotations

import time
from typing import Annotated, Any

import trio
import typer

from daaswarm.cli.options import DataDirOption, JsonOption, open_data_dir
from daaswarm.cli.output import Output
from daaswarm.cli.run import attach, is_node_running
from daaswarm.core.reputation import Reputation
from daaswarm.errors import ConfigError
from daaswarm.store.data_dir import DataDir
from daaswarm.types import PeerId

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
            format_age(time.time() - peer["last_seen"]) if peer["last_seen"] else "",
            format_trust(peer["trust"]),
            peer["agent"],
            " ".join(peer["addrs"]),
        )
        for peer in found["peers"]
    ]
    output.table(["peer", "", "round trip", "seen", "trust", "agent", "addresses"], rows)


def read_disk(folder: DataDir) -> dict[str, Any]:
    """Whom earlier runs met."""
    from daaswarm.node.trusting import describe_trust
    from daaswarm.store.database import read_database
    from daaswarm.store.records import PeerRecord

    with read_database(folder.database_path) as database:
        known = [] if database is None else database.get_peers()
        trust = {} if database is None else describe_trust(database.get_standings())
    met = {peer.peer_id for peer in known}
    known += [PeerRecord(peer_id=peer, addrs=[], first_seen=0, last_seen=0) for peer in trust if peer not in met]
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
                "trust": trust.get(peer.peer_id),
            }
            for peer in known
        ],
    }


@app.command()
def forgive(
    peer: Annotated[str, typer.Argument(help="A PeerId, as peers list shows it.")],
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a host again that was banned for wrong answers. Each of its calls is checked at first.

    Example: daaswarm peers forgive 12D3KooW…
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    if is_node_running(folder):
        found = trio.run(attach, folder, "forgive", {"peer": peer}, _ignore)
    else:
        with folder.lock():
            found = {"peer_id": peer, "known": forgive_on_disk(folder, PeerId(peer))}
    if not found["known"]:
        raise ConfigError(f"nothing is known of {peer}", hint="daaswarm peers list shows who was checked")
    output.json(found)
    output.message(f"{peer} is on probation")


def forgive_on_disk(folder: DataDir, peer: PeerId) -> bool:
    """Whether anything was known of the peer."""
    from daaswarm.store.database import Database

    if not folder.database_path.exists():
        return False
    database = Database.open(folder.database_path)
    try:
        reputation = Reputation(database.get_standings())
        found = reputation.forgive(peer)
        database.put_standings(reputation.take_changed())
        return found
    finally:
        database.close()


def format_trust(trust: dict[str, Any] | None) -> str:
    """``"0.98 trusted"``; empty for who was never checked."""
    if trust is None:
        return ""
    return f"banned: {trust['reason']}" if trust["state"] == "banned" else f"{trust['trust']:.2f} {trust['state']}"


def format_age(seconds: float) -> str:
    """``"5 min ago"``."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


async def _ignore(event: dict[str, Any]) -> None:
    """This method has no events."""
