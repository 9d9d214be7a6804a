"""The life of a node: how it is put together, runs, and leaves."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from daaswarm import __version__
from daaswarm.api.control import serve_control
from daaswarm.config import Config, NetworkConfig
from daaswarm.core.routing_table import get_node_id
from daaswarm.errors import ConfigError, DaaswarmError
from daaswarm.messages import Contact, Reply, Request
from daaswarm.net.addresses import is_loopback, parse_address
from daaswarm.net.dataplane import TcpNetwork, open_tcp_network
from daaswarm.net.discovery import Discovery
from daaswarm.net.handshake import Identity
from daaswarm.net.inbound import InboundBudget
from daaswarm.net.lan import Lan
from daaswarm.net.network import FastHandler, Handler
from daaswarm.net.scope import open_service_nursery
from daaswarm.node.coordinator import SwarmCoordinator, check_bootstrap, describe_swarm
from daaswarm.node.identity import load_identity
from daaswarm.node.reporting import Emit, Event
from daaswarm.node.systemd import Systemd
from daaswarm.node.vigil import Vigil
from daaswarm.store.data_dir import DataDir
from daaswarm.store.node_store import open_node_store
from daaswarm.types import PeerId

if TYPE_CHECKING:
    from daaswarm.net.frames import Buffer

LISTEN_HINT = "write it like /ip4/0.0.0.0/tcp/4001 (all interfaces) or /ip4/127.0.0.1/tcp/0 (this machine, a free port)"
ANNOUNCE_HINT = "write what others can dial, like /ip4/203.0.113.5/tcp/4001 or /dns4/swarm.example.net/tcp/4001"

READY_S = 10.0  # after that libp2p starts even if what is to be served is still being read

logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_node(
    data_dir: DataDir, config: Config, *, listen: bool, libp2p: bool, is_owner: bool = False
) -> AsyncIterator[SwarmCoordinator]:
    """A node that is connected to nobody yet; at the end of the block it says goodbye and is closed.

    Args:
        listen: accept connections. A node that only asks need not.
        libp2p: also speak libp2p on the same port, once the node is ready (its import takes a second).
        is_owner: the data directory is locked for this node; it remembers its peers there.

    Raises:
        ConfigError: a bad key or address, a port in use, or a database of a newer program.
    """
    check_addresses(config, listen=listen)
    identity = load_identity(data_dir, config)
    left = trio.Event()
    opened: list[SwarmCoordinator] = []
    failed: list[Exception] = []

    async def live(*, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        try:
            with trio.CancelScope() as scope:
                async with _open_parts(
                    data_dir, config, identity, listen=listen, libp2p=libp2p, is_owner=is_owner
                ) as node:
                    await trio.lowlevel.checkpoint_if_cancelled()
                    # From here on, what cancels the block must not cut the connections through which the node leaves.
                    scope.shield = True
                    opened.append(node)
                    task_status.started()
                    await left.wait()
                    await node.leave()
                    if is_owner:
                        logger.info("%s has left", node.peer_id)
        except Exception as error:
            if opened:
                raise
            failed.append(error)  # raised below as it is, not in a group
            task_status.started()

    async with open_service_nursery() as nursery:
        try:
            await nursery.start(live)
            if failed:
                raise failed[0]
            yield opened[0]
        finally:
            left.set()


@asynccontextmanager
async def _open_parts(
    data_dir: DataDir, config: Config, identity: Identity, *, listen: bool, libp2p: bool, is_owner: bool
) -> AsyncIterator[SwarmCoordinator]:
    coordinator: SwarmCoordinator

    def handle_inline(
        peer: PeerId, message: Request, body: memoryview, deadline_s: float
    ) -> tuple[Reply, Sequence[Buffer]] | None:
        return coordinator.handle_inline(peer, message, body, deadline_s)

    async def handle(
        peer: PeerId, contact: Contact | None, message: Request, body: memoryview, deadline_s: float
    ) -> tuple[Reply, Sequence[Buffer]]:
        return await coordinator.handle(peer, contact, message, body, deadline_s)

    budget = InboundBudget()
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_node_store(data_dir.database_path, is_owner=is_owner))
        network = await stack.enter_async_context(
            open_tcp_network(
                identity,
                handler=handle,
                fast_handler=handle_inline,
                listen=[config.network.listen] if listen else [],
                announce=config.network.announce,
                interfaces=config.network.interfaces,
                budget=budget,
            )
        )
        is_private = identity.swarm_key is not None
        discovery = Discovery(network, identity.key, identity.swarm, random.Random(), is_private=is_private)
        nursery = await stack.enter_async_context(open_service_nursery())
        coordinator = SwarmCoordinator(data_dir, config, network, discovery, store, nursery, is_owner=is_owner)
        await nursery.start(discovery.run)
        if libp2p and config.network.libp2p and not is_private:  # libp2p's streams prove no swarm key
            network.splicer.settled = trio.Event()
            nursery.start_soon(run_libp2p, coordinator, identity, handle, handle_inline, budget)
        yield coordinator


async def run_libp2p(
    node: SwarmCoordinator, identity: Identity, handle: Handler, handle_inline: FastHandler, budget: InboundBudget
) -> None:
    """The same node for libp2p peers and browsers, who wait until then. A failure costs them, not the node."""
    with trio.move_on_after(READY_S):
        await node.ready.wait()
    from daaswarm.net.libp2p_host import open_libp2p_host

    splicer = node.network.splicer
    try:
        async with open_libp2p_host(identity, handler=handle, fast_handler=handle_inline, budget=budget) as running:
            splicer.targets.update(running.targets)
            splicer.settled.set()
            await trio.sleep_forever()
    except Exception as error:  # noqa: BLE001 - whatever py-libp2p raises
        logger.warning("libp2p peers can't connect: %s", error)
    finally:
        splicer.targets.clear()
        splicer.settled.set()


async def run_node(data_dir: DataDir, config: Config, emit: Emit, *, host: Event | None = None) -> None:
    """``join`` and ``host-expert``: a node in the foreground, until cancelled.

    Raises:
        ConfigError: another node runs on the data directory, a port is in use, no bootstrap address answers and no
            peer of an earlier run either, or what is to be hosted can't be.
    """
    check_addresses(config, listen=True)
    systemd = Systemd(os.environ)

    async def tell(event: Event) -> None:
        await emit(event)
        if event["event"] == "ready":
            node.ready.set()
            systemd.ready()

    with data_dir.lock():
        opened = open_node(data_dir, config, listen=True, libp2p=True, is_owner=True)
        async with opened as node, _saying_goodbye(systemd), trio.open_nursery() as nursery:
            nursery.start_soon(systemd.keep_alive)
            node.neighbour.step_back()
            wish = await node.hosting.check(host, emit) if host is not None else None
            if wish is not None:
                await node.memory.note_model(wish.model)
            seeds = await node.memory.recall()
            logger.info("daaswarm %s starts as %s on %s", __version__, node.peer_id, ", ".join(node.addrs))
            await _meet(node, config.network.bootstrap, seeds)
            await nursery.start(serve_control, data_dir.socket_path, node.control)
            nursery.start_soon(node.memory.keep_saving)
            nursery.start_soon(node.neighbour.keep_watching)
            nursery.start_soon(node.reaching.keep)
            nursery.start_soon(Vigil(node.network, node.discovery, node.hosting).keep)
            if config.network.lan:
                nursery.start_soon(Lan(node.network.identity.swarm, lambda: node.network.contact, node.meet).run)
            await restore(node, emit)
            if wish is not None:
                await node.serve(wish, tell)
            else:
                await node.reaching.wait_settled()
                lines = describe_binding(config, node.network) + node.reaching.get_lines()
                await tell({"event": "ready", "peer_id": node.peer_id, "addrs": node.addrs, "lines": lines})
                await trio.sleep_forever()


async def restore(node: SwarmCoordinator, emit: Emit) -> None:
    """Serve what was deployed in earlier runs. A surprise costs what was not restored yet, not the node."""
    try:
        await node.operating.deploying.restore(emit)
    except DaaswarmError:  # what can't be served is no error, so this is of ``emit``: nobody hears what is said
        raise
    except Exception:
        logger.exception("not all that is deployed here is served")


async def _meet(node: SwarmCoordinator, bootstrap: list[str], seeds: list[Contact]) -> None:
    """Find the swarm through the bootstrap addresses, or through peers of an earlier run where none of them answers.

    Raises:
        ConfigError: neither led to a peer; says why for each address.
    """
    node.discovery.restore(seeds)
    try:
        await node.bootstrap(bootstrap)
    except ConfigError as error:
        if not seeds or not (await node.discovery.lookup(get_node_id(node.peer_id), "nodes")).contacts:
            raise
        logger.warning("%s; peers of an earlier run are there", error.message)


@asynccontextmanager
async def _saying_goodbye(systemd: Systemd) -> AsyncIterator[None]:
    try:
        yield
    finally:
        systemd.stopping()


async def ask_once(data_dir: DataDir, config: Config, emit: Emit, params: Event, *, serve: bool) -> Event:
    """``infer`` where no node runs: a node for one answer."""
    async with open_asker(data_dir, config, embedded=params["embedded"] is not None, serve=serve) as node:
        return await node.infer({**params, "bootstrap": config.network.bootstrap}, emit)


@asynccontextmanager
async def open_asker(
    data_dir: DataDir, config: Config, *, embedded: bool, serve: bool
) -> AsyncIterator[SwarmCoordinator]:
    """A node that asks. It accepts connections only if ``serve`` or of hosts that it starts itself."""
    embedded = embedded or not config.network.bootstrap
    if embedded and not serve:  # for hosts on this machine, whatever the settings say of others
        network = msgspec.structs.replace(config.network, listen=NetworkConfig().listen, announce=[], allow=[])
        config = msgspec.structs.replace(config, network=network)
    async with open_node(data_dir, config, listen=serve or embedded, libp2p=False) as node:
        yield node


def check_addresses(config: Config, *, listen: bool) -> None:
    """Raises:
    ConfigError: an address is none; the hint is about what it is for.
    """
    for key, addresses, hint in (
        ("listen", [config.network.listen] if listen else [], LISTEN_HINT),
        ("announce", config.network.announce if listen else [], ANNOUNCE_HINT),
    ):
        for address in addresses:
            try:
                if parse_address(address).relay is not None:
                    raise ConfigError(f"{address} leads through a relay: a node finds its relays by itself")
            except ConfigError as error:
                hint = f"{hint}; without that option it is the setting network.{key}"
                raise ConfigError(f"--{key} {error.message}", hint=hint) from error
    check_bootstrap(config.network.bootstrap)


def describe_binding(config: Config, network: TcpNetwork) -> list[str]:
    """What has to be open when the node listens to more than this machine; else how to meet it on this one."""
    listening, addrs, key = parse_address(config.network.listen), network.direct_addrs, network.identity.swarm_key
    if is_loopback(listening.host):
        lines = ["listening on this machine only; --listen /ip4/0.0.0.0/tcp/4001 lets others in"]
        swarm = describe_swarm(key, config)["id"]
        option = "" if swarm == NetworkConfig().swarm else f" --swarm-id {swarm}"
        needs = "" if key is None else " (which needs the key too: daaswarm swarm add)"
        next_ = f"next: daaswarm host-expert MODEL{option} --bootstrap {addrs[0]} --data-dir ANOTHER{needs}"
        return [*lines, next_]
    ports = sorted({parse_address(address).port for address in addrs})
    return [f"open TCP port {', '.join(map(str, ports))} in your firewall or router for others to reach this node"]
