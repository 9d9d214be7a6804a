"""The swarm's phone book: who is near a key, and which peers published under it. Sans-IO Kademlia.

The shell (``net/``) feeds events and carries out effects: it answers with :class:`Reply`, sends each
:class:`SendRequest` over an authenticated connection to exactly that peer, enforces ``deadline_s``, and reports
:class:`ReplyReceived` or :class:`RequestFailed` once per ``rpc_id``. It calls :meth:`Kademlia.tick` every
:data:`TICK_S`. Contacts named by others are hearsay: they enter the routing table only after answering us.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import msgspec
from nacl.signing import SigningKey

from daaswarm.core.kademlia_events import (
    Effect,
    Event,
    LookupDone,
    Misbehaved,
    PublishDone,
    Reply,
    RequestFailed,
    RequestReceived,
    SendRequest,
)
from daaswarm.core.lookup import ALPHA, Lookup, Want
from daaswarm.core.record_store import POINTER_KIND, RecordStore, open_pointer
from daaswarm.core.rng import Rng
from daaswarm.core.routing_table import NEVER, K, RoutingTable, get_node_id
from daaswarm.core.signing import MAX_TTL_S, get_peer_id, get_public_key, seal
from daaswarm.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from daaswarm.limits import RECORDS_PER_KEY
from daaswarm.messages import (
    Contact,
    Failure,
    FindNode,
    FindValue,
    Found,
    Pointer,
    Signed,
    Store,
    Stored,
)
from daaswarm.types import PeerId

TICK_S = 2.0  # how often the shell calls tick
REPUBLISH_S = MAX_TTL_S / 3  # two may be lost before a record dies
REFRESH_S = 10 * 60.0  # a bucket without a lookup for this long is looked up
PROBE_S = 5 * 60.0  # a contact silent for this long is asked whether it is there
PROBE_FAILING_S = 5.0  # the second chance of one that just failed
SHUN_S = 60.0  # a peer that failed is not asked again on others' word for this long
SHUNNED = 4_096  # peers remembered as failed
SEED_S = 15.0  # between attempts to join while the table is empty
RESEED_S = 2 * 60.0  # between calls to seeds that left the table: a restarted seed must not found a second swarm
SWEEP_S = 30.0  # between walks over all stored records
LOOKUPS = 1_024  # running at once in one node


class _Rpc(msgspec.Struct, frozen=True):
    """A lookup's request has ``lookup``, a Store ``key`` and the ``seq`` it carried, a probe neither."""

    contact: Contact
    lookup: str | None = None
    key: bytes | None = None
    seq: int = 0


class _Publication(msgspec.Struct):
    """``stores`` counts the Store requests with this ``seq`` that are still out."""

    signed: Signed
    seq: int
    due_at: float
    stores: int = 0
    asked: int = 0
    stored: int = 0
    keepers: list[Contact] = []  # who was asked to store it, this time or the time before


class Kademlia:
    """One node's part in the DHT.

    Args:
        key: signs the pointers that this node publishes; its PeerId is this node's.
        contact: where others reach this node; ``None`` if nobody can (it then publishes nothing).
        seeds: asked while the table is empty. One that answers is enough.
        rng: spreads refreshes over the key space.
    """

    def __init__(
        self,
        key: SigningKey,
        swarm: bytes,
        contact: Contact | None,
        rng: Rng,
        *,
        seeds: Iterable[Contact] = (),
        k: int = K,
    ) -> None:
        self.peer_id = get_peer_id(bytes(key.verify_key))
        self.table = RoutingTable(self.peer_id, k)
        self.store = RecordStore(swarm)
        self._key, self._swarm, self._rng, self._k = key, swarm, rng, k
        self.contact: Contact | None = None
        self.set_contact(contact)
        self._seeds = list(seeds)
        self._seeded_at = self._swept_at = NEVER
        self._lookups: dict[str, Lookup] = {}
        self._rpcs: dict[int, _Rpc] = {}
        self._publications: dict[bytes, _Publication] = {}
        self._publishing: dict[str, bytes] = {}  # lookup id -> key
        self._shunned: dict[PeerId, float] = {}  # until when, oldest first
        self._next_rpc = 0
        self._next_internal = 0

    # -- what the node wants ------------------------------------------------------------------------------------

    def set_contact(self, contact: Contact | None) -> None:
        """This node's addresses changed; the next publishing round tells the swarm."""
        if contact is not None and contact.peer_id != self.peer_id:
            raise LocalProtocolError(f"contact of {contact.peer_id} given to node {self.peer_id}")
        self.contact = contact

    def join(self, now: float, seeds: Iterable[Contact] = ()) -> list[Effect]:
        """Looks this node up through the seeds, these and earlier ones, which introduces it to its neighbours."""
        known = {seed.peer_id for seed in self._seeds}
        self._seeds += [seed for seed in seeds if seed.peer_id not in known]
        self._seeded_at = now
        return self._start(self._make_lookup_id("join"), self._own_id(), "nodes", now, self._seeds)

    def start_lookup(self, lookup_id: str, target: bytes, now: float, want: Want = "nodes") -> list[Effect]:
        """Ends in one :class:`LookupDone` with this ``lookup_id``, at once if nobody is known.

        Raises:
            LocalProtocolError: ``lookup_id`` is running, ``target`` isn't 32 bytes, or too many lookups run.
        """
        return self._start(lookup_id, target, want, now, ())

    def publish(self, key: bytes, now: float) -> list[Effect]:
        """Points ``key`` at this node, now and again every :data:`REPUBLISH_S`, until :meth:`unpublish`.

        Raises:
            LocalProtocolError: this node has no address that others could be pointed at.
        """
        if self.contact is None:
            raise LocalProtocolError("a node without an address can't publish")
        signed, seq = self._point(key, self.contact.addrs, now)
        before = self._publications.get(key)
        keepers = before.keepers if before is not None else []
        self._publications[key] = _Publication(signed, seq, now + REPUBLISH_S, keepers=keepers)
        if key in self._publishing.values():
            return []  # the lookup under way ends in storing this record
        lookup_id = self._make_lookup_id("publish")
        self._publishing[lookup_id] = key
        return self._start(lookup_id, key, "nodes", now, ())

    def unpublish(self, key: bytes, now: float) -> list[Effect]:
        """Points ``key`` at this node no more: whoever keeps the pointer is given a newer one, without addresses.

        That one lives as long as the other would have, so that no replay revives it.
        """
        publication = self._publications.pop(key, None)
        if publication is None:
            return []
        signed, seq = self._point(key, [], now)
        message = Store(records=[signed])
        return [self._send(contact, message, key=key, seq=seq) for contact in publication.keepers]

    def _point(self, key: bytes, addrs: list[str], now: float) -> tuple[Signed, int]:
        """A new pointer of this node, kept here too, and its sequence number."""
        stored = [pointer.seq for pointer, _ in self.store.get(key, now) if pointer.peer_id == self.peer_id]
        seq = max(int(now * 1000), *(n + 1 for n in stored), 0)  # grows across restarts and clocks set back
        pointer = Pointer(key=key, peer_id=self.peer_id, addrs=addrs, seq=seq, expires_at=now + MAX_TTL_S)
        signed = seal(pointer, POINTER_KIND, self._key, self._swarm)
        with contextlib.suppress(RemoteProtocolError):  # our store is full of others' records; theirs keep ours
            self.store.put(signed, now)
        return signed, seq

    def tick(self, now: float) -> list[Effect]:
        """What is due by now: joining, republishing, refreshing buckets, probing silent contacts, dropping records."""
        effects: list[Effect] = []
        if len(self._lookups) < LOOKUPS // 2:  # maintenance leaves room for what the node itself wants
            if not len(self.table) and self._seeds and now - self._seeded_at >= SEED_S:
                effects += self.join(now)
            for key in [key for key, p in self._publications.items() if now >= p.due_at]:
                if self.contact is not None and len(self._lookups) < LOOKUPS // 2:
                    effects += self.publish(key, now)
            if len(self.table):
                for target in self.table.get_stale_targets(now - REFRESH_S, ALPHA, self._rng):
                    effects += self._start(self._make_lookup_id("refresh"), target, "nodes", now, ())
        effects += self._probe(now)
        if now - self._swept_at >= SWEEP_S:
            self._swept_at = now
            self.store.tick(now)
        return effects

    def shift(self, by_s: float) -> None:
        """The clock was set by ``by_s``: what happened ``n`` seconds ago still did. Records keep the times their
        publishers gave them."""
        self.table.shift(by_s)
        self._seeded_at += by_s
        self._swept_at += by_s
        self._shunned = {peer: until + by_s for peer, until in self._shunned.items()}
        for publication in self._publications.values():
            publication.due_at += by_s

    # -- what the network says ----------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Effect]:
        """One event in, effects out. Late or unknown ``rpc_id``s are nobody's fault and change nothing."""
        if isinstance(event, RequestReceived):
            return self._on_request(event, now)
        rpc = self._rpcs.pop(event.rpc_id, None)
        if rpc is None:
            return []
        if isinstance(event, RequestFailed):
            return self._on_failure(rpc, now)
        return self._on_reply(rpc, event.message, now)

    def validate(self) -> None:
        """Asserts the invariants."""
        self.table.validate()
        self.store.validate()
        assert len(self._lookups) <= LOOKUPS and len(self._shunned) <= SHUNNED
        for rpc in self._rpcs.values():
            assert rpc.lookup is None or rpc.key is None
        running = {rpc.lookup for rpc in self._rpcs.values() if rpc.lookup is not None}
        assert self._lookups.keys() <= running, "a lookup waits for nothing"
        assert self._publishing.keys() <= self._lookups.keys()

    def _on_request(self, event: RequestReceived, now: float) -> list[Effect]:
        message = event.message
        if event.contact is not None:
            if event.contact.peer_id != event.peer:
                return [Misbehaved(peer=event.peer, reason=f"gave the contact of {event.contact.peer_id} as its own")]
            if event.contact.addrs:
                self._note_alive(event.contact, now)
        reply: Found | Stored
        if isinstance(message, FindNode):
            reply = Found(contacts=self._get_others(message.target, event.peer))
        elif isinstance(message, FindValue):
            records = [signed for _, signed in self.store.get(message.key, now)]
            reply = Found(contacts=self._get_others(message.key, event.peer), records=records)
        else:
            reply = self._store(message, now)
        return [Reply(request_id=event.request_id, message=reply)]

    def _on_reply(self, rpc: _Rpc, message: Found | Stored | Failure, now: float) -> list[Effect]:
        peer = PeerId(rpc.contact.peer_id)
        if rpc.key is not None:
            if isinstance(message, Found):
                return [Misbehaved(peer=peer, reason="answered Store with Found"), *self._on_failure(rpc, now)]
            self._note_alive(rpc.contact, now)
            return self._count_store(rpc.key, rpc.seq, isinstance(message, Stored) and not message.refused)
        if isinstance(message, Stored):
            return [Misbehaved(peer=peer, reason="answered a lookup with Stored"), *self._on_failure(rpc, now)]
        lookup = self._lookups.get(rpc.lookup) if rpc.lookup is not None else None
        reason = ""
        if lookup is not None and isinstance(message, Found):
            reason = self._take_found(lookup, message, now)
        if reason:
            return [Misbehaved(peer=peer, reason=reason), *self._on_failure(rpc, now)]
        self._note_alive(rpc.contact, now)
        if lookup is None or rpc.lookup is None:
            return []
        if isinstance(message, Failure):
            lookup.note_failed(peer)  # busy, but there
        else:
            lookup.note_answered(peer)
        return self._advance(rpc.lookup, now)

    def _on_failure(self, rpc: _Rpc, now: float) -> list[Effect]:
        peer = PeerId(rpc.contact.peer_id)
        self.table.note_failed(peer, now)
        self._shunned.pop(peer, None)
        self._shunned[peer] = now + SHUN_S
        if len(self._shunned) > SHUNNED:
            del self._shunned[next(iter(self._shunned))]
        if rpc.key is not None:
            return self._count_store(rpc.key, rpc.seq, False)
        lookup = self._lookups.get(rpc.lookup) if rpc.lookup is not None else None
        if lookup is None or rpc.lookup is None:
            return []
        lookup.note_failed(peer)
        return self._advance(rpc.lookup, now)

    def _take_found(self, lookup: Lookup, message: Found, now: float) -> str:
        """Feeds an answer to its lookup. Returns what is wrong with it; nothing after that point is believed."""
        if len(message.contacts) > max(self._k, K) or len(message.records) > RECORDS_PER_KEY:
            return f"answered with {len(message.contacts)} contacts and {len(message.records)} records"
        known = {signed.payload: signed for _, signed in lookup.records.values()}
        for signed in message.records if lookup.want == "records" else ():
            if known.get(signed.payload) == signed:
                continue  # checked when another peer sent it
            try:
                pointer = open_pointer(signed, self._swarm, now)
            except RemoteProtocolError as error:
                if error.reject:
                    return error.message
                continue
            if pointer.key != lookup.target:
                return "answered with a record of another key"
            lookup.add_record(pointer, signed)
        contacts: list[Contact] = []
        for contact in message.contacts:
            try:
                get_public_key(contact.peer_id)
            except ConfigError as error:
                return error.message
            if self._shunned.get(PeerId(contact.peer_id), NEVER) <= now:
                contacts.append(contact)
        lookup.add(contacts)
        return ""

    # -- parts --------------------------------------------------------------------------------------------------

    def _start(self, lookup_id: str, target: bytes, want: Want, now: float, extra: Iterable[Contact]) -> list[Effect]:
        if lookup_id in self._lookups or len(target) != 32:
            raise LocalProtocolError(f"lookup {lookup_id!r} is running already, or its target isn't 32 bytes")
        if len(self._lookups) >= LOOKUPS:
            raise LocalProtocolError(f"{LOOKUPS} lookups are running")
        lookup = self._lookups[lookup_id] = Lookup(target, want, self.peer_id, self._k)
        if want == "records":
            for pointer, signed in self.store.get(target, now):
                lookup.add_record(pointer, signed)
        near = self.table.closest(target, self._k)
        lookup.add(near)
        lookup.add(extra if near else self._seeds)
        self.table.note_refreshed(target, now)
        return self._advance(lookup_id, now)

    def _advance(self, lookup_id: str, now: float) -> list[Effect]:
        lookup = self._lookups[lookup_id]
        if not lookup.is_done():
            message = FindNode(target=lookup.target) if lookup.want == "nodes" else FindValue(key=lookup.target)
            return [self._send(contact, message, lookup=lookup_id) for contact in lookup.take_next()]
        del self._lookups[lookup_id]
        key = self._publishing.pop(lookup_id, None)
        if key is not None:
            return self._store_at(key, lookup.get_closest())
        if lookup_id.startswith(_INTERNAL):
            return []
        # A record may have expired while the lookup ran; one without addresses says that its publisher left the key.
        records = [pointer for pointer, _ in lookup.records.values() if pointer.expires_at > now and pointer.addrs]
        return [LookupDone(lookup_id=lookup_id, contacts=lookup.get_closest(), records=records)]

    def _send(
        self,
        contact: Contact,
        message: FindNode | FindValue | Store,
        *,
        lookup: str | None = None,
        key: bytes | None = None,
        seq: int = 0,
    ) -> SendRequest:
        self._next_rpc += 1
        self._rpcs[self._next_rpc] = _Rpc(contact, lookup, key, seq)
        return SendRequest(rpc_id=self._next_rpc, contact=contact, message=message)

    def _store_at(self, key: bytes, contacts: list[Contact]) -> list[Effect]:
        publication = self._publications.get(key)
        if publication is None:
            return []  # unpublished meanwhile
        publication.stores = publication.asked = len(contacts)
        publication.keepers = contacts
        if not contacts:
            return [PublishDone(key=key, stored=0, asked=0)]
        message = Store(records=[publication.signed])
        return [self._send(contact, message, key=key, seq=publication.seq) for contact in contacts]

    def _count_store(self, key: bytes, seq: int, stored: bool) -> list[Effect]:
        publication = self._publications.get(key)
        if publication is None or publication.seq != seq:
            return []  # published anew meanwhile; that round reports
        publication.stores -= 1
        publication.stored += stored
        if publication.stores:
            return []
        return [PublishDone(key=key, stored=publication.stored, asked=publication.asked)]

    def _store(self, message: Store, now: float) -> Stored:
        refused: dict[int, str] = {}
        for i, signed in enumerate(message.records[:RECORDS_PER_KEY]):
            try:
                self.store.put(signed, now)
            except RemoteProtocolError as error:
                refused[i] = error.message[:64]
        return Stored(refused=refused)

    def _probe(self, now: float) -> list[Effect]:
        """Asks contacts that failed once or were silent for long, and seeds that left, whether they are there."""
        asked = {rpc.contact.peer_id for rpc in self._rpcs.values()} | {self.peer_id}
        due = [
            entry.contact
            for entry in self.table.get_entries()
            if entry.contact.peer_id not in asked
            and (now - entry.failed_at >= PROBE_FAILING_S if entry.failures else now - entry.seen_at >= PROBE_S)
        ]
        due = due[:ALPHA]
        if now - self._seeded_at >= RESEED_S:
            self._seeded_at = now
            due += [s for s in self._seeds if s.peer_id not in asked and PeerId(s.peer_id) not in self.table]
        return [self._send(contact, FindNode(target=self._own_id())) for contact in due]

    def _note_alive(self, contact: Contact, now: float) -> None:
        self._shunned.pop(PeerId(contact.peer_id), None)
        self.table.note_seen(contact, now)

    def _get_others(self, target: bytes, asker: PeerId) -> list[Contact]:
        return [c for c in self.table.closest(target, self._k + 1) if c.peer_id != asker][: self._k]

    def _own_id(self) -> bytes:
        return get_node_id(self.peer_id)

    def _make_lookup_id(self, purpose: str) -> str:
        self._next_internal += 1
        return f"{_INTERNAL}{purpose}-{self._next_internal}"


_INTERNAL = "kademlia/"  # lookup ids of our own begin with this
