"""What is new about a model, pushed from member to member."""

from __future__ import annotations

import msgspec

from daaswarm.core.adverts import AdvertBook
from daaswarm.core.exchange import batch
from daaswarm.core.health import HealthTable, State
from daaswarm.core.membership_events import Effect, Misbehaved
from daaswarm.core.notary import Notary
from daaswarm.core.outbox import Outbox
from daaswarm.core.own_adverts import OwnAdverts
from daaswarm.core.rng import Rng, pick
from daaswarm.core.topics import Topic, Topics
from daaswarm.errors import RemoteProtocolError
from daaswarm.messages import PushAdverts, Signed
from daaswarm.types import ModelRoot, PeerId

FANOUT = 4  # hosts, and as many followers, that each pushes news to: 98 % hear it in log4(n) hops, pulls do the rest
HOPS = 8  # of news: 4^8 members
PUSH_GAP_S = 0.5  # between two pushes of a model: what comes in between goes together
HEARSAY_ADVERTS = 1_024  # of one model kept on others' word; signatures prove who speaks, not that anybody serves
PUSH_S = 5.0  # for an answer to a push


class PushNote(msgspec.Struct, frozen=True):
    peer: PeerId
    is_farewell: bool = False


class News:
    """A part of :class:`~daaswarm.core.membership.Membership`, which routes events to it.

    Attributes:
        farewells: pushes of tombstones that weren't answered yet.
    """

    def __init__(
        self,
        notary: Notary,
        book: AdvertBook,
        topics: Topics,
        own: OwnAdverts,
        health: HealthTable,
        outbox: Outbox[object],
        rng: Rng,
    ) -> None:
        self.farewells = 0
        self.peer_id = notary.peer_id
        self._notary = notary
        self._book = book
        self._topics = topics
        self._own = own
        self._health = health
        self._outbox = outbox
        self._rng = rng

    def take(
        self, adverts: list[Signed], sender: PeerId, now: float, *, hops: int = 0, root: ModelRoot | None = None
    ) -> tuple[list[Effect], list[str]]:
        """Keeps what is new of followed models, and hands it on while ``hops`` last. Also: roots not followed."""
        effects: list[Effect] = []
        unwanted: dict[str, None] = {}
        touched: dict[ModelRoot, None] = {}
        for signed in adverts:
            try:
                said = self._notary.peek_advert(signed)
                its_root, peer = ModelRoot(said.model_root), PeerId(said.peer_id)
                if its_root not in self._topics.followed or (root is not None and its_root != root):
                    unwanted[its_root] = None
                    continue
                known = self._book.get(peer, its_root)
                if known is not None and said.seq <= known.advert.seq:
                    continue
                if known is None and peer != sender and len(self._book.get_all(its_root)) >= HEARSAY_ADVERTS:
                    continue
                checked = self._notary.open_advert(signed, now)
                if peer == self.peer_id:
                    effects += self.tell(its_root, now) if self._own.outbid(checked.advert, now) else []
                    continue
                self._book.keep(checked)
            except RemoteProtocolError as error:
                if error.reject:
                    effects.append(Misbehaved(peer=sender, reason=error.message))
                    break  # the rest of it isn't worth checking
                continue
            self._topics.note_advert(checked)
            if self._health.get_state(peer) is State.DOWN:
                self._health.get(peer).retry_at = now  # it says that it lives: ask it
            if hops > 1:
                topic = self._topics.followed[its_root]
                topic.fresh[peer] = min(hops - 1, HOPS)
                touched[its_root] = None
        for its_root in touched:
            topic = self._topics.followed[its_root]
            if now - topic.pushed_at >= PUSH_GAP_S:
                effects += self.flush(its_root, topic, now, sender)
        return effects, list(unwanted)

    def flush(self, root: ModelRoot, topic: Topic, now: float, sender: PeerId | None = None) -> list[Effect]:
        """Pushes what is new in a model to a few members, not to those who said it."""
        hosts = [p for p in self._topics.get_hosts(root, now) if p != sender]
        followers = [p for p in self._topics.get_followers(root, now) if p != sender]
        if not hosts and not followers and self.peer_id in topic.fresh:
            return []  # what this node says of itself waits for the first to hear it
        fresh, topic.fresh = topic.fresh, {}
        topic.pushed_at = now
        effects: list[Effect] = []
        by_hops: dict[int, list[Signed]] = {}
        for peer, hops in fresh.items():
            known = self._book.get(peer, root)
            if known is not None and known.advert.expires_at > now:
                by_hops.setdefault(hops, []).append(known.signed)
        for hops, found in by_hops.items():
            for some in batch(found):
                # A host is known to all; a follower to the few that it asked, so it has a share of its own.
                for peer in pick(self._rng, hosts, FANOUT) + pick(self._rng, followers, FANOUT):
                    effects += self.push(peer, some, hops)
        return effects

    def push(self, peer: PeerId, adverts: list[Signed], hops: int, *, is_farewell: bool = False) -> list[Effect]:
        contact = self._topics.get_contact(peer)
        if contact is None:
            return []
        self.farewells += is_farewell
        message = PushAdverts(adverts=adverts, hops=hops)
        return [self._outbox.send(contact, message, PUSH_S, PushNote(peer, is_farewell))]

    def tell(self, root: ModelRoot, now: float) -> list[Effect]:
        """Pushes this node's own advert, or tombstone, of a model."""
        topic = self._topics.followed[root]
        topic.fresh[self.peer_id] = HOPS
        return self.flush(root, topic, now)
