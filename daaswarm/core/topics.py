"""The models that a node follows: who serves them, who else follows them. The book is the truth, this its index."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from daaswarm.core.adverts import AdvertBook, Known
from daaswarm.core.health import NEVER, HealthTable, State
from daaswarm.core.marks import get_mark
from daaswarm.core.rng import Rng, pick
from daaswarm.messages import Contact
from daaswarm.types import ModelRoot, PeerId

TOPICS = 256  # followed at once; the one that ends soonest makes room
TRIES = 4  # at random, before all are looked at
MEMBERS = 256  # followers and pointed-to peers of one model remembered, beside those whose adverts are known


class Topic:
    """One model. ``until``: this node follows it so long, forever while it serves it. Times are Unix times, s."""

    __slots__ = ("fresh", "members", "pull_at", "pulling", "pushed_at", "until", "want_at")

    def __init__(self, until: float, now: float) -> None:
        self.until = until
        self.members: dict[PeerId, tuple[Contact, float]] = {}  # until when, oldest first
        self.fresh: dict[PeerId, int] = {}  # whose news is to be pushed, over how many hops
        self.pushed_at = NEVER
        self.pull_at = now
        self.pulling: PeerId | None = None
        self.want_at = now


class Topics:
    """A Roster for the detector. Bounded by :data:`TOPICS`, :data:`MEMBERS` and the book's own limits."""

    def __init__(self, own: PeerId, book: AdvertBook, health: HealthTable) -> None:
        self.followed: dict[ModelRoot, Topic] = {}
        self._own = own
        self._book = book
        self._health = health
        self._hosts: dict[PeerId, dict[ModelRoot, None]] = {}
        self._marks: dict[int, PeerId] = {}

    def follow(self, root: ModelRoot, until: float, now: float) -> Topic:
        """This node wants to know about a model, at least until then."""
        topic = self.followed.get(root)
        if topic is None:
            if len(self.followed) >= TOPICS:
                self.drop(min(self.followed, key=lambda r: (self.followed[r].until, r)))
            topic = self.followed[root] = Topic(until, now)
            for known in self._book.get_all(root):
                self.note_advert(known)
        topic.until = max(topic.until, until)
        return topic

    def drop(self, root: ModelRoot) -> None:
        """Follow it no more."""
        del self.followed[root]
        self.rebuild()

    def note_advert(self, known: Known) -> None:
        """The book has it, and its model is followed."""
        peer = PeerId(known.advert.peer_id)
        if known.advert.withdrawn:
            roots = self._hosts.get(peer, {})
            roots.pop(ModelRoot(known.advert.model_root), None)
            if not roots:
                self._hosts.pop(peer, None)
        else:
            self._hosts.setdefault(peer, {})[ModelRoot(known.advert.model_root)] = None
            self._marks[get_mark(peer)] = peer

    def add_member(self, root: ModelRoot, contact: Contact, until: float) -> None:
        """A peer follows the model, or is said to serve it."""
        peer = PeerId(contact.peer_id)
        topic = self.followed.get(root)
        if topic is None or peer == self._own:
            return
        _, before = topic.members.pop(peer, (contact, until))
        topic.members[peer] = contact, max(until, before)
        self._marks[get_mark(peer)] = peer
        if len(topic.members) > MEMBERS:
            del topic.members[next(iter(topic.members))]

    def drop_member(self, root: ModelRoot, peer: PeerId) -> None:
        """It says that it doesn't follow the model."""
        topic = self.followed.get(root)
        if topic is not None:
            topic.members.pop(peer, None)

    def rebuild(self) -> None:
        """After adverts or topics went: the index anew, and no members whose time is over."""
        self._hosts.clear()
        self._marks.clear()
        for root, topic in self.followed.items():
            for known in self._book.get_all(root):
                self.note_advert(known)
            for peer in topic.members:
                self._marks[get_mark(peer)] = peer

    def expire(self, now: float) -> int:
        """Topics and members whose time is over go. Returns how many; the index is not rebuilt."""
        ended = [root for root, topic in self.followed.items() if topic.until <= now]
        for root in ended:
            del self.followed[root]
        gone = len(ended)
        for topic in self.followed.values():
            over = [peer for peer, (_, until) in topic.members.items() if until <= now]
            for peer in over:
                del topic.members[peer]
            gone += len(over)
        return gone

    def get_hosts(self, root: ModelRoot, now: float) -> list[PeerId]:
        """Who serves it and isn't down, but for this node, in the order in which they came."""
        own, troubled = self._own, self._health.get_troubled()
        hosts: list[PeerId] = []
        for known in self._book.get_all(root):
            advert = known.advert
            peer = cast("PeerId", advert.peer_id)
            if peer == own or advert.withdrawn or not advert.expires_at > now:
                continue
            if peer not in troubled or self._is_there(peer):
                hosts.append(peer)
        return hosts

    def pick_host(self, root: ModelRoot, rng: Rng, now: float) -> PeerId | None:
        """One of :meth:`get_hosts`, without walking over all of them where that can be avoided."""
        known = list(self._book.get_all(root))
        for _ in range(TRIES if known else 0):
            advert = known[int(rng.random() * len(known))].advert
            peer = cast("PeerId", advert.peer_id)
            if peer != self._own and not advert.withdrawn and advert.expires_at > now and self._is_there(peer):
                return peer
        return next(iter(pick(rng, self.get_hosts(root, now), 1)), None)

    def pick_colleague(self, root: ModelRoot, rng: Rng, now: float) -> PeerId | None:
        """A host or a follower, all of them with the same chance."""
        topic = self.followed.get(root)
        if topic is None:
            return None
        hosts, members = len(self._book.get_all(root)), len(topic.members)
        if rng.random() * (hosts + members) < hosts:
            return self.pick_host(root, rng, now)
        for peer in pick(rng, list(topic.members), TRIES):
            if topic.members[peer][1] > now and root not in self._hosts.get(peer, ()) and self._is_there(peer):
                return peer
        return next(iter(pick(rng, self.get_colleagues(root, now), 1)), None)

    def get_followers(self, root: ModelRoot, now: float) -> list[PeerId]:
        """The members without an advert that aren't down."""
        return [
            peer
            for peer, (_, until) in self.followed[root].members.items()
            if until > now and root not in self._hosts.get(peer, ()) and self._is_there(peer)
        ]

    def shift(self, by_s: float) -> None:
        """The clock was set by so much."""
        for topic in self.followed.values():
            topic.until += by_s
            topic.pushed_at += by_s
            topic.pull_at += by_s
            topic.want_at += by_s
            topic.members = {peer: (contact, until + by_s) for peer, (contact, until) in topic.members.items()}

    def validate(self) -> None:
        """Asserts the invariants."""
        assert len(self.followed) <= TOPICS
        for root, topic in self.followed.items():
            assert len(topic.members) <= MEMBERS and self._own not in topic.members
            for known in self._book.get_all(root):
                serves = root in self._hosts.get(PeerId(known.advert.peer_id), {})
                assert serves is not known.advert.withdrawn
        for peer, roots in self._hosts.items():
            assert roots and self._marks[get_mark(peer)] == peer and all(root in self.followed for root in roots)

    # -- the detector's Roster ------------------------------------------------------------------------------------

    def get_contact(self, peer: PeerId) -> Contact | None:
        """From its newest advert of a followed model, else as it or others said."""
        newest: Known | None = None
        for root in self._hosts.get(peer, ()):
            known = self._book.get(peer, root)
            if known is not None and (newest is None or known.advert.seq > newest.advert.seq):
                newest = known
        if newest is not None:
            return Contact(peer_id=peer, addrs=newest.advert.addrs)
        for topic in self.followed.values():
            if peer in topic.members:
                return topic.members[peer][0]
        return None

    def get_roots(self, peer: PeerId) -> Iterable[ModelRoot]:
        return self._hosts.get(peer, ())

    def get_shared(self, peer: PeerId) -> list[ModelRoot]:
        """The followed models that it follows or serves."""
        serves = self._hosts.get(peer, ())
        return [root for root, topic in self.followed.items() if root in serves or peer in topic.members]

    def get_seq(self, peer: PeerId) -> int:
        found = (self._book.get(peer, root) for root in self._hosts.get(peer, ()))
        return max((known.advert.seq for known in found if known is not None), default=0)

    def get_colleagues(self, root: ModelRoot, now: float) -> list[PeerId]:
        return self.get_hosts(root, now) + self.get_followers(root, now) if root in self.followed else []

    def find(self, mark: int) -> PeerId | None:
        return self._marks.get(mark)

    def _is_there(self, peer: PeerId) -> bool:
        return self._health.get_state(peer) is not State.DOWN
