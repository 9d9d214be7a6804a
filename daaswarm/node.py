"""SwarmCoordinator: one node, built out of its parts. Read this file first.

A node is a network (``net``), discovery on top of it (``core`` decides, ``net.discovery`` carries out), experts that it
serves (``experts``), and answers that it asks for (``inference``). Nothing else builds these parts. The rooms that
need torch are imported when the first model is touched, so that a node without one starts at once.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from daaswarm import __version__
from daaswarm.api.control import serve_control
from daaswarm.config import Config, NetworkConfig, get_cache_dir
from daaswarm.core.adverts import choose_dtype
from daaswarm.core.placement import choose_experts
from daaswarm.core.signing import get_swarm_id
from daaswarm.errors import (
    ConfigError,
    DaaswarmError,
    ExpertError,
    RemoteProtocolError,
)
from daaswarm.messages import Contact, ExpertCall, FindNode, FindValue, GetAdverts, Reopen, Reply, Request, Store
from daaswarm.models.sources import LocalModel, find_model, list_models
from daaswarm.net.addresses import parse_address
from daaswarm.net.dataplane import TcpNetwork, open_tcp_network
from daaswarm.net.discovery import Discovery
from daaswarm.net.handshake import Identity
from daaswarm.net.inbound import InboundBudget
from daaswarm.net.network import FastHandler, Handler
from daaswarm.store.data_dir import DataDir
from daaswarm.types import Dtype, ExpertId, PeerId, format_bytes, format_range, parse_range

if TYPE_CHECKING:
    from daaswarm.experts.service import ExpertService
    from daaswarm.inference.generation import Prompt
    from daaswarm.inference.plan import HostPlan
    from daaswarm.inference.requester import Requester
    from daaswarm.net.frames import Buffer

LIBP2P_S = 15.0  # a second of imports, on a busy machine; then the node is ready without it
PROGRESS_S = 0.1  # between two progress events of one task
SAVE_CONTACTS_S = 30.0  # how much of the address book a crash may cost

Event = dict[str, Any]
Emit = Callable[[Event], Awaitable[None]]

logger = logging.getLogger(__name__)


class SwarmCoordinator:
    """A running node. Made by :func:`open_node`.

    Args:
        network: carries all calls.
        discovery: finds peers and adverts.
    """

    def __init__(self, data_dir: DataDir, config: Config, network: TcpNetwork, discovery: Discovery) -> None:
        self.data_dir = data_dir
        self.config = config
        self.network = network
        self.discovery = discovery
        self.started_at = time.time()
        self.has_bootstrap = False
        self.libp2p_settled = trio.Event()  # it runs, or won't
        self._experts: ExpertService | None = None
        self._requester: Requester | None = None
        self._importing = trio.Lock()

    @property
    def peer_id(self) -> PeerId:
        return self.network.peer_id

    @property
    def addrs(self) -> list[str]:
        return list(self.network.contact.addrs) if self.network.contact else []

    # -- answering others ---------------------------------------------------------------------------------------

    def handle_inline(self, peer: PeerId, message: Request, body: memoryview) -> tuple[Reply, Sequence[Buffer]] | None:
        """Small expert calls, computed where they arrive."""
        if isinstance(message, ExpertCall) and self._experts is not None:
            return self._experts.serve_inline(peer, message, body)
        return None

    async def handle(
        self, peer: PeerId, contact: Contact | None, message: Request, body: memoryview, deadline_s: float
    ) -> tuple[Reply, Sequence[Buffer]]:
        """Everything else that peers ask."""
        if isinstance(message, ExpertCall):
            if self._experts is None:
                raise ExpertError("this node serves no experts", hint="ask for this peer's adverts")
            return await self._experts.serve(peer, message, body, deadline_s)
        if isinstance(message, FindNode | FindValue | Store | GetAdverts):
            return self.discovery.answer(peer, contact, message), ()
        if isinstance(message, Reopen):
            raise ExpertError("this host keeps no chain of past calls")
        raise RemoteProtocolError(f"{type(message).__name__} is not answered by a node", reject=False)

    async def wait_for_libp2p(self) -> None:
        """Until libp2p peers can connect too: what ``ready`` promises."""
        with trio.move_on_after(LIBP2P_S):
            await self.libp2p_settled.wait()

    # -- joining ------------------------------------------------------------------------------------------------

    async def bootstrap(self, addresses: list[str]) -> None:
        """Meet the swarm through any of ``addresses``.

        Raises:
            ConfigError: none of them led to a peer; says why for each.
        """
        for address in addresses:
            if parse_address(address).peer_id is None:
                raise ConfigError(f"--bootstrap {address} names no PeerId", hint="it ends in /p2p/12D3Koo…")
        reached: list[Contact] = []
        refused: list[str] = []

        async def dial(address: str) -> None:
            try:
                reached.append(await self.network.connect_addr(address))
            except DaaswarmError as error:  # also Busy, or lost in the handshake: another address may do
                refused.append(error.message if address in error.message else f"{address}: {error.message}")

        async with trio.open_nursery() as nursery:
            for address in addresses:
                nursery.start_soon(dial, address)
        if addresses and not reached:
            raise ConfigError(
                "no bootstrap address led to the swarm: " + "; ".join(sorted(refused)),
                hint="copy the address from the ready line of a running node; is it running, and is the port open?",
            )
        for text in refused:
            logger.warning("bootstrap %s", text)
        if reached:
            self.has_bootstrap = True
            self.discovery.join(reached)
            await self.discovery.lookup(get_own_key(self.peer_id), "nodes")

    async def keep_contacts(self) -> None:
        """Write the address book now and then, so that a restart finds the swarm again."""
        while True:
            await trio.sleep(SAVE_CONTACTS_S)
            self.save_contacts()

    def save_contacts(self) -> None:
        known = self.discovery.get_known()
        if known:
            try:
                self.data_dir.save_contacts(known)
            except OSError as error:
                logger.warning("%s can't be written: %s", self.data_dir.contacts_path, error.strerror)

    # -- hosting ------------------------------------------------------------------------------------------------

    async def host(self, params: Event, emit: Emit) -> None:
        """Serve experts until cancelled. Emits progress, then ``ready``.

        Raises:
            ConfigError: a bad model or range.
        """
        await trio.to_thread.run_sync(import_module, "daaswarm.experts.loading", abandon_on_cancel=True)
        from daaswarm.experts.loading import load_hosted

        await self.bootstrap(params["bootstrap"])
        model = await self.find_model(params["model"], emit)
        wanted = await self.choose_wanted(model, params)
        dtype = params["dtype"]
        experts = self.get_experts()
        experts.check_free(model.root, model.name, dtype, wanted)
        hosted, bytes_read = await trio.to_thread.run_sync(
            load_hosted, model, wanted, dtype, make_progress(emit), abandon_on_cancel=True
        )
        experts.add(hosted)
        try:
            self.advertise(model)
            await self.wait_for_libp2p()
            await emit(
                {
                    "event": "ready",
                    "peer_id": self.peer_id,
                    "addrs": self.addrs,
                    "model": model.name,
                    "model_root": model.root,
                    "dtype": dtype,
                    "held": {str(layer): ids for layer, ids in wanted.items()},
                    "bytes_held": hosted.nbytes,
                    "bytes_read": bytes_read,
                    "lines": [describe_held(model, wanted, hosted.nbytes)],
                }
            )
            await trio.sleep_forever()
        finally:
            experts.remove(model.root, dtype, wanted)
            self.advertise(model)

    def advertise(self, model: LocalModel) -> None:
        """Publish what this node serves of a model now, or that it is nothing any more."""
        hosted = next((hosted for hosted in self.get_experts().models.values() if hosted.root == model.root), None)
        if hosted is None:
            self.discovery.withdraw(model.root)
        else:
            held = {layer: list(experts.ids) for layer, experts in hosted.layers.items()}
            self.discovery.advertise(hosted.root, hosted.name, hosted.kind, held, hosted.dtype)

    async def choose_wanted(self, model: LocalModel, params: Event) -> dict[int, list[int]]:
        """``{layer: [experts]}`` from the ranges given, or else the rarest that fit into the memory given.

        Raises:
            ConfigError: a range outside the model.
        """
        ranges = params["experts"] if model.kind == "moe" else params["slices"]
        wrong = params["slices"] if model.kind == "moe" else params["experts"]
        if wrong is not None:
            noun, option = ("experts", "--experts") if model.kind == "moe" else ("slices", "--slices")
            raise ConfigError(f"{model.name} is split into {noun}", hint=f"use {option}")
        if params["layers"] is None and ranges is None:
            live = await self.count_hosts(model)
            return choose_experts(
                model.layers,
                lambda layer: model.expert_bytes(layer, params["dtype"]),
                params["memory_bytes"],
                live,
                random.Random(),
            )
        layers = sorted(model.layers)
        if params["layers"] is not None:
            layers = parse_range(params["layers"], option="--layers")
            outside = [layer for layer in layers if layer not in model.layers]
            if outside:
                raise ConfigError(
                    f"--layers {params['layers']}: {model.name} has experts in layers "
                    f"{min(model.layers)} to {max(model.layers)}, not in {outside[0]}",
                    hint=f"--layers {min(model.layers)}-{max(model.layers)} is all",
                )
        option = "--experts" if model.kind == "moe" else "--slices"
        wanted: dict[int, list[int]] = {}
        for layer in layers:
            count = model.layers[layer]
            wanted[layer] = parse_range(ranges, option=option, limit=count) if ranges else list(range(count))
        return wanted

    async def count_hosts(self, model: LocalModel) -> dict[ExpertId, int]:
        """How many live hosts each expert has."""
        counts: dict[ExpertId, int] = {}
        for known in await self.discovery.find_adverts(model.root):
            for layer, experts in known.experts.items():
                for expert in experts:
                    counts[ExpertId(layer, expert)] = counts.get(ExpertId(layer, expert), 0) + 1
        return counts

    def get_experts(self) -> ExpertService:
        if self._experts is None:
            from daaswarm.experts.service import ExpertService

            self._experts = ExpertService(threads=self.config.host.threads)
        return self._experts

    # -- asking -------------------------------------------------------------------------------------------------

    async def infer(self, params: Event, emit: Emit) -> Event:
        """One answer; pieces of text are emitted as they come. Returns the result object.

        Raises:
            NoPeerCouldServe: experts without a live host.
            ConfigError: a bad prompt, model or address.
        """
        if not params["prompt"].strip():
            raise ConfigError("the prompt is empty", hint='write it like: daaswarm infer "What is a hash table?"')
        await self.bootstrap(params["bootstrap"])
        model = await self.find_model(params["model"], emit)
        embedded, dtype = params["embedded"], params["dtype"]
        if embedded is None and not self.has_bootstrap and self._experts is None and not self.discovery.get_known():
            embedded = self.config.infer.embedded_hosts
            text = f"no bootstrap address is configured or given: running --embedded {embedded} (hosts on this machine)"
            await emit({"event": "message", "text": text})
        async with AsyncExitStack() as stack:
            nursery = await stack.enter_async_context(trio.open_nursery())
            if embedded is not None:
                dtype = dtype or "f32"
                nursery.start_soon(self.prepare, model, dtype, emit)  # while the hosts start
                await stack.enter_async_context(self.run_embedded(model, embedded, dtype, emit))
            else:
                nursery.start_soon(self.get_requester)  # seconds of imports, while hosts are looked for
            plan = await self.find_hosts(model, dtype)
            plan.check_complete(model.name)
            await self.connect_hosts(plan)
            requester = await self.get_requester()
            trunk = await requester.load(model, plan.dtype, make_progress(emit))
            result = await requester.answer(model, trunk, plan, make_prompt(params), emit)
        return {**result, "embedded": embedded is not None}

    async def prepare(self, model: LocalModel, dtype: Dtype, emit: Emit) -> None:
        """Have the trunk in memory before it is needed."""
        requester = await self.get_requester()
        await requester.load(model, dtype, make_progress(emit))

    async def find_hosts(self, model: LocalModel, dtype: Dtype | None) -> HostPlan:
        """Who serves the model now, in one dtype."""
        from daaswarm.inference.plan import make_plan

        known = await self.discovery.find_adverts(model.root)
        return make_plan(model, known, choose_dtype(known, dtype, model.layers))

    async def connect_hosts(self, plan: HostPlan) -> None:
        """Have a live connection to each host before the model's thread needs it."""

        async def connect(contact: Contact) -> None:
            try:
                await self.network.connect(contact)
            except DaaswarmError as error:
                logger.info("host %s: %s", contact.peer_id, error)

        async with trio.open_nursery() as nursery:
            for contact in plan.contacts.values():
                if contact.peer_id != self.peer_id:
                    nursery.start_soon(connect, contact)

    @asynccontextmanager
    async def run_embedded(self, model: LocalModel, count: int, dtype: Any, emit: Emit) -> AsyncIterator[None]:
        """Real host processes on loopback for one run, which find each other through this node."""
        from daaswarm.inference.embedded import run_embedded_hosts

        await emit(
            {"event": "message", "text": f"starting {count} host{'s' * (count > 1)} for {model.name} on this machine …"}
        )
        async with run_embedded_hosts(
            str(model.folder),
            model.kind,
            model.layers,
            count=count,
            bootstrap=self.addrs,
            swarm=self.config.network.swarm,
            dtype=dtype,
            across=False,
            threads=self.config.host.threads or max(1, (os.cpu_count() or 1) // count),
        ) as hosts:
            await emit({"event": "embedded", "hosts": [{"peer_id": h.peer_id, "addrs": h.addrs} for h in hosts]})
            yield

    async def get_requester(self) -> Requester:
        """The part that asks; importing it takes seconds, in a thread."""
        async with self._importing:
            if self._requester is None:
                await trio.to_thread.run_sync(import_module, "daaswarm.inference.requester", abandon_on_cancel=True)
                from daaswarm.inference.requester import Requester

                self._requester = Requester(
                    self.network,
                    self.find_hosts,
                    call_timeout_s=self.config.infer.call_timeout_s,
                    local=self._compute_locally,
                    threads=self.config.infer.threads,
                )
            return self._requester

    def _compute_locally(self, call: ExpertCall, body: memoryview) -> tuple[Any, Sequence[Any]]:
        return self.get_experts().compute(call, body)

    async def find_model(self, name_or_path: str, emit: Emit) -> LocalModel:
        """The model on this machine: fetched, converted or hashed first if need be, with progress."""
        return await trio.to_thread.run_sync(
            find_model, name_or_path, get_cache_dir(), make_progress(emit), abandon_on_cancel=True
        )

    # -- telling ------------------------------------------------------------------------------------------------

    def get_status(self) -> Event:
        """What ``daaswarm status`` shows."""
        hosted = self._experts.models.values() if self._experts is not None else ()
        return {
            "running": True,
            "pid": os.getpid(),
            "peer_id": self.peer_id,
            "data_dir": str(self.data_dir.path),
            "addrs": self.addrs,
            "uptime_s": round(time.time() - self.started_at, 1),
            "known_peers": [contact.peer_id for contact in self.discovery.get_known()],
            "hosted": [
                {
                    "name": model.name,
                    "root": model.root,
                    "dtype": model.dtype,
                    "bytes": model.nbytes,
                    "calls": model.calls,
                    "rows": model.rows,
                    "held": {str(layer): list(experts.ids) for layer, experts in sorted(model.layers.items())},
                }
                for model in hosted
            ],
            "models": [{"name": m.name, "root": m.root, "folder": str(m.folder)} for m in list_models(get_cache_dir())],
        }

    async def control(self, method: str, params: Event, emit: Emit) -> Event:
        """What commands that attach to this node may ask."""
        if method == "status":
            return self.get_status()
        if method == "infer":
            return await self.infer(params, emit)
        if method == "host":
            await self.host(params, emit)
            return {}
        raise ConfigError(f"unknown method {method!r}", hint="is the node of another version?")


@asynccontextmanager
async def open_node(
    data_dir: DataDir, config: Config, *, listen: bool, libp2p: bool
) -> AsyncIterator[SwarmCoordinator]:
    """A node that is connected to nobody yet; closed at the end.

    Args:
        listen: accept connections. A node that only asks need not.
        libp2p: also speak libp2p on the same port (costs a second of start-up in the background).
    """
    key = data_dir.load_key()
    swarm = get_swarm_id(config.network.swarm)
    coordinator: SwarmCoordinator

    def handle_inline(peer: PeerId, message: Request, body: memoryview) -> tuple[Reply, Sequence[Buffer]] | None:
        return coordinator.handle_inline(peer, message, body)

    async def handle(
        peer: PeerId, contact: Contact | None, message: Request, body: memoryview, deadline_s: float
    ) -> tuple[Reply, Sequence[Buffer]]:
        return await coordinator.handle(peer, contact, message, body, deadline_s)

    identity = Identity(key, swarm, f"daaswarm/{__version__}")
    budget = InboundBudget()
    async with AsyncExitStack() as stack:
        network = await stack.enter_async_context(
            open_tcp_network(
                identity,
                handler=handle,
                fast_handler=handle_inline,
                listen=[config.network.listen] if listen else [],
                announce=config.network.announce,
                budget=budget,
            )
        )
        discovery = Discovery(network, key, swarm, random.Random())
        coordinator = SwarmCoordinator(data_dir, config, network, discovery)
        nursery = await stack.enter_async_context(trio.open_nursery())
        await nursery.start(discovery.run)
        if libp2p and config.network.libp2p:
            nursery.start_soon(run_libp2p, coordinator, identity, handle, handle_inline, budget)
        else:
            coordinator.libp2p_settled.set()
        try:
            yield coordinator
        finally:
            nursery.cancel_scope.cancel()


async def run_libp2p(
    node: SwarmCoordinator, identity: Identity, handle: Handler, handle_inline: FastHandler, budget: InboundBudget
) -> None:
    """The same node for libp2p peers and browsers. If libp2p fails, that costs them, not the node."""
    from daaswarm.net.libp2p_host import open_libp2p_host

    try:
        async with open_libp2p_host(identity, handler=handle, fast_handler=handle_inline, budget=budget) as running:
            node.network.splicer.targets.update(running.targets)
            node.libp2p_settled.set()
            await trio.sleep_forever()
    except Exception as error:  # noqa: BLE001 - whatever py-libp2p raises
        logger.warning("libp2p peers can't connect: %s", error)
    finally:
        node.network.splicer.targets.clear()
        node.libp2p_settled.set()


async def run_node(data_dir: DataDir, config: Config, emit: Emit, *, host: Event | None = None) -> None:
    """``join`` and ``host-expert``: a node in the foreground, until cancelled.

    Raises:
        ConfigError: another node runs on the data directory, a port is in use, no bootstrap address answers.
    """
    with data_dir.lock():
        async with open_node(data_dir, config, listen=True, libp2p=True) as node, trio.open_nursery() as nursery:
            await node.bootstrap(config.network.bootstrap)
            if not config.network.bootstrap:
                node.discovery.join(data_dir.load_contacts())
            await nursery.start(serve_control, data_dir.socket_path, node.control)
            nursery.start_soon(node.keep_contacts)
            try:
                if host is not None:
                    await node.host({**host, "bootstrap": []}, emit)
                else:
                    await node.wait_for_libp2p()
                    await emit(
                        {
                            "event": "ready",
                            "peer_id": node.peer_id,
                            "addrs": node.addrs,
                            "lines": describe_binding(config, node.addrs),
                        }
                    )
                    await trio.sleep_forever()
            finally:
                node.save_contacts()


async def ask_once(data_dir: DataDir, config: Config, emit: Emit, params: Event, *, serve: bool) -> Event:
    """``infer`` where no node runs: a node for one answer. It accepts connections only if ``serve`` or embedded."""
    embedded = params["embedded"] is not None or not config.network.bootstrap
    if embedded and not serve:  # for hosts on this machine, whatever the settings say of others
        network = msgspec.structs.replace(config.network, listen=NetworkConfig().listen, announce=[])
        config = msgspec.structs.replace(config, network=network)
    async with open_node(data_dir, config, listen=serve or embedded, libp2p=False) as node:
        return await node.infer({**params, "bootstrap": config.network.bootstrap}, emit)


def make_progress(emit: Emit) -> Callable[[str, int, int], None]:
    """A progress callback for a worker thread, which reports at most every :data:`PROGRESS_S`."""
    last: dict[str, float] = {}

    def progress(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - last.get(what, 0.0) < PROGRESS_S:
            return
        last[what] = now
        trio.from_thread.run(emit, {"event": "progress", "what": what, "done": done, "total": total})

    return progress


def make_prompt(params: Event) -> Prompt:
    """The part of an ``infer`` request that generation needs."""
    from daaswarm.inference.generation import Prompt

    return Prompt(
        text=params["prompt"],
        system=params["system"],
        raw=params["raw"],
        max_tokens=params["max_tokens"],
        temperature=params["temperature"],
        top_p=params["top_p"],
        seed=params["seed"],
        stop=params["stop"],
    )


def get_own_key(peer_id: PeerId) -> bytes:
    from daaswarm.core.routing_table import get_node_id

    return get_node_id(peer_id)


def describe_held(model: LocalModel, held: dict[int, list[int]], nbytes: int) -> str:
    """``"serving smollm2: layers 0-9 (all 8 slices), 106.2 MB"``; layers with the same experts stand together."""
    noun = "experts" if model.kind == "moe" else "slices"
    groups: dict[tuple[int, ...], list[int]] = {}
    for layer, ids in held.items():
        groups.setdefault(tuple(ids), []).append(layer)
    parts = []
    for ids, layers in groups.items():
        whole = all(len(ids) == model.layers[layer] for layer in layers)
        which = f"all {len(ids)} {noun}" if whole else f"{noun} {format_range(list(ids))}"
        parts.append(f"layer{'s' * (len(layers) > 1)} {format_range(layers)} ({which})")
    return f"serving {model.name}: {', '.join(parts)}, {format_bytes(nbytes)}"


def describe_binding(config: Config, addrs: list[str]) -> list[str]:
    """What has to be open when the node listens to more than this machine."""
    listening = parse_address(config.network.listen)
    if listening.host in ("127.0.0.1", "::1", "localhost"):
        lines = ["listening on this machine only; --listen /ip4/0.0.0.0/tcp/4001 lets others in"]
        return [*lines, f"next: daaswarm host-expert MODEL --bootstrap {addrs[0]} --data-dir ANOTHER"]
    ports = sorted({parse_address(address).port for address in addrs})
    return [f"open TCP port {', '.join(map(str, ports))} in your firewall or router for others to reach this node"]
