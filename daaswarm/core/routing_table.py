"""Whom this node knows: k-buckets by common prefix with its own id, each with a replacement cache.

Maymounkov and Mazieres, "Kademlia" (2002), sections 2.2-2.4. Bucket ``i`` holds ids that share exactly ``i`` leading
bits with ours, the last one all that share at least as many; only the last is ever split.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
from collections.abc import Iterable

from daaswarm.core.rng import Rng
from daaswarm.messages import Contact
from daaswarm.types import PeerId

K = 20  # contacts in a bucket and replicas of a record; the paper's value
ID_BITS = 256
MAX_FAILURES = 2  # in a row; one lost packet must not cost a contact, a dead one must not linger
NEVER = float("-inf")


@functools.lru_cache(maxsize=16_384)
def get_node_id(peer_id: str) -> bytes:
    """A peer's 32 byte place in the key space: SHA-256 of its PeerId's text."""
    return hashlib.sha256(peer_id.encode()).digest()


def compute_distance(a: bytes, b: bytes) -> int:
    """XOR metric of two 32 byte ids."""
    return int.from_bytes(a, "big") ^ int.from_bytes(b, "big")


class Entry:
    """One contact with what is known of its health."""

    __slots__ = ("contact", "failed_at", "failures", "seen_at")

    def __init__(self, contact: Contact, seen_at: float) -> None:
        self.contact = contact
        self.seen_at = seen_at
        self.failures = 0
        self.failed_at = NEVER


class _Bucket:
    """``entries`` and ``spares`` are ordered by when they were last seen, oldest first."""

    __slots__ = ("entries", "refreshed_at", "spares")

    def __init__(self, refreshed_at: float = NEVER) -> None:
        self.entries: dict[PeerId, Entry] = {}
        self.spares: dict[PeerId, Entry] = {}
        self.refreshed_at = refreshed_at


class RoutingTable:
    """Contacts by distance from ``own``. Never holds ``own`` itself."""

    def __init__(self, own: PeerId, k: int = K) -> None:
        self.own = own
        self.k = k
        self._own_id = get_node_id(own)
        self._buckets = [_Bucket()]

    def __len__(self) -> int:
        return sum(len(bucket.entries) for bucket in self._buckets)

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._get_bucket(peer).entries

    def note_seen(self, contact: Contact, now: float) -> bool:
        """``contact`` proved to be alive: it called us or answered. True when it is (now) in the table."""
        peer = PeerId(contact.peer_id)
        if peer == self.own:
            return False
        while True:
            bucket = self._get_bucket(peer)
            known = bucket.entries.pop(peer, None)
            if known is not None or len(bucket.entries) < self.k:
                bucket.spares.pop(peer, None)
                bucket.entries[peer] = Entry(contact, now)
                return True
            if bucket is not self._buckets[-1] or len(self._buckets) == ID_BITS:
                break
            self._split()
        # Full: long-lived contacts are likelier to stay (paper, 2.2), so the newcomer waits, unless one is failing.
        for old, entry in bucket.entries.items():
            if entry.failures:
                del bucket.entries[old]
                bucket.entries[peer] = Entry(contact, now)
                return True
        bucket.spares.pop(peer, None)
        bucket.spares[peer] = Entry(contact, now)
        if len(bucket.spares) > self.k:
            del bucket.spares[next(iter(bucket.spares))]
        return False

    def note_failed(self, peer: PeerId, now: float) -> None:
        """``peer`` didn't answer. The second time in a row it goes, and the freshest spare takes its place."""
        bucket = self._get_bucket(peer)
        bucket.spares.pop(peer, None)
        entry = bucket.entries.get(peer)
        if entry is None:
            return
        entry.failures += 1
        entry.failed_at = now
        if entry.failures < MAX_FAILURES and not bucket.spares:
            return
        del bucket.entries[peer]
        if bucket.spares:
            spare, spare_entry = bucket.spares.popitem()
            bucket.entries[spare] = spare_entry

    def closest(self, target: bytes, n: int) -> list[Contact]:
        """At most ``n`` contacts nearest to ``target``, nearest first, without those whose last call failed."""
        entries = [e for e in self.get_entries() if not e.failures]
        nearest = heapq.nsmallest(n, entries, key=lambda e: compute_distance(get_node_id(e.contact.peer_id), target))
        return [e.contact for e in nearest]

    def get_entries(self) -> Iterable[Entry]:
        """All contacts in the table, failing ones included, spares not."""
        return [entry for bucket in self._buckets for entry in bucket.entries.values()]

    def note_refreshed(self, target: bytes, now: float) -> None:
        """A lookup of ``target`` freshened the bucket it falls into."""
        self._buckets[self._get_index(target)].refreshed_at = now

    def get_stale_targets(self, before: float, limit: int, rng: Rng) -> list[bytes]:
        """A random id in each of at most ``limit`` buckets in which nothing was looked up since ``before``."""
        stale = [i for i, bucket in enumerate(self._buckets) if bucket.refreshed_at < before]
        return [self._get_random_id(i, rng) for i in stale[:limit]]

    def shift(self, by_s: float) -> None:
        """The clock was set by ``by_s``; every time noted so far moves with it."""
        for bucket in self._buckets:
            bucket.refreshed_at += by_s
            for entry in (*bucket.entries.values(), *bucket.spares.values()):
                entry.seen_at += by_s
                entry.failed_at += by_s

    def validate(self) -> None:
        """Asserts the invariants."""
        assert 1 <= len(self._buckets) <= ID_BITS
        for i, bucket in enumerate(self._buckets):
            assert len(bucket.entries) <= self.k and len(bucket.spares) <= self.k
            assert not bucket.entries.keys() & bucket.spares.keys()
            if bucket.spares:
                assert len(bucket.entries) == self.k, "a spare waits while there is room"
            for peer, entry in (*bucket.entries.items(), *bucket.spares.items()):
                assert peer == entry.contact.peer_id != self.own
                assert self._get_index(get_node_id(peer)) == i
                assert 0 <= entry.failures < MAX_FAILURES

    def _get_index(self, node_id: bytes) -> int:
        prefix = ID_BITS - compute_distance(self._own_id, node_id).bit_length()
        return min(prefix, len(self._buckets) - 1)

    def _get_bucket(self, peer: PeerId) -> _Bucket:
        return self._buckets[self._get_index(get_node_id(peer))]

    def _split(self) -> None:
        """Moves what is nearer than the last bucket's own prefix into a new last bucket (which never has spares)."""
        old = self._buckets[-1]
        self._buckets.append(_Bucket(old.refreshed_at))
        old.refreshed_at = NEVER  # the lookups so far were near to us: the far half is due
        entries, old.entries = old.entries, {}
        for peer, entry in entries.items():
            self._get_bucket(peer).entries[peer] = entry

    def _get_random_id(self, index: int, rng: Rng) -> bytes:
        """An id that falls into bucket ``index``: shares that many bits with ours; differs in the next unless last."""
        free = ID_BITS - index
        tail = rng.getrandbits(free)
        if index < len(self._buckets) - 1:
            tail |= 1 << (free - 1)
        return (int.from_bytes(self._own_id, "big") ^ tail).to_bytes(32, "big")
