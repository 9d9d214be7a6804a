"""SwarmCoordinator: one node. Read this file first.

A node is a network (``net``), discovery on top of it (``core`` decides, ``net.discovery`` carries out), experts that it
serves (``hosting``), and answers that it asks for (``answering``). ``life`` builds it. The rooms that need torch are
imported when the first model is touched, so that a node without one starts at once.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio

from daaswarm.config import Config, get_cache_dir
from daaswarm.core.diagnosis import Step
from daaswarm.core.pacing import TokenBucket
from daaswarm.core.routing_table import get_node_id
from daaswarm.core.swarm_keys import SwarmKey
from daaswarm.errors import ConfigError, DaaswarmError, ExpertError, RemoteProtocolError
from daaswarm.messages import (
    Contact,
    ExpertCall,
    FindNode,
    FindValue,
    GetAdverts,
    GetModelPart,
    Meeting,
    Moved,
    Reopen,
    Reply,
    Request,
    Spreading,
    Store,
)
from daaswarm.models.sources import LocalModel, list_models
from daaswarm.net.addresses import find_left_out, parse_address
from daaswarm.net.dataplane import TcpNetwork
from daaswarm.net.discovery import Discovery
from daaswarm.net.examining import explain
from daaswarm.node.answering import Answering
from daaswarm.node.diagnosing import Diagnosing
from daaswarm.node.hosting import Hosting, Wish
from daaswarm.node.neighbour import GoodNeighbour
from daaswarm.node.operating import Operating
from daaswarm.node.planning import Planning
from daaswarm.node.reaching import Reaching
from daaswarm.node.remembering import Remembering
from daaswarm.node.reporting import Emit, Event
from daaswarm.node.sharing import Sharing
from daaswarm.node.trusting import Trusting
from daaswarm.store.data_dir import DataDir
from daaswarm.store.node_store import NodeStore
from daaswarm.types import PeerId

if TYPE_CHECKING:
    from daaswarm.net.frames import Buffer

DRAIN_S = 10.0  # for calls in flight when the node leaves; requesters wait no longer than that either
SUM_BYTES = 4  # of one value of an answer: f32
MET = 1024  # peers of earlier runs among which a PeerId is looked for
LEAVE_S = 2.0  # for telling the swarm goodbye: a round trip or two; the records expire by themselves anyway

logger = logging.getLogger(__name__)


class SwarmCoordinator:
    """A running node. Made by :func:`daaswarm.node.life.open_node`.

    Args:
        network: carries all calls.
        discovery: finds peers and adverts.
        store: what is remembered from one run to the next.
        nursery: runs what outlives single requests; cancelled when the node has left.
        is_owner: the node runs on its data directory, rather than for one answer.
    """

    def __init__(
        self,
        data_dir: DataDir,
        config: Config,
        network: TcpNetwork,
        discovery: Discovery,
        store: NodeStore,
        nursery: trio.Nursery,
        *,
        is_owner: bool,
    ) -> None:
        self.data_dir = data_dir
        self.config = config
        self.network = network
        self.discovery = discovery
        self.hosting = Hosting(config, discovery)
        discovery.spreader.get_load = lambda: self.hosting.service.queue_depth if self.hosting.service else 0
        self.trusting = Trusting(store, network.peer_id)
        self.answering = Answering(config, network, discovery, self.hosting, nursery, self.trusting)
        self.memory = Remembering(store, network, discovery, is_owner=is_owner)
        self.reaching = Reaching(config.network, network, discovery)
        self.neighbour = GoodNeighbour(config.host, self.hosting.set_pause)
        upload, relay = self.neighbour.upload, network.meetings.relay
        if upload is not None and upload.rate < relay.bucket.rate:
            relay.bucket = TokenBucket(upload.rate)  # as much again, for what others say to each other
        self.sharing = Sharing(self.hosting, self.neighbour)
        self.operating = Operating(config, network, discovery, self.hosting, store, self.trusting, self.bootstrap)
        self.diagnosing = Diagnosing(config, network, discovery, self.reaching, is_running=is_owner)
        self.started_at = time.time()
        self.has_bootstrap = False
        self.ready = trio.Event()  # what the node was started for is there

    @property
    def peer_id(self) -> PeerId:
        return self.network.peer_id

    @property
    def addrs(self) -> list[str]:
        return list(self.network.contact.addrs) if self.network.contact else []

    # -- answering others ---------------------------------------------------------------------------------------

    def handle_inline(
        self, peer: PeerId, message: Request, body: memoryview, deadline_s: float
    ) -> tuple[Reply, Sequence[Buffer]] | None:
        """Small expert calls, computed where they arrive; and those that there is no room for, refused."""
        if not isinstance(message, ExpertCall) or self.hosting.service is None:
            return None
        if not self.neighbour.may_send_now(message.rows * message.hidden * SUM_BYTES):
            return None
        with self.memory.noting_refusal(peer, message, self.hosting.service):
            answer = self.hosting.service.serve_inline(peer, message, body, deadline_s)
        if answer is not None:
            self.neighbour.note_sent(message.rows * message.hidden * SUM_BYTES)
            self.memory.note_served(peer, message, body, answer[1])
        return answer

    async def handle(
        self, peer: PeerId, contact: Contact | None, message: Request, body: memoryview, deadline_s: float
    ) -> tuple[Reply, Sequence[Buffer]]:
        """Everything else that peers ask."""
        if isinstance(message, ExpertCall):
            if self.hosting.service is None:
                raise ExpertError("this node serves no experts", hint="ask for this peer's adverts")
            with self.memory.noting_refusal(peer, message, self.hosting.service):
                async with self.neighbour.uploading(message.rows * message.hidden * SUM_BYTES, deadline_s):
                    answer = await self.hosting.service.serve(peer, message, body, deadline_s)
            self.memory.note_served(peer, message, body, answer[1])
            return answer
        if isinstance(message, FindNode | FindValue | Store | GetAdverts):
            return self.discovery.answer(peer, contact, message), ()
        if isinstance(message, Spreading):
            return await self.discovery.spreader.answer(peer, contact, message), ()
        if isinstance(message, Meeting):
            reply = await self.network.meetings.answer(peer, message)
            if isinstance(message, Moved):
                self.discovery.note_moved(message.contact)
            return reply, ()
        if isinstance(message, GetModelPart):
            return await self.sharing.answer(peer, message, deadline_s)
        if isinstance(message, Reopen):
            raise ExpertError("this host keeps no chain of past calls")
        raise RemoteProtocolError(f"{type(message).__name__} is not answered by a node", reject=False)

    # -- being one of the swarm ---------------------------------------------------------------------------------

    async def bootstrap(self, addresses: list[str]) -> None:
        """Meet the swarm through any of ``addresses``.

        Raises:
            ConfigError: none of them led to a peer; says why for each.
        """
        check_bootstrap(addresses)
        reached: list[Contact] = []
        refused: list[str] = []
        causes: list[tuple[str, Step]] = []

        async def dial(address: str) -> None:
            try:
                reached.append(await self.network.connect_addr(address))
            except DaaswarmError as error:  # also Busy, or lost in the handshake: another address may do
                refused.append(error.message if address in error.message else f"{address}: {error.message}")
                causes.append((address, explain(error, address)))

        async with trio.open_nursery() as nursery:
            for address in addresses:
                nursery.start_soon(dial, address)
        if addresses and not reached:
            address, step = min(causes, key=lambda cause: cause[0])
            raise ConfigError(
                "no bootstrap address led to the swarm: " + "; ".join(sorted(refused)),
                hint=f"it fails at {step.name}: {step.next}; step by step: daaswarm network diagnose {address}",
            )
        for text in refused:
            logger.warning("bootstrap %s", text)
        if reached:
            self.has_bootstrap = True
            self.discovery.join(reached)
            await self.discovery.lookup(get_node_id(self.peer_id), "nodes")

    async def meet(self, contact: Contact) -> None:
        """A peer that somebody told of, not proven yet: one of the local network."""
        try:
            await self.network.connect(contact)
        except DaaswarmError as error:
            logger.info("%s of the local network: %s", contact.peer_id, error)
        else:  # at the addresses that it gives itself: it may have been connected before, and what was told a lie
            connection = self.network.get(contact.peer_id)
            if connection is not None and connection.peer.contact is not None:
                self.discovery.meet(connection.peer.contact)

    async def leave(self) -> None:
        """Admit no calls any more, say so to the swarm, answer the calls in flight as far as :data:`DRAIN_S` allows,
        and save."""
        self.neighbour.leave()

        async def say_goodbye() -> None:
            with trio.move_on_after(LEAVE_S):
                await self.discovery.leave()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(say_goodbye)
            with trio.move_on_after(DRAIN_S):
                await self.network.drain()
        self.sharing.close()
        await self.trusting.save()
        await self.memory.save()

    # -- what a node is for -------------------------------------------------------------------------------------

    async def host(self, params: Event, emit: Emit) -> None:
        """Serve experts until cancelled. Emits progress, then ``ready``.

        Raises:
            ConfigError: a bad model, range or address.
        """
        check_bootstrap(params["bootstrap"])
        wish = await self.hosting.check(params, emit)
        await self.memory.note_model(wish.model)
        await self.bootstrap(params["bootstrap"])
        await self.serve(wish, emit)

    async def serve(self, wish: Wish, emit: Emit) -> None:
        """Serve experts until cancelled, in the swarm that was met before."""
        async with self.hosting.serve(wish, emit) as served:
            await self.reaching.wait_settled()
            logger.info("%s", "; ".join(served.ready["lines"]))
            ready = {**served.ready, "lines": served.ready["lines"] + self.reaching.get_lines()}
            await emit({"event": "ready", "peer_id": self.peer_id, "addrs": self.addrs, **ready})
            if served.balancing is not None:
                await served.balancing.keep()
            await trio.sleep_forever()

    async def infer(self, params: Event, emit: Emit) -> Event:
        """One answer; pieces of text are emitted as they come. Returns the result object.

        Raises:
            NoPeerCouldServe: experts without a live host.
            ConfigError: a bad prompt, model or address.
        """
        model = await self._prepare_asking(params, emit)
        embedded = await self._count_embedded(params, emit)
        async with self.diagnosing.explaining(model.root, emit):
            result = await self.answering.answer(model, params, emit, embedded=embedded)
        if not result["embedded"]:  # hosts that end with this answer, or this chat, are nobody to remember
            self.memory.note_asked(result)
        return result

    async def chat(self, params: Event, emit: Emit) -> None:
        """Hold what the answers of a chat have in common, until cancelled: where there is nobody else to ask, hosts on
        this machine. Emits ``open`` when the first question may come; each is an :meth:`infer` of its own.

        Raises:
            ConfigError: a bad model or address, or a model that holds no conversations.
        """
        model = await self._prepare_asking({**params, "prompt": "?", "raw": False}, emit)
        await self.answering.check_conversation(model)
        embedded = await self._count_embedded(params, emit)
        opened = {"event": "open", "model": model.name, "model_root": model.root, "embedded": embedded}
        if embedded is None:
            await emit(opened)
            await trio.sleep_forever()
            return
        async with self.answering.hold_embedded(model, embedded, params["dtype"], emit):
            await emit(opened)
            await trio.sleep_forever()

    async def _prepare_asking(self, params: Event, emit: Emit) -> LocalModel:
        check_bootstrap(params["bootstrap"])
        model = await self.answering.check(params, emit)
        await self.memory.note_model(model)
        await self.bootstrap(params["bootstrap"])
        return model

    async def _count_embedded(self, params: Event, emit: Emit) -> int | None:
        """How many hosts have to be started here; ``None``: others are there to be asked."""
        if params["embedded"] is not None or not self.is_alone():
            return params["embedded"]
        count = self.config.infer.embedded_hosts
        text = f"no bootstrap address is configured or given: running --embedded {count} (hosts on this machine)"
        await emit({"event": "message", "text": text})
        return count

    def describe_left_out(self) -> list[Event]:
        """Own addresses that others aren't told, and why, where the node listens on all that the machine has."""
        if self.config.network.announce:
            return []
        left_out = find_left_out(self.network.listen_addresses, self.config.network.interfaces)
        return [left._asdict() for left in left_out]

    def is_alone(self) -> bool:
        """Whether there is nobody to ask, not even this node itself."""
        return not self.has_bootstrap and self.hosting.service is None and not self.discovery.get_known()

    async def get_status(self) -> Event:
        """What ``daaswarm status`` shows."""
        models = await trio.to_thread.run_sync(list_models, get_cache_dir())
        return {
            "running": True,
            "pid": os.getpid(),
            "peer_id": self.peer_id,
            "data_dir": str(self.data_dir.path),
            "addrs": self.addrs,
            "swarm": describe_swarm(self.network.identity.swarm_key, self.config),
            "uptime_s": round(time.time() - self.started_at, 1),
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "known_peers": [contact.peer_id for contact in self.discovery.get_known()],
            "left_out": self.describe_left_out(),
            "islands": describe_islands(self.network),
            "reachability": self.reaching.describe(),
            "hosted": self.hosting.describe(),
            "kernels": self.hosting.describe_kernels(),
            "paused": self.neighbour.describe(),
            "models": [{"name": m.name, "root": m.root, "folder": str(m.folder)} for m in models],
        }

    async def allow(self, peers: list[str]) -> Event:
        """Meet only these from now on, all if there are none; whom that leaves out is hung up on."""
        self.network.identity.allowed.replace(peers)
        closed = sorted(
            {c.peer_id for c in self.network.connections if not self.network.identity.allowed.admits(c.peer_id)}
        )
        for peer in closed:
            await self.network.disconnect(peer, "not on the allow-list any more")
        return {"closed": closed}

    async def control(self, method: str, params: Event, emit: Emit) -> Event:
        """What commands that attach to this node may ask."""
        if method == "status":
            return await self.get_status()
        if method == "allow":
            return await self.allow(params["peers"])
        if method == "infer":
            return await self.infer(params, emit)
        if method == "chat":
            await self.chat(params, emit)
            return {}
        if method == "plan":
            check_bootstrap(params["bootstrap"])
            await self.bootstrap(params["bootstrap"])
            return await Planning(self.network, self.answering).plan(params, emit)
        if method == "diagnose":
            met = [record.contact for record in await self.memory.store.get_peers(MET)]
            return await self.diagnosing.diagnose(
                params["peer"], params["bootstrap"], params["timeout_s"], known=met, emit=emit
            )
        if method == "host":
            await self.host(params, emit)
            return {}
        result = await self.operating.run(method, params, emit)
        if result is not None:
            return result
        raise ConfigError(f"unknown method {method!r}", hint="is the node of another version?")


def describe_swarm(key: SwarmKey | None, config: Config) -> Event:
    """The swarm that a node is in."""
    return {"id": config.network.swarm if key is None else key.swarm_id, "private": key is not None}


def describe_islands(network: TcpNetwork) -> list[Event]:
    """The peers that were called, in islands of short round trips; this node's own first."""
    islands: list[Event] = []
    for number, island in enumerate(network.links.find_islands(network.peer_id)):
        peers: list[Event] = []
        for peer in island:
            link = network.links.get(peer)
            if link is not None and peer != network.peer_id:
                rate = round(link.bytes_per_s) if link.bytes_per_s is not None else None
                peers.append({"peer_id": peer, "rtt_ms": round(link.rtt_s * 1e3, 3), "bytes_per_s": rate})
        islands.append({"own": number == 0, "peers": peers})
    return islands


def check_bootstrap(addresses: list[str]) -> None:
    """Raises:
    ConfigError: an address is none, or names no peer.
    """
    for address in addresses:
        try:
            peer_id = parse_address(address).peer_id
        except ConfigError as error:
            hint = f"{error.hint}; without that option it is the setting network.bootstrap"
            raise ConfigError(f"--bootstrap {error.message}", hint=hint) from error
        if peer_id is None:
            raise ConfigError(f"--bootstrap {address} names no PeerId", hint="it ends in /p2p/12D3Koo…")
