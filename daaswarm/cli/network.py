"""``daaswarm network``: why peers can't see each other."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from daaswarm.cli.complete import complete_peers
from daaswarm.cli.options import (
    BootstrapOption,
    DataDirOption,
    JsonOption,
    SwarmIdOption,
    SwarmKeyOption,
    open_data_dir,
    read_config,
)
from daaswarm.cli.output import Output
from daaswarm.cli.run import attach, is_node_running, refuse_attached, run_async
from daaswarm.cli.status import describe_reachability
from daaswarm.errors import EXIT_FAILED, EXIT_OK, ConfigError

app = typer.Typer(no_args_is_help=True, help="Reaching others, and being reached.")


@app.callback()
def network() -> None:
    pass


@app.command("diagnose")
def diagnose(
    peer: Annotated[
        str | None,
        typer.Argument(
            autocompletion=complete_peers,
            metavar="[PEER]",
            help="An address (/ip4/…/tcp/…/p2p/…) or a PeerId; without it, this node and its bootstrap addresses.",
        ),
    ] = None,
    bootstrap: BootstrapOption = None,
    swarm_id: SwarmIdOption = None,
    swarm_key: SwarmKeyOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Try to reach a peer step by step, and say which step fails and what to do. Exit code 1 if one fails.

    Example: daaswarm network diagnose /ip4/203.0.113.5/tcp/4001/p2p/12D3Koo…
    """
    output = Output(as_json=as_json)
    folder = open_data_dir(data_dir)
    config = read_config(folder, bootstrap=bootstrap, swarm_id=swarm_id, swarm_key=swarm_key)
    if peer is not None and not peer.strip():
        raise ConfigError("the peer is an empty word", hint="give an address or a PeerId, or leave it away")
    params: dict[str, Any] = {"peer": peer, "bootstrap": config.network.bootstrap}
    found: dict[str, Any] = {}

    async def emit(event: dict[str, Any]) -> None:
        output.json(event)
        show(event, output)

    async def run() -> None:
        if is_node_running(folder):
            refuse_attached(folder, swarm_id=swarm_id, swarm_key=swarm_key)
            if peer is None:
                show_own(await attach(folder, "status", {}, emit), output)
            found.update(await attach(folder, "diagnose", params, emit))
            return
        from daaswarm.node.life import open_node

        async with open_node(folder, config, listen=False, libp2p=False) as node:
            found.update(await node.control("diagnose", params, emit))

    code = run_async(run, config)
    if found:
        output.json(found)
        if not as_json:
            conclude(found, output)
    raise typer.Exit(code if code != EXIT_OK or found["verdict"] != "failed" else EXIT_FAILED)


def show_own(status: dict[str, Any], output: Output) -> None:
    """What a running node says of itself."""
    if output.as_json:
        return
    rows = [("address", address) for address in status["addrs"]]
    rows += [("not told", f"{left['host']} of {left['name']}: {left['reason']}") for left in status["left_out"]]
    rows += [("reachable", line) for line in describe_reachability(status["reachability"])]
    rows.append(("peers", f"{len(status['known_peers'])} known"))
    output.rows(rows)


def show(event: dict[str, Any], output: Output) -> None:
    """One step, as it ends."""
    if output.as_json:
        return
    if event["event"] == "target":
        output.result(f"\n{event['addr']}")
    elif event["event"] == "step" and not event["seen"].startswith("needs "):
        timing = f" ({event['ms']:.0f} ms)" if event["ms"] >= 1 else ""
        output.result(f"  {event['name']:<10} {event['verdict']:<8} {event['seen']}{timing}")
        if event["next"] and event["verdict"] in ("failed", "warning"):
            output.result(f"  {'':<10} {'next:':<8} {event['next']}")


def conclude(found: dict[str, Any], output: Output) -> None:
    """The last line."""
    targets = found["targets"]
    if not targets:
        output.message("no bootstrap address is configured or given, so there is nobody to examine")
        return
    bad = [target for target in targets if target["verdict"] == "failed"]
    if not bad:
        output.message("nothing fails" + (", but see the warnings" if found["verdict"] == "warning" else ""))
    for target in bad:
        output.message(f"it fails at: {target['step']}" + (f" ({target['addr']})" if len(targets) > 1 else ""))
