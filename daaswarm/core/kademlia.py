"""The swarm's phone book: who is near a key, and which peers published under it. Sans-IO Kademlia.

The shell (``net/``) feeds events and carries out effects: it answers with :class:`Reply`, sends each
:class:`SendRequest` over an authenticated connection to exactly that peer, enforces ``deadline_s``, and reports
:class:`ReplyReceived` or :class:`RequestFailed` once per ``rpc_id``, and before that :class:`RequestLate` if it took
longer than ``late_s``. It calls :meth:`Kademlia.tick` every :data:`TICK_S`. Contacts named by others are hearsay: they
enter the routing table only after answering us.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec
from nacl.signing import SigningKey

from daaswarm.core.kademlia_events import (
    LATE_S,
    Effect,
    Event,
    LookupDone,
    Misbehaved,
    RecordsFound,
    Reply,
    RequestFailed,
    RequestLate,
    RequestReceived,
    SendRequest,
)
from daaswarm.core.lookup import ALPHA, PATHS, Lookup, Want
from daaswarm.core.notary import KeyNotary, Notary
from daaswarm.core.places import get_places, get_replicas
from daaswarm.core.publishing import Batch, Parts, Publisher, Round, batch_for
from daaswarm.core.record_store import RecordStore
from daaswarm.core.replication import KEYS, REPLICATE_S, get_replicas_due
from daaswarm.core.rng import Rng
from daaswarm.core.routing_table import NEVER, K, RoutingTable, get_node_id
from daaswarm.core.signing import get_public_key
from daaswarm.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from daaswarm.limits import RECORDS_PER_KEY
from daaswarm.messages import Contact, Failure, FindNode, FindValue, Found, Pointer, Store, Stored
from daaswarm.types import PeerId

TICK_S = 10.0  # how often the shell calls tick
REFRESH_S = 60 * 60.0  # a bucket without a lookup for this long is looked up; the paper's value
REFRESH_GAP_S = 20.0  # between two walks over the buckets for those
PROBE_S = 10 * 60.0  # a contact silent for this long is asked whether it is there
PROBE_FAILING_S = 5.0  # the second chance of one that just failed
PROBE_GAP_S = 30.0  # between two walks over the table for those that were silent, ...
PROBES = 16  # ... of whom so many are asked at once: enough for a full table
SHUN_S = 60.0  # a peer that failed is not asked again on others' word for this long
SHUNNED = 4_096  # peers remembered as failed
SEED_S = 15.0  # between attempts to join while the table is empty
RESEED_S = 2 * 60.0  # between calls to seeds that left the table: a restarted seed must not found a second swarm
SWEEP_S = 60.0  # between walks over all stored records
LOOKUPS = 1_024  # running at once in one node
EXPORT_S = 5 * 60.0  # between two looks at which contacts to come back by
MET = 64  # of the peers that nobody named, through which a node comes back
EXPORTED = 64  # contacts by which a node comes back; enough to find the swarm again without the bootstrap peer


class _Rpc(msgspec.Struct, frozen=True):
    """A lookup's request has ``lookup`` and ``path``; a Store that must be counted ``parts``; any other neither."""

    contact: Contact
    message: FindNode | FindValue | Store
    lookup: str | None = None
    path: int = 0
    parts: Parts = ()


class _Place(msgspec.Struct, frozen=True):
    """What an internal lookup is for: place number ``place`` of a key to publish. ``is_alone``: the others are not
    looked up, since the swarm seemed small."""

    round: Round
    key: bytes
    place: int
    is_alone: bool


class Kademlia:
    """One node's part in the DHT.

    Args:
        key: signs the pointers that this node publishes; its PeerId is this node's.
        contact: where others reach this node; ``None`` if nobody can (it then publishes nothing).
        rng: spreads refreshes over the key space and republishing over time, and makes lookups unpredictable.
        limit_subnets: see :class:`RoutingTable`.
        notary: signs and checks in place of ``key``, for a simulation.
    """

    def __init__(
        self,
        key: SigningKey,
        swarm: bytes,
        contact: Contact | None,
        rng: Rng,
        *,
        k: int = K,
        limit_subnets: bool = True,
        notary: Notary | None = None,
    ) -> None:
        self._notary = notary or KeyNotary(key, swarm)
        self.peer_id = self._notary.peer_id
        self.table = RoutingTable(self.peer_id, k, limit_subnets=limit_subnets)
        self.store = RecordStore(swarm, open_pointer=self._notary.open_pointer)
        self._rng, self._k = rng, k
        self.publisher = Publisher(self._notary, self.store, rng)
        self.contact: Contact | None = None
        self.set_contact(contact)
        self._seeds: list[Contact] = []
        self._met: deque[Contact] = deque(maxlen=MET)
        self._remembered: list[Contact] = []  # contacts of better times, the latest first
        self._seeded_at = self._swept_at = self._probe_at = self._refreshed_at = self._exported_at = NEVER
        self._replicated_at: float | None = None
        self._replicated_to = 0  # how many keys the walk for newcomers has passed
        self._lookups: dict[str, Lookup] = {}
        self._rpcs: dict[int, _Rpc] = {}
        self._places: dict[str, _Place] = {}  # by lookup id
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
        """Looks this node up through the seeds, these and earlier ones, which introduces it to its neighbours. They are
        asked again while the table is empty; one that answers is enough.
        """
        known = {seed.peer_id for seed in self._seeds}
        self._seeds += [seed for seed in seeds if seed.peer_id not in known]
        self._seeded_at = now
        extra = self._get_doors() if len(self.table) else [*self._get_doors(), *self._remembered]
        return self._start(self._make_id("join"), get_node_id(self.peer_id), "nodes", now, extra)

    def meet(self, contact: Contact, now: float) -> list[Effect]:
        """Joins through a peer that nobody named, one of the local network; the latest :data:`MET` of these count."""
        if all(known.peer_id != contact.peer_id for known in self._get_doors()):
            self._met.append(contact)
        return self.join(now)

    def _get_doors(self) -> list[Contact]:
        return [*self._seeds, *self._met]

    def export_contacts(self) -> list[Contact]:
        """At most :data:`EXPORTED` contacts through which :meth:`restore` finds the swarm again after a restart; those
        known last if none is left."""
        return self.table.export(EXPORTED) or list(self._remembered)

    def restore(self, contacts: Iterable[Contact], now: float) -> list[Effect]:
        """Joins through contacts of an earlier run. Unlike seeds, the dead among them are soon forgotten."""
        self._remembered = list(contacts)[:EXPORTED]
        return self.join(now)

    def start_lookup(self, lookup_id: str, target: bytes, now: float, want: Want = "nodes") -> list[Effect]:
        """Ends in one :class:`LookupDone` with this ``lookup_id``, at once if nobody is known.

        Raises:
            LocalProtocolError: ``lookup_id`` is running, ``target`` isn't 32 bytes, or too many lookups run.
        """
        return self._start(lookup_id, target, want, now, ())

    def publish(self, key: bytes, now: float) -> list[Effect]:
        """Points ``key`` at this node, now and again about every :data:`REPUBLISH_S`, until :meth:`unpublish`. Each
        time ends in a :class:`PublishDone`, unless another publishing or withdrawing overtook it.

        Raises:
            LocalProtocolError: this node has no address that others could be pointed at.
        """
        return self.publish_all([key], now)

    def publish_all(self, keys: Iterable[bytes], now: float) -> list[Effect]:
        """:meth:`publish` for many keys: what goes to the same peer travels together.

        Raises:
            LocalProtocolError: this node has no address that others could be pointed at.
        """
        if self.contact is None:
            raise LocalProtocolError("a node without an address can't publish")
        fresh = self.publisher.renew(keys, self.contact.addrs, now)
        # In a small swarm every peer is near the key, and its other places are with the same peers.
        places = PATHS if len(self.table) >= self._k else 1
        wanted = [(key, place) for key in fresh.keepers for place in range(places)]
        return self._seek(fresh, wanted, now, is_alone=places < PATHS)

    def unpublish(self, key: bytes, now: float) -> list[Effect]:
        """Points ``key`` at this node no more: whoever keeps the pointer is given a newer one, without addresses."""
        return [self._send_batch(batch) for batch in self.publisher.withdraw(key, now)]

    def tick(self, now: float) -> list[Effect]:
        """What is due by now: joining, republishing, refreshing buckets, probing silent contacts, telling newcomers,
        dropping records."""
        effects: list[Effect] = []
        is_known = len(self.table) > 0
        if len(self._lookups) < LOOKUPS // 2:  # maintenance leaves room for what the node itself wants
            if not is_known and now - self._seeded_at >= SEED_S and (self._seeds or self._met or self._remembered):
                effects += self.join(now)
            if self.publisher.publications and self.contact is not None:
                room = max((LOOKUPS // 2 - len(self._lookups)) // PATHS, 1)
                if due := self.publisher.get_due(now, room):
                    batches, due = self.publisher.renew_kept(due, self.contact.addrs, now, self._k)
                    effects += [self._send_batch(batch) for batch in batches]
                    effects += self.publish_all(due, now) if due else []
            if is_known and now - self._refreshed_at >= REFRESH_GAP_S:
                self._refreshed_at = now
                for target in self.table.get_stale_targets(now - REFRESH_S, ALPHA, self._rng):
                    effects += self._start(self._make_id("refresh"), target, "nodes", now, ())
        effects += self._probe(now)
        if now - self._swept_at >= SWEEP_S:
            self._swept_at = now
            self.store.tick(now)
        if now - self._exported_at >= EXPORT_S:
            self._exported_at = now
            recent = self.table.export(EXPORTED)
            if len(recent) < EXPORTED:
                known = {contact.peer_id for contact in recent}
                recent += [contact for contact in self._remembered if contact.peer_id not in known]
            self._remembered = recent[:EXPORTED]
        if self._replicated_at is None or now - self._replicated_at >= REPLICATE_S:
            effects += self._replicate(now)
        return effects

    def shift(self, by_s: float) -> None:
        """The clock was set by ``by_s``: what happened ``n`` seconds ago still did. Records keep the times their
        publishers gave them."""
        self.table.shift(by_s)
        self.publisher.shift(by_s)
        self._seeded_at += by_s
        self._swept_at += by_s
        self._probe_at += by_s
        self._refreshed_at += by_s
        self._exported_at += by_s
        if self._replicated_at is not None:
            self._replicated_at += by_s
        self._shunned = {peer: until + by_s for peer, until in self._shunned.items()}

    # -- what the network says ----------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Effect]:
        """One event in, effects out. Late or unknown ``rpc_id``s are nobody's fault and change nothing."""
        if isinstance(event, RequestReceived):
            return self._on_request(event, now)
        if isinstance(event, RequestLate):
            return self._on_late(event.rpc_id, now)
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
        self.publisher.validate()
        assert len(self._lookups) <= LOOKUPS and len(self._shunned) <= SHUNNED
        assert len(self._remembered) <= EXPORTED
        for rpc in self._rpcs.values():
            assert rpc.lookup is None or not rpc.parts
        running = {rpc.lookup for rpc in self._rpcs.values() if rpc.lookup is not None}
        assert self._lookups.keys() <= running, "a lookup waits for nothing"
        assert self._places.keys() <= self._lookups.keys()
        for running_round in self.publisher.busy.values():
            assert running_round.lookups == sum(p.round is running_round for p in self._places.values())

    def _on_request(self, event: RequestReceived, now: float) -> list[Effect]:
        message, contact = event.message, event.contact
        if contact is not None:
            if contact.peer_id != event.peer:
                return [Misbehaved(peer=event.peer, reason=f"gave the contact of {contact.peer_id} as its own")]
            if contact.addrs:
                self._note_alive(contact, now)
        reply: Found | Stored
        if isinstance(message, FindNode):
            wanted = min(message.wanted, self._k)
            reply = Found(contacts=self.table.closest(message.target, wanted, event.peer) if wanted else [])
        elif isinstance(message, FindValue):
            records = [signed for _, signed in self.store.get(message.key, now)]
            near = message.key if message.place is None else message.place
            reply = Found(contacts=self.table.closest(near, self._k, event.peer), records=records)
        else:
            reply = self._store(message, event.peer, now)
        return [Reply(request_id=event.request_id, message=reply)]

    def _on_late(self, rpc_id: int, now: float) -> list[Effect]:
        rpc = self._rpcs.get(rpc_id)
        lookup = self._lookups.get(rpc.lookup) if rpc is not None and rpc.lookup is not None else None
        if rpc is None or rpc.lookup is None or lookup is None:
            return []
        lookup.note_late(rpc.path, PeerId(rpc.contact.peer_id))
        return self._advance(rpc.lookup, now)

    def _on_reply(self, rpc: _Rpc, message: Found | Stored | Failure, now: float) -> list[Effect]:
        peer = PeerId(rpc.contact.peer_id)
        if isinstance(rpc.message, Store):
            if isinstance(message, Found):
                return [Misbehaved(peer=peer, reason="answered Store with Found"), *self._on_failure(rpc, now)]
            self._note_alive(rpc.contact, now)
            if isinstance(message, Stored):
                return [*self.publisher.note_stored(rpc.parts, message.refused)]
            return [*self.publisher.note_stored(rpc.parts, None)]  # busy, but there
        if isinstance(message, Stored):
            return [Misbehaved(peer=peer, reason="answered a lookup with Stored"), *self._on_failure(rpc, now)]
        lookup = self._lookups.get(rpc.lookup) if rpc.lookup is not None else None
        if lookup is None or rpc.lookup is None:
            self._note_alive(rpc.contact, now)
            return []
        if isinstance(message, Failure):
            self._note_alive(rpc.contact, now)
            lookup.note_failed(rpc.path, peer)  # busy, but there
            return self._advance(rpc.lookup, now)
        news, reason = self._take_found(lookup, rpc, message, now)
        effects = _tell(rpc.lookup, news)
        if reason:
            return [*effects, Misbehaved(peer=peer, reason=reason), *self._on_failure(rpc, now)]
        self._note_alive(rpc.contact, now)
        lookup.note_answered(rpc.path, peer, len(message.records), is_news=bool(news))
        return effects + self._advance(rpc.lookup, now)

    def _on_failure(self, rpc: _Rpc, now: float) -> list[Effect]:
        peer = PeerId(rpc.contact.peer_id)
        self.table.note_failed(peer, now)
        self._probe_at = min(self._probe_at, now + PROBE_FAILING_S)
        self._shunned.pop(peer, None)
        self._shunned[peer] = now + SHUN_S
        if len(self._shunned) > SHUNNED:
            del self._shunned[next(iter(self._shunned))]
        if rpc.parts:
            return [*self.publisher.note_stored(rpc.parts, None)]
        lookup = self._lookups.get(rpc.lookup) if rpc.lookup is not None else None
        if lookup is None or rpc.lookup is None:
            return []
        lookup.note_failed(rpc.path, peer)
        return self._advance(rpc.lookup, now)

    def _take_found(self, lookup: Lookup, rpc: _Rpc, message: Found, now: float) -> tuple[list[Pointer], str]:
        """Feeds an answer to its lookup. Returns the records that are new, and what is wrong with it; nothing after
        that point is believed."""
        news: list[Pointer] = []
        if len(message.contacts) > max(self._k, K) or len(message.records) > RECORDS_PER_KEY:
            return news, f"answered with {len(message.contacts)} contacts and {len(message.records)} records"
        for signed in message.records if lookup.want == "records" else ():
            try:
                pointer = self._notary.open_pointer(signed, now)
            except RemoteProtocolError as error:
                if error.reject:
                    return news, error.message
                continue
            if pointer.key != lookup.target:
                return news, "answered with a record of another key"
            if lookup.add_record(pointer, signed):
                news.append(pointer)
        peers = [contact.peer_id for contact in message.contacts]
        try:
            deque(map(get_public_key, peers), maxlen=0)
        except ConfigError as error:
            return news, error.message
        contacts, shunned = message.contacts, self._shunned
        if shunned and not shunned.keys().isdisjoint(peers):
            contacts = [contact for contact in contacts if shunned.get(PeerId(contact.peer_id), NEVER) <= now]
        lookup.add(rpc.path, PeerId(rpc.contact.peer_id), contacts)
        return news, ""

    # -- parts --------------------------------------------------------------------------------------------------

    def _start(self, lookup_id: str, target: bytes, want: Want, now: float, extra: Iterable[Contact]) -> list[Effect]:
        if lookup_id in self._lookups or len(target) != 32:
            raise LocalProtocolError(f"lookup {lookup_id!r} is running already, or its target isn't 32 bytes")
        if len(self._lookups) >= LOOKUPS:
            raise LocalProtocolError(f"{LOOKUPS} lookups are running")
        lookup = self._lookups[lookup_id] = Lookup(target, want, self.peer_id, self._k, self._rng)
        near = self.table.closest(target, self._k)
        if not near:
            extra = [*extra, *self._get_doors(), *self._remembered]
        lookup.start(near if want == "nodes" else ())
        lookup.start(extra)
        own: list[Pointer] = []
        if want == "records":
            for pointer, signed in self.store.get(target, now):
                lookup.add_record(pointer, signed)
                own.append(pointer)
            for path, place in enumerate(get_places(target)):
                lookup.start(self.table.closest(place, get_replicas(self._k, path)), path)
        self.table.note_refreshed(target, now)
        return _tell(lookup_id, own) + self._advance(lookup_id, now)

    def _advance(self, lookup_id: str, now: float) -> list[Effect]:
        lookup = self._lookups[lookup_id]
        taken = lookup.take_next()
        if taken or not lookup.is_done():
            return [
                self._send(contact, lookup.paths[path].message, lookup=lookup_id, path=path) for path, contact in taken
            ]
        del self._lookups[lookup_id]
        if lookup_id in self._places:
            return self._end_place(lookup_id, lookup, now)
        if lookup_id.startswith(_INTERNAL):
            return []
        live = [(pointer, signed) for pointer, signed in lookup.records.values() if pointer.expires_at > now]
        done = LookupDone(
            lookup_id=lookup_id,
            contacts=lookup.get_closest(self._k),
            records=[pointer for pointer, _ in live if pointer.addrs],  # one without: its publisher left the key
            hops=lookup.hops,
            requests=lookup.get_requests(),
        )
        # Whoever should have known learns it; a record lives no longer there than anywhere, its publisher said when.
        lacking = lookup.get_lacking(min(len(live), RECORDS_PER_KEY)) if live else []
        records = [signed for _, signed in live]
        return [done, *(self._send_batch(batch) for c in lacking for batch in batch_for(c, records))]

    def _send(
        self,
        contact: Contact,
        message: FindNode | FindValue | Store,
        *,
        lookup: str | None = None,
        path: int = 0,
        parts: Parts = (),
    ) -> SendRequest:
        self._next_rpc += 1
        self._rpcs[self._next_rpc] = _Rpc(contact, message, lookup, path, parts)
        late_s = LATE_S if lookup is not None else None
        return SendRequest(rpc_id=self._next_rpc, contact=contact, message=message, late_s=late_s)

    def _send_batch(self, batch: Batch) -> SendRequest:
        return self._send(batch.contact, Store(records=batch.records), parts=batch.parts)

    def _seek(self, seeking: Round, places: list[tuple[bytes, int]], now: float, *, is_alone: bool) -> list[Effect]:
        """Looks up who is near these places of a round's keys; those that there is no room for count as looked up."""
        seeking.lookups += len(places)
        effects: list[Effect] = []
        for key, place in places:
            lookup_id = self._make_id("publish")
            self._places[lookup_id] = _Place(seeking, key, place, is_alone)
            try:
                effects += self._start(lookup_id, get_places(key)[place], "nodes", now, ())
            except LocalProtocolError:
                effects += self._end_place(lookup_id, None, now)
        return effects

    def _end_place(self, lookup_id: str, lookup: Lookup | None, now: float) -> list[Effect]:
        ended = self._places.pop(lookup_id)
        found = lookup.get_closest(get_replicas(self._k, ended.place)) if lookup is not None else []
        keepers = ended.round.keepers[ended.key]
        keepers.update((contact.peer_id, contact) for contact in found)
        ended.round.lookups -= 1
        effects: list[Effect] = []
        if ended.is_alone and len(found) >= self._k:  # the swarm is larger than our table was
            effects += self._seek(ended.round, [(ended.key, place) for place in range(1, PATHS)], now, is_alone=False)
        elif not ended.round.lookups:
            batches, done = self.publisher.end_round(ended.round)
            effects += [*done, *(self._send_batch(batch) for batch in batches)]
        return effects

    def _store(self, message: Store, giver: PeerId, now: float) -> Stored:
        refused: dict[int, str] = {}
        for i, signed in enumerate(message.records[:RECORDS_PER_KEY]):
            try:
                self.store.put(signed, now, giver)
            except RemoteProtocolError as error:
                refused[i] = error.message[:64]
        return Stored(refused=refused)

    def _probe(self, now: float) -> list[Effect]:
        """Asks contacts that failed once or were silent for long, and seeds that left, whether they are there."""
        is_reseeding = now - self._seeded_at >= RESEED_S
        if now < self._probe_at and not is_reseeding:
            return []
        asked = {rpc.contact.peer_id for rpc in self._rpcs.values()} | {self.peer_id}
        due: list[Contact] = []
        silent, again_at = self.table.get_due(now, PROBE_S, PROBE_FAILING_S)
        self._probe_at = again_at if self.table.is_failing else max(again_at, now + PROBE_GAP_S)
        for entry in silent:
            if len(due) < PROBES and entry.contact.peer_id not in asked:
                due.append(entry.contact)
        if is_reseeding:
            self._seeded_at = now
            due += [s for s in self._get_doors() if s.peer_id not in asked and PeerId(s.peer_id) not in self.table]
        return [self._send(contact, FindNode(target=get_node_id(self.peer_id), wanted=0)) for contact in due]

    def _replicate(self, now: float) -> list[Effect]:
        """Records for peers that came near to them since the last time."""
        before, self._replicated_at = self._replicated_at, now
        keys = self.store.get_keys()
        if before is None or not keys:
            return []
        if self._replicated_to >= len(keys):
            self._replicated_to = 0
        some = keys[self._replicated_to : self._replicated_to + KEYS]
        self._replicated_to += len(some)
        return [self._send_batch(batch) for batch in get_replicas_due(self.table, self.store, some, before, now)]

    def _note_alive(self, contact: Contact, now: float) -> None:
        if self._shunned:
            self._shunned.pop(PeerId(contact.peer_id), None)
        self.table.note_seen(contact, now)

    def _make_id(self, purpose: str) -> str:
        self._next_internal += 1
        return f"{_INTERNAL}{purpose}-{self._next_internal}"


def _tell(lookup_id: str, news: list[Pointer]) -> list[Effect]:
    records = [pointer for pointer in news if pointer.addrs]  # one without: its publisher left the key
    return [RecordsFound(lookup_id=lookup_id, records=records)] if records else []


_INTERNAL = "kademlia/"  # lookup ids of our own begin with this
