"""What this node publishes: its own pointers, when each is due again, who keeps it, and how storing it went."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from daaswarm.core.kademlia_events import PublishDone
from daaswarm.core.notary import Notary
from daaswarm.core.record_store import RecordStore
from daaswarm.core.rng import Rng
from daaswarm.core.signing import MAX_TTL_S
from daaswarm.errors import RemoteProtocolError
from daaswarm.messages import Contact, Pointer, Signed

REPUBLISH_S = MAX_TTL_S / 3  # two may be lost before a record dies
SPREAD = 0.1  # of that, by which one round may come earlier: nodes started together must not stay in step
KEPT_ROUNDS = 5  # republishings that go to who kept the record, before its places are looked up again
KEPT_SHARE = 2 / 3  # of those asked who took it; with fewer, the places are looked up
BATCH = 64  # records in one Store message
REASONS = 8  # different refusals told to the caller; what peers say is not counted on to be the same twice

Parts = tuple[tuple[bytes, int], ...]
"""Key and sequence number of each own record in a Store message, in its order."""


class Batch(NamedTuple):
    """One Store message: ``parts`` is empty if the records are others'."""

    contact: Contact
    records: list[Signed]
    parts: Parts


class Publication(msgspec.Struct):
    """``stores`` counts the records with this ``seq`` that are on their way and not yet answered for."""

    signed: Signed
    seq: int
    due_at: float
    stores: int = 0
    asked: int = 0
    stored: int = 0
    refused: dict[str, int] = {}  # how often for which reason
    keepers: list[Contact] = []  # who was asked to store it, this time or the time before
    rounds: int = 0  # since its places were looked up


class Round(msgspec.Struct):
    """Keys that are published together: when the last of its ``lookups`` has ended, what goes to one peer goes in few
    messages. ``keepers`` are by key, then by peer."""

    keepers: dict[bytes, dict[str, Contact]]
    lookups: int = 0


class Publisher:
    """Signs, counts and batches; the caller looks places up and sends."""

    def __init__(self, notary: Notary, store: RecordStore, rng: Rng) -> None:
        self.publications: dict[bytes, Publication] = {}
        self.busy: dict[bytes, Round] = {}  # keys whose places are being looked up
        self._peer = notary.peer_id
        self._notary, self._store, self._rng = notary, store, rng

    def renew(self, keys: Iterable[bytes], addrs: list[str], now: float) -> Round:
        """Signs anew. The round has the keys that are to be looked up, which are all that aren't already."""
        due_at = self._get_due_at(now)
        fresh = Round({})
        for key in keys:
            signed, seq = self._point(key, addrs, now)
            before = self.publications.get(key)
            self.publications[key] = Publication(signed, seq, due_at, keepers=before.keepers if before else [])
            if key not in self.busy:
                self.busy[key] = fresh
                fresh.keepers[key] = {}
        return fresh

    def renew_kept(
        self, keys: Iterable[bytes], addrs: list[str], now: float, least: int
    ) -> tuple[list[Batch], list[bytes]]:
        """Signs anew for those who keep the records, and names the keys whose places have to be looked up; those with
        fewer than ``least`` keepers are among them.

        Newcomers near a place are told by those who keep its records (:mod:`daaswarm.core.replication`), so lookups are
        needed only now and then, and when keepers are gone.
        """
        waiting: dict[str, tuple[Contact, list[bytes]]] = {}
        others: list[bytes] = []
        for key in keys:
            before = self.publications[key]
            kept = before.stored >= KEPT_SHARE * before.asked and len(before.keepers) >= least
            if not kept or before.rounds >= KEPT_ROUNDS or key in self.busy:
                others.append(key)
                continue
            signed, seq = self._point(key, addrs, now)
            count = len(before.keepers)
            self.publications[key] = Publication(
                signed,
                seq,
                self._get_due_at(now),
                stores=count,
                asked=count,
                keepers=before.keepers,
                rounds=before.rounds + 1,
            )
            for contact in before.keepers:
                waiting.setdefault(contact.peer_id, (contact, []))[1].append(key)
        return self._batch(waiting), others

    def withdraw(self, key: bytes, now: float) -> list[Batch]:
        """For whoever keeps the pointer, a newer one without addresses. It lives as long as the other would have, so
        that no replay revives it."""
        publication = self.publications.pop(key, None)
        if publication is None:
            return []
        signed, seq = self._point(key, [], now)
        return [Batch(contact, [signed], ((key, seq),)) for contact in publication.keepers]

    def get_due(self, now: float, limit: int) -> list[bytes]:
        """At most ``limit`` keys whose records should be published again by now."""
        return [key for key, publication in self.publications.items() if now >= publication.due_at][:limit]

    def end_round(self, ended: Round) -> tuple[list[Batch], list[PublishDone]]:
        """All places of a round were looked up: what to send, and the keys for which there is nobody."""
        done: list[PublishDone] = []
        waiting: dict[str, tuple[Contact, list[bytes]]] = {}
        for key, keepers in ended.keepers.items():
            del self.busy[key]
            publication = self.publications.get(key)
            if publication is None:
                continue  # withdrawn meanwhile
            publication.keepers = list(keepers.values())
            publication.stores = publication.asked = len(keepers)
            if not keepers:
                done.append(PublishDone(key=key, stored=0, asked=0))
            for peer, contact in keepers.items():
                waiting.setdefault(peer, (contact, []))[1].append(key)
        return self._batch(waiting), done

    def note_stored(self, parts: Parts, refused: dict[int, str] | None) -> list[PublishDone]:
        """A Store was answered, or (``None``) not. Returns the keys of which nothing is on its way any more."""
        done: list[PublishDone] = []
        for i, (key, seq) in enumerate(parts):
            publication = self.publications.get(key)
            if publication is None or publication.seq != seq:
                continue  # published anew meanwhile; that round reports
            publication.stores -= 1
            if refused is not None and i not in refused:
                publication.stored += 1
            elif refused is not None:
                reason = refused[i]
                if reason in publication.refused or len(publication.refused) < REASONS:
                    publication.refused[reason] = publication.refused.get(reason, 0) + 1
            if not publication.stores:
                p = publication
                done.append(PublishDone(key=key, stored=p.stored, asked=p.asked, refused=p.refused))
        return done

    def shift(self, by_s: float) -> None:
        """The clock was set by ``by_s``."""
        for publication in self.publications.values():
            publication.due_at += by_s

    def validate(self) -> None:
        """Asserts the invariants."""
        for key, running in self.busy.items():
            assert key in running.keepers and running.lookups > 0
        for publication in self.publications.values():
            assert 0 <= publication.stored + publication.stores <= publication.asked

    def _get_due_at(self, now: float) -> float:
        return now + REPUBLISH_S * (1.0 - SPREAD * self._rng.random())

    def _batch(self, waiting: dict[str, tuple[Contact, list[bytes]]]) -> list[Batch]:
        """``waiting``: by peer, what keys it is to store."""
        batches: list[Batch] = []
        for contact, keys in waiting.values():
            for i in range(0, len(keys), BATCH):
                some = [(key, self.publications[key]) for key in keys[i : i + BATCH]]
                batches.append(Batch(contact, [p.signed for _, p in some], tuple((key, p.seq) for key, p in some)))
        return batches

    def _point(self, key: bytes, addrs: list[str], now: float) -> tuple[Signed, int]:
        """A new pointer of this node, kept here too, and its sequence number."""
        stored = [pointer.seq for pointer, _ in self._store.get(key, now) if pointer.peer_id == self._peer]
        seq = max(int(now * 1000), *(n + 1 for n in stored), 0)  # grows across restarts and clocks set back
        pointer = Pointer(key=key, peer_id=self._peer, addrs=addrs, seq=seq, expires_at=now + MAX_TTL_S)
        signed = self._notary.seal_pointer(pointer)
        with contextlib.suppress(RemoteProtocolError):  # our store is full of others' records; theirs keep ours
            self._store.put(signed, now)
        return signed, seq


def batch_for(contact: Contact, records: list[Signed]) -> list[Batch]:
    """Others' records for one peer, in few messages."""
    return [Batch(contact, records[i : i + BATCH], ()) for i in range(0, len(records), BATCH)]
