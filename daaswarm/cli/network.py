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
from daaswarm.cli.output import WAITING, Output, clean
from daaswarm.cli.run import attach, is_node_running, refuse_attached, run_to_end
from daaswarm.errors import EXIT_FAILED, ConfigError

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
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", min=0.1, max=60, help="Longest wait for one answer, in s (default: 4 or 5)."),
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
    params: dict[str, Any] = {"peer": peer, "bootstrap": config.network.bootstrap, "timeout_s": timeout}
    found: dict[str, Any] = {}

    async def emit(event: dict[str, Any]) -> None:
        output.json(event)
        show(event, output)

    async def run() -> None:
        if is_node_running(folder):
            refuse_attached(folder, swarm_id=swarm_id, swarm_key=swarm_key)
            found.update(await attach(folder, "diagnose", params, emit))
            return
        from daaswarm.node.life import open_node

        async with open_node(folder, config, listen=False, libp2p=False) as node:
            found.update(await node.control("diagnose", params, emit))

    run_to_end(run, config, output)
    output.json(found)
    if not as_json:
        conclude(found, output)
    if found["verdict"] == "failed":
        raise typer.Exit(EXIT_FAILED)


def show(event: dict[str, Any], output: Output) -> None:
    """One step, as it ends."""
    if output.as_json:
        return
    if event["event"] == "target":
        output.result(f"\n{clean(event['addr'])}")
    elif event["event"] == "step" and not event["seen"].startswith("needs "):
        timing = f" ({event['ms']:.0f} ms)" if event["ms"] >= 1 else ""
        output.result(f"  {event['name']:<10} {event['verdict']:<8} {clean(event['seen'])}{timing}")
        if event["next"] and event["verdict"] in ("failed", "warning"):
            output.result(f"  {'':<10} {'next:':<8} {clean(event['next'])}")
    output.progress(WAITING, 0, 0)


def conclude(found: dict[str, Any], output: Output) -> None:
    """The last lines, on standard error: which step it is, of whom."""
    targets = found["targets"]
    if "own" in found and not targets:
        output.message("no bootstrap address is configured or given, so nobody else was examined")
    if found["verdict"] != "failed":
        output.message("nothing fails" + (", but see the warnings" if found["verdict"] == "warning" else ""))
        return
    for target in [found["own"], *targets] if "own" in found else targets:
        if target["verdict"] == "failed":
            many = "own" in found or len(targets) > 1
            output.message(f"it fails at: {target['step']}" + f" ({clean(target.get('addr', 'this node'))})" * many)
