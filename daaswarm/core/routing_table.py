"""Whom this node knows: k-buckets by common prefix with its own id, each with a replacement cache.

Maymounkov and Mazieres, "Kademlia" (2002), sections 2.2-2.4. Bucket ``i`` holds ids that share exactly ``i`` leading
bits with ours, the last one all that share at least as many; only the last is ever split. Ids are SHA-256 of PeerIds,
which are public keys proven on connecting: nobody is where it wants to be without making keys until one fits, and
few contacts of one network are taken (:mod:`daaswarm.core.subnets`).
"""

from __future__ import annotations

import hashlib

from daaswarm.core.memo import memo
from daaswarm.core.rng import Rng
from daaswarm.core.subnets import get_subnets
from daaswarm.messages import Contact
from daaswarm.types import PeerId

K = 20  # contacts in a bucket and replicas of a record; the paper's value
SPARES = 10  # in a bucket's replacement cache: half a bucket dies together rarely, and each costs memory
ID_BITS = 256
MAX_FAILURES = 2  # in a row; one lost packet must not cost a contact, a dead one must not linger
PER_SUBNET_BUCKET = 2  # contacts of one network in a bucket, spares included; geth's value
PER_SUBNET = 10  # and in the whole table; geth's value
NEVER = float("-inf")


@memo(32_768)  # a simulation has ten thousand peers and those that left
def get_node_id(peer_id: str) -> bytes:
    """A peer's 32 byte place in the key space: SHA-256 of its PeerId's text."""
    return hashlib.sha256(peer_id.encode()).digest()


@memo(32_768)
def get_node_number(peer_id: str) -> int:
    """:func:`get_node_id` as the number that distances are computed with."""
    return int.from_bytes(get_node_id(peer_id), "big")


def compute_distance(a: bytes, b: bytes) -> int:
    """XOR metric of two 32 byte ids."""
    return int.from_bytes(a, "big") ^ int.from_bytes(b, "big")


class Entry:
    """One contact with what is known of its health. ``since`` is when it was first seen."""

    __slots__ = ("contact", "failed_at", "failures", "seen_at", "since")

    def __init__(self, contact: Contact, seen_at: float) -> None:
        self.contact = contact
        self.since = seen_at
        self.seen_at = seen_at
        self.failures = 0
        self.failed_at = NEVER


class _Bucket:
    """By node number. ``spares`` are ordered by when they were last seen, oldest first. No entry has to be asked
    whether it is there before ``due_at``."""

    __slots__ = ("due_at", "entries", "refreshed_at", "spares")

    def __init__(self, refreshed_at: float = NEVER) -> None:
        self.entries: dict[int, Entry] = {}
        self.spares: dict[int, Entry] | None = None  # most buckets near to us never have any
        self.refreshed_at = refreshed_at
        self.due_at = NEVER


class RoutingTable:
    """Contacts by distance from ``own``. Never holds ``own`` itself.

    Args:
        limit_subnets: False where every peer is trusted, as in a swarm with a key, and may sit in one public network.
    """

    __slots__ = ("_buckets", "_failing", "_limit_subnets", "_number", "_subnets", "k", "own")

    def __init__(self, own: PeerId, k: int = K, *, limit_subnets: bool = True) -> None:
        self.own = own
        self.k = k
        self._number = get_node_number(own)
        self._limit_subnets = limit_subnets
        self._subnets: dict[str, int] = {}  # entries and spares of each network
        self._failing: set[int] = set()  # node numbers of entries whose last call failed
        self._buckets = [_Bucket()]

    def __len__(self) -> int:
        return sum(len(bucket.entries) for bucket in self._buckets)

    def __contains__(self, peer: PeerId) -> bool:
        number = get_node_number(peer)
        return number in self._get_bucket(number).entries

    @property
    def is_failing(self) -> bool:
        """Whether the last call of some contact failed."""
        return bool(self._failing)

    def note_seen(self, contact: Contact, now: float) -> bool:
        """``contact`` proved to be alive: it called us or answered. True when it is (now) in the table."""
        number = get_node_number(contact.peer_id)
        bucket = self._get_bucket(number)
        entry = bucket.entries.get(number)
        if entry is not None:
            entry.seen_at = now
            if entry.failures:
                entry.failures = 0
                self._failing.discard(number)
            if entry.contact is not contact and entry.contact.addrs != contact.addrs:
                return self._move(bucket, number, entry, contact)
            return True
        return number != self._number and self._add(number, contact, now)

    def note_failed(self, peer: PeerId, now: float) -> None:
        """``peer`` didn't answer. The second time in a row it goes, the first time if a spare can take its place; the
        freshest spare does."""
        number = get_node_number(peer)
        bucket = self._get_bucket(number)
        if bucket.spares is not None and (spare := bucket.spares.pop(number, None)) is not None:
            self._count(spare.contact, -1)
        entry = bucket.entries.get(number)
        if entry is None:
            return
        entry.failures += 1
        entry.failed_at = now
        if entry.failures < MAX_FAILURES and not bucket.spares:
            self._failing.add(number)
            bucket.due_at = NEVER
            return
        del bucket.entries[number]
        self._failing.discard(number)
        self._count(entry.contact, -1)
        self._fill(bucket)

    def closest(self, target: bytes, n: int, without: str = "") -> list[Contact]:
        """At most ``n`` contacts nearest to ``target``, nearest first, without those whose last call failed and
        without the peer ``without``."""
        goal = int.from_bytes(target, "big")
        away = goal ^ self._number
        buckets = self._buckets
        last = len(buckets) - 1
        bits = away >> (ID_BITS - last)  # bit i, from the left, is 1 where bucket i is nearer than all after it
        passed = self._failing | {get_node_number(without)} if without else self._failing
        found: dict[int, dict[int, Entry]] = {}
        for i in range(last):
            if bits >> (last - 1 - i) & 1:
                _collect(found, buckets[i], goal, passed)
                if len(found) >= n:
                    break
        else:
            _collect(found, buckets[last], goal, passed)
            for i in range(last - 1, -1, -1):
                if len(found) >= n:
                    break
                if not bits >> (last - 1 - i) & 1:
                    _collect(found, buckets[i], goal, passed)
        return [found[distance][distance ^ goal].contact for distance in sorted(found)[:n]]

    def get_entries(self) -> list[Entry]:
        """All contacts in the table, failing ones included, spares not."""
        return [entry for bucket in self._buckets for entry in bucket.entries.values()]

    def get_due(self, now: float, silent_s: float, failing_s: float) -> tuple[list[Entry], float]:
        """The contacts to ask whether they are there: not seen for ``silent_s``, or ``failing_s`` after they failed.
        And when to look again."""
        due: list[Entry] = []
        again_at = float("inf")
        for bucket in self._buckets:
            if bucket.due_at <= now:
                first = float("inf")
                for entry in bucket.entries.values():
                    at = entry.failed_at + failing_s if entry.failures else entry.seen_at + silent_s
                    if at <= now:
                        due.append(entry)
                    if at < first:
                        first = at
                bucket.due_at = first
            again_at = min(again_at, bucket.due_at)
        return due, again_at

    def export(self, limit: int) -> list[Contact]:
        """At most ``limit`` healthy contacts to come back through: of all distances, long-lived ones first."""
        columns = [
            sorted((e for e in bucket.entries.values() if not e.failures), key=lambda e: e.since)
            for bucket in self._buckets
        ]
        rows = max((len(column) for column in columns), default=0)
        return [column[row].contact for row in range(rows) for column in columns if row < len(column)][:limit]

    def note_refreshed(self, target: bytes, now: float) -> None:
        """A lookup of ``target`` freshened the bucket it falls into."""
        self._get_bucket(int.from_bytes(target, "big")).refreshed_at = now

    def get_stale_targets(self, before: float, limit: int, rng: Rng) -> list[bytes]:
        """A random id in each of at most ``limit`` buckets in which nothing was looked up since ``before``. A full one
        needs no lookup: its contacts are asked whether they live, and whoever calls us waits among its spares."""
        k = self.k
        stale = [i for i, b in enumerate(self._buckets) if b.refreshed_at < before and len(b.entries) < k]
        return [self._get_random_id(i, rng) for i in stale[:limit]]

    def shift(self, by_s: float) -> None:
        """The clock was set by ``by_s``; every time noted so far moves with it."""
        for bucket in self._buckets:
            bucket.refreshed_at += by_s
            bucket.due_at = NEVER
            for entry in (*bucket.entries.values(), *(bucket.spares or {}).values()):
                entry.since += by_s
                entry.seen_at += by_s
                entry.failed_at += by_s

    def validate(self) -> None:
        """Asserts the invariants."""
        assert 1 <= len(self._buckets) <= ID_BITS
        subnets: dict[str, int] = {}
        for i, bucket in enumerate(self._buckets):
            spares = bucket.spares or {}
            assert len(bucket.entries) <= self.k and len(spares) <= SPARES
            assert not bucket.entries.keys() & spares.keys()
            if spares:
                assert len(bucket.entries) == self.k, "a spare waits while there is room"
            inside: dict[str, int] = {}
            for number, entry in (*bucket.entries.items(), *spares.items()):
                assert number == get_node_number(entry.contact.peer_id) != self._number
                assert self._get_index(number) == i
                assert 0 <= entry.failures < MAX_FAILURES
                for subnet in get_subnets(entry.contact.addrs) if self._limit_subnets else ():
                    inside[subnet] = inside.get(subnet, 0) + 1
                    subnets[subnet] = subnets.get(subnet, 0) + 1
            assert max(inside.values(), default=0) <= PER_SUBNET_BUCKET
        assert self._failing == {get_node_number(e.contact.peer_id) for e in self.get_entries() if e.failures}
        assert subnets == self._subnets and max(subnets.values(), default=0) <= PER_SUBNET

    # -- parts --------------------------------------------------------------------------------------------------

    def _add(self, number: int, contact: Contact, now: float) -> bool:
        """A contact that isn't in the table goes in, becomes a spare, or is turned away."""
        bucket = self._get_bucket(number)
        entry: Entry | None = None
        if bucket.spares is not None and (entry := bucket.spares.pop(number, None)) is not None:
            self._count(entry.contact, -1)
            entry.contact, entry.seen_at = contact, now
        while True:
            if not self._fits(bucket, contact):
                return False
            if len(bucket.entries) < self.k:
                bucket.entries[number] = entry or Entry(contact, now)
                bucket.due_at = NEVER
                self._count(contact, 1)
                return True
            if bucket is not self._buckets[-1] or len(self._buckets) == ID_BITS:
                break
            self._split()
            bucket = self._get_bucket(number)
        self._count(contact, 1)
        # Full: long-lived contacts are likelier to stay (paper, 2.2), so the newcomer waits, unless one is failing.
        for old, known in bucket.entries.items() if self._failing else ():
            if known.failures:
                del bucket.entries[old]
                self._failing.discard(old)
                self._count(known.contact, -1)
                bucket.entries[number] = entry or Entry(contact, now)
                bucket.due_at = NEVER
                return True
        if bucket.spares is None:
            bucket.spares = {}
        elif len(bucket.spares) >= SPARES:
            self._count(bucket.spares.pop(next(iter(bucket.spares))).contact, -1)
        bucket.spares[number] = entry or Entry(contact, now)
        return False

    def _move(self, bucket: _Bucket, number: int, entry: Entry, contact: Contact) -> bool:
        """A contact has other addresses now; it stays if their networks have room."""
        del bucket.entries[number]
        self._count(entry.contact, -1)
        self._failing.discard(number)
        if not self._fits(bucket, contact):
            self._fill(bucket)
            return False
        entry.contact = contact
        bucket.entries[number] = entry
        self._count(contact, 1)
        return True

    def _fill(self, bucket: _Bucket) -> None:
        """The freshest spare takes the place that became free; it is counted already."""
        if bucket.spares:
            number, entry = bucket.spares.popitem()
            bucket.entries[number] = entry
            bucket.due_at = NEVER

    def _fits(self, bucket: _Bucket, contact: Contact) -> bool:
        if not self._limit_subnets or not (subnets := get_subnets(contact.addrs)):
            return True
        known = [*bucket.entries.values(), *(bucket.spares or {}).values()]
        inside = [subnet for entry in known for subnet in get_subnets(entry.contact.addrs)]
        return all(
            self._subnets.get(subnet, 0) < PER_SUBNET and inside.count(subnet) < PER_SUBNET_BUCKET for subnet in subnets
        )

    def _count(self, contact: Contact, by: int) -> None:
        for subnet in get_subnets(contact.addrs) if self._limit_subnets else ():
            count = self._subnets.get(subnet, 0) + by
            if count:
                self._subnets[subnet] = count
            else:
                del self._subnets[subnet]

    def _get_index(self, number: int) -> int:
        return min(ID_BITS - (self._number ^ number).bit_length(), len(self._buckets) - 1)

    def _get_bucket(self, number: int) -> _Bucket:
        buckets = self._buckets
        index = ID_BITS - (self._number ^ number).bit_length()
        return buckets[index] if index < len(buckets) else buckets[-1]

    def _split(self) -> None:
        """Moves what is nearer than the last bucket's own prefix into a new last bucket (which never has spares)."""
        old = self._buckets[-1]
        self._buckets.append(_Bucket(old.refreshed_at))
        old.refreshed_at = NEVER  # the lookups so far were near to us: the far half is due
        entries, old.entries = old.entries, {}
        for number, entry in entries.items():
            self._get_bucket(number).entries[number] = entry

    def _get_random_id(self, index: int, rng: Rng) -> bytes:
        """An id that falls into bucket ``index``: shares that many bits with ours; differs in the next unless last."""
        free = ID_BITS - index
        tail = rng.getrandbits(free)
        if index < len(self._buckets) - 1:
            tail |= 1 << (free - 1)
        return (self._number ^ tail).to_bytes(32, "big")


def _collect(found: dict[int, dict[int, Entry]], bucket: _Bucket, goal: int, passed: set[int]) -> None:
    """Adds by distance from ``goal`` where each entry is. The entries themselves aren't touched: in a simulation they
    lie scattered over gigabytes."""
    entries = bucket.entries
    found.update(dict.fromkeys([number ^ goal for number in entries if number not in passed], entries))
