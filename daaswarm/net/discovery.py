"""Carries out what the Kademlia core decides, and keeps the adverts of this node and of those it asked."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import trio
from nacl.signing import SigningKey

from daaswarm.core.adverts import ADVERT_KIND, AdvertBook, Known, to_bitmap
from daaswarm.core.kademlia import TICK_S, Kademlia
from daaswarm.core.kademlia_events import (
    Effect,
    LookupDone,
    Misbehaved,
    ReplyReceived,
    RequestFailed,
    RequestReceived,
    SendRequest,
)
from daaswarm.core.kademlia_events import Reply as KademliaReply
from daaswarm.core.lookup import Want
from daaswarm.core.rng import Rng
from daaswarm.core.signing import MAX_TTL_S, get_peer_id, seal
from daaswarm.errors import DaaswarmError, RemoteProtocolError
from daaswarm.messages import (
    Advert,
    Adverts,
    Contact,
    Failure,
    FindNode,
    FindValue,
    Found,
    GetAdverts,
    Signed,
    Store,
    Stored,
)
from daaswarm.net.network import Network
from daaswarm.types import Dtype, ModelRoot, PeerId

LOOKUP_S = 15.0  # a whole lookup; each request in it has its own, shorter deadline
ADVERT_S = 5.0  # to dial one host and ask for its adverts; the dead cost this once, all at the same time
ASKED_AT_ONCE = 32  # hosts asked for adverts at the same time
RESIGN_S = MAX_TTL_S / 3  # own adverts are signed anew this often

logger = logging.getLogger(__name__)


class Discovery:
    """Finding others and being found.

    Args:
        network: carries the requests; its ``contact`` is what gets published.
        key: this node's key.
        swarm: 32 byte swarm id.
    """

    def __init__(self, network: Network, key: SigningKey, swarm: bytes, rng: Rng) -> None:
        self.kademlia = Kademlia(key, swarm, network.contact, rng)
        self.book = AdvertBook(swarm)
        self._network = network
        self._key = key
        self._swarm = swarm
        self._own: dict[ModelRoot, Advert] = {}
        self._signed: dict[ModelRoot, tuple[Signed, float]] = {}
        self._waiting: dict[str, tuple[trio.Event, list[LookupDone]]] = {}
        self._lookups = 0
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Send what the core wants sent, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                while True:
                    await trio.sleep(TICK_S)
                    now = time.time()
                    self._apply(self.kademlia.tick(now))
                    self.book.tick(now)
            finally:
                self._nursery = None

    def join(self, seeds: Iterable[Contact]) -> None:
        """Introduce this node to the swarm through ``seeds``."""
        self._apply(self.kademlia.join(time.time(), seeds))

    def get_known(self) -> list[Contact]:
        """The peers in the routing table."""
        return [entry.contact for entry in self.kademlia.table.get_entries()]

    # -- asking -------------------------------------------------------------------------------------------------

    async def lookup(self, key: bytes, want: Want) -> LookupDone:
        """One iterative lookup; what had been found when its deadline passed, nothing is nothing."""
        self._lookups += 1
        lookup_id = f"lookup-{self._lookups}"
        done = trio.Event()
        results: list[LookupDone] = []
        self._waiting[lookup_id] = done, results
        try:
            self._apply(self.kademlia.start_lookup(lookup_id, key, time.time(), want))
            with trio.move_on_after(LOOKUP_S):
                await done.wait()
        finally:
            del self._waiting[lookup_id]
        return results[0] if results else LookupDone(lookup_id=lookup_id, contacts=[], records=[])

    async def find_adverts(self, root: ModelRoot) -> list[Known]:
        """The adverts of all live hosts of a model, each fetched from its host just now; this node's own included.

        Asked are the hosts that the swarm points to and those known from before; who doesn't answer is left out.
        """
        found = await self.lookup(bytes.fromhex(root), "records")
        contacts = {
            PeerId(known.advert.peer_id): Contact(peer_id=known.advert.peer_id, addrs=known.advert.addrs)
            for known in self.book.get_adverts(root, time.time())
        }
        contacts |= {PeerId(p.peer_id): Contact(peer_id=p.peer_id, addrs=p.addrs) for p in found.records}
        contacts.pop(self._network.peer_id, None)
        slots = trio.Semaphore(ASKED_AT_ONCE)
        serving: set[PeerId] = set()
        async with trio.open_nursery() as nursery:
            for contact in contacts.values():
                nursery.start_soon(self._fetch_adverts, contact, root, slots, serving)
        if root in self._own:
            self.book.put(self._sign(root), time.time())
            serving.add(self._network.peer_id)
        return [known for known in self.book.get_adverts(root, time.time()) if known.advert.peer_id in serving]

    async def _fetch_adverts(
        self, contact: Contact, root: ModelRoot, slots: trio.Semaphore, serving: set[PeerId]
    ) -> None:
        """Ask a host; it joins ``serving`` if it answers that it has the model."""
        peer = PeerId(contact.peer_id)
        async with slots:
            try:
                reply, _ = await self._network.call(contact, GetAdverts(model_root=root), deadline_s=ADVERT_S)
            except DaaswarmError as error:
                logger.info("host %s can't be asked: %s", peer, error)
                return
        if not isinstance(reply, Adverts):
            logger.info("host %s answered GetAdverts with %s", peer, type(reply).__name__)
            return
        for signed in reply.adverts:
            try:
                self.book.put(signed, time.time())
            except RemoteProtocolError as error:
                logger.info("an advert from %s is refused: %s", peer, error)
            else:
                if get_peer_id(signed.public_key) == peer:
                    serving.add(peer)

    # -- being found --------------------------------------------------------------------------------------------

    def advertise(self, root: ModelRoot, name: str, kind: str, held: dict[int, list[int]], dtype: Dtype) -> None:
        """Tell the swarm what this node serves of a model, from now on."""
        assert self._network.contact is not None
        self._own[root] = Advert(
            peer_id=self._network.peer_id,
            model_root=root,
            model_name=name[:64],
            kind=kind,
            held={layer: to_bitmap(experts) for layer, experts in held.items()},
            dtype=dtype,
            device="cpu",
            addrs=self._network.contact.addrs,
            seq=0,
            expires_at=0.0,
        )
        self._signed.pop(root, None)
        self._apply(self.kademlia.publish(bytes.fromhex(root), time.time()))

    def withdraw(self, root: ModelRoot) -> None:
        """Serve nothing of a model any more."""
        self._own.pop(root, None)
        self._signed.pop(root, None)
        self.kademlia.unpublish(bytes.fromhex(root))

    def _sign(self, root: ModelRoot) -> Signed:
        now = time.time()
        signed, made_at = self._signed.get(root, (None, 0.0))
        if signed is None or now - made_at > RESIGN_S:
            advert = self._own[root]
            fresh = Advert(
                **{
                    name: getattr(advert, name)
                    for name in advert.__struct_fields__
                    if name not in ("seq", "expires_at")
                },
                seq=int(now * 1000),
                expires_at=now + MAX_TTL_S,
            )
            signed = seal(fresh, ADVERT_KIND, self._key, self._swarm)
            self._signed[root] = signed, now
        return signed

    def answer(
        self, peer: PeerId, contact: Contact | None, message: FindNode | FindValue | Store | GetAdverts
    ) -> Found | Stored | Adverts:
        """The reply to a peer's request."""
        if isinstance(message, GetAdverts):
            roots = [message.model_root] if message.model_root else list(self._own)
            return Adverts(adverts=[self._sign(ModelRoot(root)) for root in roots if root in self._own])
        effects = self.kademlia.handle(
            RequestReceived(request_id=0, peer=peer, contact=contact, message=message), time.time()
        )
        replies = [effect.message for effect in effects if isinstance(effect, KademliaReply)]
        self._apply([effect for effect in effects if not isinstance(effect, KademliaReply)])
        if not replies:
            raise RemoteProtocolError("the request contradicts itself")
        return replies[0]

    # -- carrying out -------------------------------------------------------------------------------------------

    def _apply(self, effects: list[Effect]) -> None:
        if self._nursery is None:  # not started or leaving: nothing is sent any more
            return
        for effect in effects:
            if isinstance(effect, SendRequest):
                self._nursery.start_soon(self._send, effect)
            elif isinstance(effect, LookupDone):
                waiting = self._waiting.get(effect.lookup_id)
                if waiting is not None:
                    waiting[1].append(effect)
                    waiting[0].set()
            elif isinstance(effect, Misbehaved):
                logger.info("%s misbehaved: %s", effect.peer, effect.reason)

    async def _send(self, effect: SendRequest) -> None:
        event: ReplyReceived | RequestFailed = RequestFailed(rpc_id=effect.rpc_id)
        try:
            reply, _ = await self._network.call(effect.contact, effect.message, deadline_s=effect.deadline_s)
        except DaaswarmError as error:
            logger.debug("%s to %s: %s", type(effect.message).__name__, effect.contact.peer_id, error)
        else:
            if isinstance(reply, Found | Stored | Failure):
                event = ReplyReceived(rpc_id=effect.rpc_id, message=reply)
        self._apply(self.kademlia.handle(event, time.time()))
