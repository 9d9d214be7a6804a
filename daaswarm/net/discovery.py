"""Finding others and being found: carries out what the Kademlia core decides, beside the membership's part."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import msgspec
import trio
from nacl.signing import SigningKey

from daaswarm.core.adverts import AdvertBook, Known, to_bitmap
from daaswarm.core.kademlia import TICK_S, Kademlia
from daaswarm.core.kademlia_events import (
    Effect,
    LookupDone,
    Misbehaved,
    PublishDone,
    RecordsFound,
    ReplyReceived,
    RequestFailed,
    RequestLate,
    RequestReceived,
    SendRequest,
)
from daaswarm.core.kademlia_events import Reply as KademliaReply
from daaswarm.core.lookup import Want
from daaswarm.core.notary import KeyNotary
from daaswarm.core.rng import Rng
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
    Store,
    Stored,
)
from daaswarm.net.finding import Finder, IsEnough, OnRecords
from daaswarm.net.network import Network
from daaswarm.net.spreading import Spreader
from daaswarm.types import CODECS, Dtype, ModelRoot, PeerId

LOOKUP_S = 15.0  # a whole lookup; each request in it has its own, shorter deadline

logger = logging.getLogger(__name__)


class Discovery:
    """Finding others and being found.

    Args:
        network: carries the requests; its ``contact`` is what gets published.
        key: this node's key.
        swarm: 32 byte swarm id.
        is_private: every peer has proven the swarm's key, so that many in one public network are no attack.
    """

    def __init__(self, network: Network, key: SigningKey, swarm: bytes, rng: Rng, *, is_private: bool = False) -> None:
        self.kademlia = Kademlia(key, swarm, network.contact, rng, limit_subnets=not is_private)
        notary = self.notary = KeyNotary(key, swarm)
        self.spreader = Spreader(network, notary, rng, swarm, self.get_known, self._get_pointed)
        self.membership = self.spreader.membership
        self.finder = Finder(network, notary, self.spreader, self.lookup, self.get_known)
        self._network = network
        self._waiting: dict[str, tuple[trio.Event, list[LookupDone], OnRecords | None]] = {}
        self._publishing: dict[bytes, tuple[trio.Event, list[PublishDone]]] = {}  # keys whose end somebody waits for
        self._lookups = 0
        self._farewells: set[int] = set()  # requests that withdraw something, not yet answered
        self._said = trio.Event()
        self._unanswered: dict[int, tuple[float, SendRequest]] = {}  # by rpc_id: when each is late
        self._asked = trio.Event()
        self._nursery: trio.Nursery | None = None

    @property
    def peer_id(self) -> PeerId:
        """This node's."""
        return self._network.peer_id

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Send what the core wants sent, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(self.spreader.run)
            nursery.start_soon(self._tell_late)
            task_status.started()
            try:
                while True:
                    await trio.sleep(TICK_S)
                    self._apply(self.kademlia.tick(time.time()))
            finally:
                self._nursery = None

    def join(self, seeds: Iterable[Contact]) -> None:
        """Introduce this node to the swarm through ``seeds``."""
        self._apply(self.kademlia.join(time.time(), seeds))

    def meet(self, contact: Contact) -> None:
        """Introduce this node to the swarm through a peer that nobody named."""
        self._apply(self.kademlia.meet(contact, time.time()))

    def restore(self, contacts: Iterable[Contact]) -> None:
        """Find the swarm again through peers of an earlier run, whether or not any of the seeds is there."""
        self._apply(self.kademlia.restore(contacts, time.time()))

    def note_jump(self, by_s: float) -> None:
        """The clock was set by ``by_s``: times noted before move with it, and what this node signed is signed anew."""
        self.kademlia.shift(by_s)
        self.membership.shift(by_s)
        self.spreader.gossip.shift(by_s)
        self.renew()

    def rejoin(self) -> None:
        """Look this node up again: others may have given it up meanwhile."""
        self.join([])
        self.renew()

    @property
    def book(self) -> AdvertBook:
        """The adverts that this node believes."""
        return self.membership.book

    def get_known(self) -> list[Contact]:
        """The peers in the routing table."""
        return [entry.contact for entry in self.kademlia.table.get_entries()]

    # -- asking -------------------------------------------------------------------------------------------------

    async def lookup(self, key: bytes, want: Want, on_records: OnRecords | None = None) -> LookupDone:
        """One iterative lookup; nothing if its deadline passed. ``on_records`` is told what it finds as it comes."""
        self._lookups += 1
        lookup_id = f"lookup-{self._lookups}"
        done = trio.Event()
        results: list[LookupDone] = []
        self._waiting[lookup_id] = done, results, on_records
        try:
            self._apply(self.kademlia.start_lookup(lookup_id, key, time.time(), want))
            with trio.move_on_after(LOOKUP_S):
                await done.wait()
        finally:
            del self._waiting[lookup_id]
        return results[0] if results else LookupDone(lookup_id=lookup_id, contacts=[], records=[])

    async def find_adverts(self, root: ModelRoot, is_enough: IsEnough | None = None) -> list[Known]:
        """:meth:`Finder.find`."""
        return await self.finder.find(root, is_enough)

    # -- being found --------------------------------------------------------------------------------------------

    def advertise(
        self,
        root: ModelRoot,
        name: str,
        kind: str,
        held: dict[int, list[int]],
        dtype: Dtype,
        *,
        paused: bool = False,
        tags: Iterable[str] = (),
        device: str = "cpu",
    ) -> None:
        """Tell the swarm what this node serves of a model, from now on."""
        assert self._network.contact is not None
        advert = Advert(
            peer_id=self._network.peer_id,
            model_root=root,
            model_name=name[:64],
            kind=kind,
            held={layer: to_bitmap(experts) for layer, experts in held.items()},
            dtype=dtype,
            device=device,
            addrs=self._network.contact.addrs,
            seq=0,
            expires_at=0.0,
            paused=paused,
            tags=list(tags),
            codecs=list(CODECS),
        )
        self.spreader.perform(self.membership.advertise(advert, time.time()))
        self._apply(self.kademlia.publish(bytes.fromhex(root), time.time()))

    async def wait_published(self, root: ModelRoot) -> PublishDone:
        """How the publishing of a model that is under way ends, after :meth:`advertise` or :meth:`renew`. The caller
        sets the deadline."""
        done, results = self._publishing.setdefault(bytes.fromhex(root), (trio.Event(), []))
        await done.wait()
        return results[0]

    def set_contact(self, contact: Contact) -> None:
        """This node's addresses changed: the swarm learns it wherever it learnt the old ones."""
        self.kademlia.set_contact(contact)
        self._change_adverts(addrs=contact.addrs)
        self._publish_own()

    def note_moved(self, contact: Contact) -> None:
        """A connected peer's addresses changed."""
        if contact.addrs:
            self.kademlia.table.note_seen(contact, time.time())

    def set_paused(self, paused: bool) -> None:
        """Whether calls are answered now. Those who follow the models learn it; the pointers stay as they are."""
        self._change_adverts(paused=paused)

    def renew(self) -> None:
        """Sign and publish everything anew: the clock was set, or the swarm may have forgotten this node."""
        self.spreader.perform(self.membership.renew(time.time()))
        self._publish_own()

    def _change_adverts(self, **changes: object) -> None:
        for root in self.membership.own:
            advert = self.membership.own.get(root)
            assert advert is not None
            changed = msgspec.structs.replace(advert, **changes)
            self.spreader.perform(self.membership.change(changed, time.time()))

    def _publish_own(self) -> None:
        keys = [bytes.fromhex(root) for root in self.membership.own]
        if keys:
            self._apply(self.kademlia.publish_all(keys, time.time()))

    def withdraw(self, root: ModelRoot) -> None:
        """Serve nothing of a model any more, and say so to who follows it and to whoever points others here."""
        self.spreader.perform(self.membership.withdraw(root, time.time()))
        effects = self.kademlia.unpublish(bytes.fromhex(root), time.time())
        self._farewells |= {effect.rpc_id for effect in effects if isinstance(effect, SendRequest)}
        self._apply(effects)

    async def leave(self) -> None:
        """Withdraw everything, and wait until that is said. The caller sets the deadline."""
        for root in self.membership.own:
            self.withdraw(root)
        await self.spreader.say_goodbye()
        while self._farewells and self._nursery is not None:
            self._said = trio.Event()
            await self._said.wait()

    def answer(
        self, peer: PeerId, contact: Contact | None, message: FindNode | FindValue | Store | GetAdverts
    ) -> Found | Stored | Adverts:
        """The reply to a peer's request."""
        if isinstance(message, GetAdverts):
            roots = [ModelRoot(message.model_root)] if message.model_root else list(self.membership.own)
            signed = (self.membership.own.get_signed(root, time.time()) for root in roots)
            return Adverts(adverts=[advert for advert in signed if advert is not None])
        effects = self.kademlia.handle(
            RequestReceived(request_id=0, peer=peer, contact=contact, message=message), time.time()
        )
        replies = [effect.message for effect in effects if isinstance(effect, KademliaReply)]
        self._apply([effect for effect in effects if not isinstance(effect, KademliaReply)])
        if not replies:
            raise RemoteProtocolError("the request contradicts itself")
        return replies[0]

    async def _get_pointed(self, root: ModelRoot) -> list[Contact]:
        return await self.finder.get_pointed(root)

    # -- carrying out -------------------------------------------------------------------------------------------

    def _apply(self, effects: list[Effect]) -> None:
        if self._nursery is None:  # not started or leaving: nothing is sent any more
            return
        for effect in effects:
            if isinstance(effect, SendRequest):
                self._nursery.start_soon(self._send, effect)
            elif isinstance(effect, RecordsFound):
                asker = self._waiting.get(effect.lookup_id)
                if asker is not None and asker[2] is not None:
                    asker[2](effect.records)
            elif isinstance(effect, LookupDone):
                waiting = self._waiting.get(effect.lookup_id)
                if waiting is not None:
                    waiting[1].append(effect)
                    waiting[0].set()
            elif isinstance(effect, PublishDone):
                level = logging.INFO if effect.refused else logging.DEBUG
                logger.log(level, "published at %d of %d, refused: %s", effect.stored, effect.asked, effect.refused)
                done, results = self._publishing.pop(effect.key, (trio.Event(), []))
                results.append(effect)
                done.set()
            elif isinstance(effect, Misbehaved):
                logger.info("%s misbehaved: %s", effect.peer, effect.reason)

    async def _send(self, effect: SendRequest) -> None:
        event: ReplyReceived | RequestFailed = RequestFailed(rpc_id=effect.rpc_id)
        if effect.late_s is not None:
            self._unanswered[effect.rpc_id] = trio.current_time() + effect.late_s, effect
            if len(self._unanswered) == 1:
                self._asked.set()
        try:
            reply, _ = await self._network.call(effect.contact, effect.message, deadline_s=effect.deadline_s)
        except DaaswarmError as error:
            logger.debug("%s to %s: %s", type(effect.message).__name__, effect.contact.peer_id, error)
        else:
            if isinstance(reply, Found | Stored | Failure):
                event = ReplyReceived(rpc_id=effect.rpc_id, message=reply)
        self._unanswered.pop(effect.rpc_id, None)
        self._farewells.discard(effect.rpc_id)
        self._said.set()
        self._handle(event, effect)

    async def _tell_late(self) -> None:
        """Tell the core of requests that take long. One task for all: most are answered long before."""
        while True:
            if not self._unanswered:
                self._asked = trio.Event()
                await self._asked.wait()
            rpc_id = next(iter(self._unanswered))  # all wait equally long, so the first is due first
            due, effect = self._unanswered[rpc_id]
            await trio.sleep_until(due)
            if self._unanswered.pop(rpc_id, None) is not None:
                self._handle(RequestLate(rpc_id=rpc_id), effect)

    def _handle(self, event: ReplyReceived | RequestFailed | RequestLate, effect: SendRequest) -> None:
        try:
            self._apply(self.kademlia.handle(event, time.time()))
        except Exception:  # a bug of ours costs one request, not the node
            logger.exception("an answer of %s could not be handled", effect.contact.peer_id)
