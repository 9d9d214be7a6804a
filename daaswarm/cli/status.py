"""``daaswarm status``: what runs here, what it holds, whom it knows."""

from __future__ import annotations

import shlex
from typing import Any

import trio
import typer

from daaswarm.cli.options import DataDirOption, JsonOption, open_data_dir
from daaswarm.cli.output import Output
from daaswarm.cli.run import attach, is_node_running
from daaswarm.config import get_cache_dir, load_config
from daaswarm.errors import ConfigError, StorageError
from daaswarm.store.data_dir import DataDir
from daaswarm.types import PeerId, format_bytes, format_range

ISLAND_NAMES = 6  # peers named of one island; status --json has all


def status(context: typer.Context, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show the running node, or what is on disk when none runs.

    Example: daaswarm status --json
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    source = context.get_parameter_source("data_dir")  # a default that isn't there yet is no mistake
    if source is not None and source.name == "COMMANDLINE" and not folder.path.exists():
        raise ConfigError(
            f"there is no data directory {folder.path}",
            hint=f"make it with daaswarm init --data-dir {shlex.quote(str(folder.path))}, or name another",
        )
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
        "known_peers": read_peers(folder),
        "hosted": [],
        "models": [{"name": m.name, "root": m.root, "folder": str(m.folder)} for m in list_models(get_cache_dir())],
    }


def read_peers(folder: DataDir) -> list[PeerId]:
    """Those that an earlier run knew. A file that can't be read is the next node's to mend: it sets it aside."""
    from daaswarm.store.database import read_database

    try:
        with read_database(folder.database_path) as database:
            return [] if database is None else [peer.peer_id for peer in database.get_peers()]
    except StorageError:
        return []


def render(found: dict[str, Any], output: Output) -> None:
    rows = [
        ("node", f"running (process {found['pid']})" if found["running"] else "not running"),
        ("peer id", found["peer_id"] or "none yet: daaswarm init"),
        ("folder", found["data_dir"]),
        *((("swarm", describe_swarm(found["swarm"])),) if "swarm" in found else ()),
        *(("address", address) for address in found["addrs"]),
        *(("not told", f"{left['host']} of {left['name']}: {left['reason']}") for left in found.get("left_out", [])),
        ("peers", f"{len(found['known_peers'])} known"),
    ]
    if found.get("reachability"):
        rows += [("reachable", line) for line in describe_reachability(found["reachability"])]
    rows += [("island", describe_island(island)) for island in found.get("islands", []) if island["peers"]]
    if found.get("paused"):
        rows.append(("paused", found["paused"]["reason"]))
    for model in found["hosted"]:
        held = ", ".join(f"{format_range(layers)}: {format_range(ids)}" for layers, ids in group_layers(model["held"]))
        size, calls = format_bytes(model["bytes"]), model["calls"]
        rows.append(("serves", f"{model['name']} {model['dtype']}, {size}, layers {held}; {calls} calls"))
    rows += [("kernel", describe_kernel(choice)) for choice in found.get("kernels", [])]
    rows += [("model", f"{model['name']} ({model['root'][:12]}) in {model['folder']}") for model in found["models"]]
    output.rows(rows)


def describe_swarm(swarm: dict[str, Any]) -> str:
    """``"home@k3x7q2m4a5bcd2ef, private"``."""
    return f"{swarm['id']}{', private' if swarm['private'] else ''}"


def describe_reachability(reach: dict[str, Any]) -> list[str]:
    """``["no: behind a NAT or firewall, seen at 203.0.113.7", "through the relay …3kQx9a at /ip4/…"]``."""
    seen = f", seen at {', '.join(reach['seen_at'])}" if reach["seen_at"] else ""
    lines = {
        "reachable": f"yes{seen}",
        "unreachable": f"no: behind a NAT or firewall{seen}",
        "unknown": f"not known yet: no peer could say{seen}",
        "local": "from this machine only",
        "not_listening": "no: it only dials",
    }
    found = [lines.get(str(reach["verdict"]), "?")]
    found += [f"through the relay …{relay['peer_id'][-6:]} at {relay['addr']}" for relay in reach["relays"]]
    if reach["verdict"] == "unreachable" and not reach["relays"]:
        found.append("no relay yet: only who shares its network reaches it")
    if reach["reservations"] or reach["circuits"]:
        passed = format_bytes(reach["bytes_passed"])
        found.append(f"relays for {reach['reservations']} peers: {reach['circuits']} circuits, {passed} passed")
    return found


def describe_island(island: dict[str, Any]) -> str:
    """``"this node and 2 peers within 0.4 ms: …3kQx9a, …Zb71Ff"``."""
    peers = island["peers"]
    who = ", ".join(f"…{peer['peer_id'][-6:]}" for peer in peers[:ISLAND_NAMES])
    who += f" and {len(peers) - ISLAND_NAMES} more" * (len(peers) > ISLAND_NAMES)
    count = f"{len(peers)} peer{'s' * (len(peers) > 1)}"
    rtts = [peer["rtt_ms"] for peer in peers]
    if island["own"]:
        return f"this node and {count} within {max(rtts):.1f} ms: {who}"
    return f"{count}, {min(rtts):.1f} ms away: {who}"


def describe_kernel(choice: dict[str, Any]) -> str:
    """``"packed for float32, 576 → 3072, 1536 → 576: 0.51 ms a row, 11.8 ms for 128 (eager: 0.91, 34.2)"``."""
    (outputs, inputs), (last, inner) = choice["first"], choice["down"]
    what = f"{choice['kernel']} for {choice['dtype']}, {inputs} → {outputs}, {inner} → {last}"
    if not choice["times_ms"]:
        return what
    times = {name: list(each.values()) for name, each in choice["times_ms"].items()}  # by rising numbers of rows
    chosen, most = times[choice["kernel"]], list(choice["times_ms"][choice["kernel"]])[-1]
    others = "; ".join(f"{n}: {t[0]:.2g}, {t[-1]:.3g}" for n, t in times.items() if n != choice["kernel"])
    wrong = f"; wrong here: {', '.join(choice['wrong'])}" if choice["wrong"] else ""
    return f"{what}: {chosen[0]:.2g} ms for 1 row, {chosen[-1]:.3g} for {most} ({others}){wrong}"


def group_layers(held: dict[str, list[int]]) -> list[tuple[list[int], list[int]]]:
    """Layers with the same experts together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for layer, ids in held.items():
        groups.setdefault(tuple(ids), []).append(int(layer))
    return [(layers, list(ids)) for ids, layers in groups.items()]


async def _ignore(event: dict[str, Any]) -> None:
    """``status`` has no events."""
