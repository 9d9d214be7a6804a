"""Carries out what the Kademlia core decides, and keeps the adverts of this node and of those it asked."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import msgspec
import trio
from nacl.signing import SigningKey

from daaswarm import messages
from daaswarm.core.adverts import ADVERT_KIND, AdvertBook, Known, check_advert, to_bitmap
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
ASKED = 256  # hosts asked for adverts at most: more than serve one answer, fewer than a flood of pointers names
ASKING_S = 15.0  # for all of them together: three rounds of hosts that are all dead
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
        self._seq = 0  # of the advert signed last
        self._farewells: set[int] = set()  # requests that withdraw something, not yet answered
        self._said = trio.Event()
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

    def note_jump(self, by_s: float) -> None:
        """The clock was set by ``by_s``: times noted before move with it, and what this node signed is signed anew."""
        self.kademlia.shift(by_s)
        self.renew()

    def rejoin(self) -> None:
        """Look this node up again: others may have given it up meanwhile."""
        self.join([])
        self.renew()

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

        Asked are those known from before and the hosts that the swarm points to, :data:`ASKED` at most, connected ones
        first; who doesn't answer is left out.
        """
        found = await self.lookup(bytes.fromhex(root), "records")
        contacts = {
            PeerId(known.advert.peer_id): Contact(peer_id=known.advert.peer_id, addrs=known.advert.addrs)
            for known in self.book.get_adverts(root, time.time())
        }
        contacts |= {PeerId(p.peer_id): Contact(peer_id=p.peer_id, addrs=p.addrs) for p in found.records}
        contacts.pop(self._network.peer_id, None)
        asked = sorted(contacts.values(), key=lambda c: not self._network.is_connected(PeerId(c.peer_id)))[:ASKED]
        waiting = iter(asked)
        serving: set[PeerId] = set()

        async def ask_some() -> None:
            for contact in waiting:  # shared by all tasks, so hosts are asked in order
                await self._fetch_adverts(contact, root, serving)

        with trio.move_on_after(ASKING_S):
            async with trio.open_nursery() as nursery:
                for _ in range(min(ASKED_AT_ONCE, len(asked))):
                    nursery.start_soon(ask_some)
        if root in self._own:
            self.book.put(self._sign(root), time.time())
            serving.add(self._network.peer_id)
        return [known for known in self.book.get_adverts(root, time.time()) if known.advert.peer_id in serving]

    async def find_all_adverts(self) -> list[Known]:
        """What the peers that this node knows serve, of any model; this node's own included. No lookup can ask for
        that: the swarm's keys are models' names."""
        contacts = {PeerId(contact.peer_id): contact for contact in self.get_known()}
        now = time.time()
        for root in self.book.get_models(now):
            for known in self.book.get_adverts(root, now):
                peer = PeerId(known.advert.peer_id)
                contacts.setdefault(peer, Contact(peer_id=peer, addrs=known.advert.addrs))
        contacts.pop(self._network.peer_id, None)
        asked = sorted(contacts.values(), key=lambda c: not self._network.is_connected(PeerId(c.peer_id)))[:ASKED]
        waiting = iter(asked)
        found: list[Known] = []

        async def ask_some() -> None:
            for contact in waiting:
                found.extend(await self._fetch_all(contact))

        with trio.move_on_after(ASKING_S):
            async with trio.open_nursery() as nursery:
                for _ in range(min(ASKED_AT_ONCE, len(asked))):
                    nursery.start_soon(ask_some)
        for root in self._own:
            signed = self._sign(root)
            found.append(Known(messages.get_decoder(Advert).decode(signed.payload), signed))  # type: ignore[arg-type]
        return found

    async def _fetch_all(self, contact: Contact) -> list[Known]:
        """All adverts of one peer, checked; none if it doesn't answer."""
        peer = PeerId(contact.peer_id)
        try:
            reply, _ = await self._network.call(contact, GetAdverts(), deadline_s=ADVERT_S)
        except DaaswarmError as error:
            logger.info("%s can't be asked what it serves: %s", peer, error)
            return []
        found: dict[ModelRoot, Known] = {}
        for signed in reply.adverts if isinstance(reply, Adverts) else []:
            try:
                known = check_advert(signed, self._swarm, time.time())
            except RemoteProtocolError as error:
                logger.info("an advert from %s is refused: %s", peer, error)
                continue
            if known.advert.peer_id == peer and not known.advert.withdrawn:
                found[ModelRoot(known.advert.model_root)] = known
        return list(found.values())

    async def _fetch_adverts(self, contact: Contact, root: ModelRoot, serving: set[PeerId]) -> None:
        """Ask a host; it joins ``serving`` if it answers that it has the model."""
        peer = PeerId(contact.peer_id)
        try:
            reply, _ = await self._network.call(contact, GetAdverts(model_root=root), deadline_s=ADVERT_S)
        except DaaswarmError as error:
            logger.info("host %s can't be asked: %s", peer, error)
            return
        if not isinstance(reply, Adverts):
            logger.info("host %s answered GetAdverts with %s", peer, type(reply).__name__)
            return
        for signed in reply.adverts:
            if not _is_advert_of(signed, peer, root):
                logger.info("an advert from %s is ignored: it was not asked for", peer)
                continue
            try:
                self.book.put(signed, time.time())
            except RemoteProtocolError as error:
                logger.info("an advert from %s is refused: %s", peer, error)
            else:
                serving.add(peer)
        if peer not in serving:
            self.book.withdraw(peer, root)  # it says itself that it left; next time it isn't even asked

    # -- being found --------------------------------------------------------------------------------------------

    def advertise(
        self, root: ModelRoot, name: str, kind: str, held: dict[int, list[int]], dtype: Dtype, *, paused: bool = False
    ) -> None:
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
            paused=paused,
        )
        self._signed.pop(root, None)
        self._apply(self.kademlia.publish(bytes.fromhex(root), time.time()))

    def set_paused(self, paused: bool) -> None:
        """Whether calls are answered now. Those who ask for adverts learn it; the pointers stay as they are."""
        for root, advert in self._own.items():
            if advert.paused != paused:
                self._own[root] = msgspec.structs.replace(advert, paused=paused)
                self._signed.pop(root, None)

    def renew(self) -> None:
        """Sign and publish everything anew: the clock was set, or the swarm may have forgotten this node."""
        self._signed.clear()
        for root in self._own:
            self._apply(self.kademlia.publish(bytes.fromhex(root), time.time()))

    def withdraw(self, root: ModelRoot) -> None:
        """Serve nothing of a model any more, and say so to whoever points others here."""
        self._own.pop(root, None)
        self._signed.pop(root, None)
        effects = self.kademlia.unpublish(bytes.fromhex(root), time.time())
        self._farewells |= {effect.rpc_id for effect in effects if isinstance(effect, SendRequest)}
        self._apply(effects)

    async def leave(self) -> None:
        """Withdraw everything, and wait until that is said. The caller sets the deadline."""
        for root in list(self._own):
            self.withdraw(root)
        while self._farewells and self._nursery is not None:
            self._said = trio.Event()
            await self._said.wait()

    def _sign(self, root: ModelRoot) -> Signed:
        now = time.time()
        signed, made_at = self._signed.get(root, (None, 0.0))
        if signed is None or abs(now - made_at) > RESIGN_S:  # abs: the clock may have been set back
            self._seq = max(self._seq + 1, int(now * 1000))  # grows also when the clock is set back
            fresh = msgspec.structs.replace(self._own[root], seq=self._seq, expires_at=now + MAX_TTL_S)
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
        self._farewells.discard(effect.rpc_id)
        self._said.set()
        try:
            self._apply(self.kademlia.handle(event, time.time()))
        except Exception:  # a bug of ours costs one request, not the node
            logger.exception("an answer of %s could not be handled", effect.contact.peer_id)


def _is_advert_of(signed: Signed, peer: PeerId, root: ModelRoot) -> bool:
    """Whether it says that it is the peer's own advert of that model: others would fill the book with what nobody
    asked for."""
    if get_peer_id(signed.public_key) != peer:
        return False
    try:
        advert = messages.decode(Advert, signed.payload)
    except msgspec.DecodeError:
        return False
    return isinstance(advert, Advert) and advert.model_root == root
