"""Who serves a model, kept right by those who care: hosts and recent requesters of the same model tell each other.

Sans-IO, in the shape of :class:`~daaswarm.core.kademlia.Kademlia`. A node *follows* the models that it serves or asked
for lately, finds a first member of each through the DHT (:class:`WantMembers`), and then

* **pushes** news (a changed or withdrawn advert) to a few members, who hand on what was new to them;
* **pulls**: every :data:`PULL_S` it compares versions with a random member, and gets what is newer. This alone
  converges; pushing only makes it faster;
* **watches** a few hosts, so that the dead are noticed (:mod:`daaswarm.core.detector`).

Nothing is believed for who brought it: adverts are signed by the peer they speak for, the highest ``seq`` counts.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from daaswarm.core.adverts import AdvertBook, Known
from daaswarm.core.detector import PING_S, Detector, DoubtNote, PingNote
from daaswarm.core.exchange import batch, compare, make_pull
from daaswarm.core.health import NEVER, HealthTable, State
from daaswarm.core.marks import MARK_MAX, get_mark, unpack_marks, unpack_versions
from daaswarm.core.membership_events import (
    Effect,
    Event,
    Reply,
    ReplyReceived,
    RequestReceived,
    WantMembers,
)
from daaswarm.core.news import HOPS, News, PushNote
from daaswarm.core.notary import Notary
from daaswarm.core.outbox import Outbox
from daaswarm.core.own_adverts import OwnAdverts
from daaswarm.core.quotas import Quotas
from daaswarm.core.rng import Rng, pick
from daaswarm.core.signing import MAX_TTL_S
from daaswarm.core.topics import Topic, Topics
from daaswarm.messages import (
    Advert,
    Contact,
    Doubt,
    Doubted,
    Failure,
    Ping,
    Pong,
    PullAdverts,
    Pulled,
    PushAdverts,
    Pushed,
    Signed,
)
from daaswarm.types import ModelRoot, PeerId

TICK_S = 2.0  # how often the shell calls tick
FOLLOW_S = 10 * 60.0  # since a model was last asked for; a chat pauses for less
PULL_S = 20.0  # between two pulls of a model, give or take a quarter
MEMBER_S = 6 * PULL_S  # since it last pulled here that one counts as following; it asks a random member each time
WANT_S = 15 * 60.0  # between two looks of a host into the DHT for members: two groups of them would not meet else
WANT_ALONE_S = 30.0  # while no member is known; who only follows looks just then, and whenever it asks for hosts
LEAVE_FANOUT = 8  # hosts, and followers, told of a withdrawn advert by its peer
WATCH_S = PING_S / 2  # between two looks at who was silent for PING_S
RING = 3  # hosts that a host watches: those after it in the order of marks, so that each is watched
INTRODUCED = 3  # members pulled from at once when some are found
REFUTE_S = 60.0  # between two refutations: a liar must not make this node talk to the whole swarm all the time
SWEEP_S = 60.0  # between two walks over the book
DEADLINE_S = 5.0  # of a pull or a push

PUSH_PER_S, PUSH_BURST = 20.0, 256.0  # adverts from one peer: it may forward what many hosts said at once
PULL_PER_S, PULL_BURST = 1.0, 40.0  # pulls of one peer, and one more for each PULL_COST_BYTES of the answers
PULL_COST_BYTES = 16 * 1024


class _Pull(msgspec.Struct, frozen=True):
    peer: PeerId
    root: ModelRoot


class Membership:
    """One node's part.

    Args:
        notary: signs this node's adverts and checks those of others.
        book: the adverts known; also those of models that aren't followed any more, until they expire.
    """

    def __init__(self, notary: Notary, book: AdvertBook, rng: Rng) -> None:
        self.peer_id = notary.peer_id
        self.book = book
        self._notary = notary
        self._rng = rng
        self._outbox: Outbox[object] = Outbox()
        health = HealthTable()
        self.topics = Topics(self.peer_id, book, health)
        self.detector = Detector(self.peer_id, self.topics, health, self._outbox, rng)
        self.own = OwnAdverts(notary, book, self.topics)
        self.news = News(notary, book, self.topics, self.own, health, self._outbox, rng)
        self._watched_at = self._swept_at = self._refuted_at = NEVER
        self._push_quotas = Quotas(PUSH_PER_S, PUSH_BURST)
        self._pull_quotas = Quotas(PULL_PER_S, PULL_BURST)

    # -- what the node wants --------------------------------------------------------------------------------------

    def get_adverts(self, root: ModelRoot, now: float) -> list[Known]:
        """Who may be offered to a requester: live adverts, without the hosts that are down."""
        health = self.detector.health
        return [
            known
            for known in self.book.get_adverts(root, now)
            if health.get_state(PeerId(known.advert.peer_id)) is not State.DOWN
        ]

    def get_state(self, peer: PeerId) -> State:
        """Whether it is worth asking."""
        return self.detector.health.get_state(peer)

    def advertise(self, advert: Advert, now: float) -> list[Effect]:
        """This node serves a model so, from now on; ``seq`` and ``expires_at`` are set here.

        Raises:
            LocalProtocolError: it serves as many models as one peer may.
        """
        root = ModelRoot(advert.model_root)
        is_new = root not in self.own
        topic = self.topics.follow(root, float("inf"), now)
        self.own.put(advert, now)
        effects = self.news.tell(root, now)
        return [*effects, *self._want(root, topic, now)] if is_new else effects

    def change(self, advert: Advert, now: float) -> list[Effect]:
        """Like :meth:`advertise`, if this node serves the model and something is different."""
        root = ModelRoot(advert.model_root)
        return self.advertise(advert, now) if self.own.get(root) not in (None, advert) else []

    def withdraw(self, root: ModelRoot, now: float) -> list[Effect]:
        """This node serves nothing of it any more: a tombstone, told at once."""
        if root not in self.own:
            return []
        tombstone = self.own.remove(root, now)
        topic = self.topics.followed[root]
        topic.until = now + FOLLOW_S
        effects: list[Effect] = []
        followers = pick(self._rng, self.topics.get_followers(root, now), LEAVE_FANOUT)
        for peer in pick(self._rng, self.topics.get_hosts(root, now), LEAVE_FANOUT) + followers:
            effects += self.news.push(peer, [tombstone], HOPS, is_farewell=True)
        return effects

    def leave(self, now: float) -> list[Effect]:
        """Withdraw everything. Done when :meth:`has_said_goodbye`."""
        return [effect for root in self.own for effect in self.withdraw(root, now)]

    def has_said_goodbye(self) -> bool:
        """Whether everybody who was told of a withdrawal has answered, or won't."""
        return not self.news.farewells

    def follow(self, root: ModelRoot, now: float) -> list[Effect]:
        """Somebody here asks for a model: know about it for :data:`FOLLOW_S`."""
        is_new = root not in self.topics.followed
        topic = self.topics.follow(root, now + FOLLOW_S, now)
        return self._want(root, topic, now) if is_new else []

    def introduce(self, root: ModelRoot, contacts: Iterable[Contact], now: float) -> list[Effect]:
        """The DHT says that these serve a model. They are asked about each other."""
        topic = self.topics.followed.get(root)
        if topic is None:
            return []
        fresh: list[PeerId] = []
        for contact in contacts:
            peer = PeerId(contact.peer_id)
            if peer != self.peer_id:
                self.topics.add_member(root, contact, now + MAX_TTL_S)  # as long as the pointer lives
                if peer in topic.members and self.detector.health.get_state(peer) is not State.DOWN:
                    fresh.append(peer)
        topic.want_at = self._get_want_at(root, now, is_alone=not fresh)
        effects: list[Effect] = []
        for peer in pick(self._rng, fresh, INTRODUCED):
            effects += self._pull(root, topic, peer, now)
        return effects

    def put(self, signed: Signed, now: float) -> bool:
        """Believe what its host said just now, or in an earlier run of this node. False if it is nothing new.

        Raises:
            RemoteProtocolError: it isn't valid, or there is no room.
        """
        known = self._notary.open_advert(signed, now)
        if not self.book.keep(known):
            return False
        if ModelRoot(known.advert.model_root) in self.topics.followed:
            self.topics.note_advert(known)
        return True

    def note_failed(self, peer: PeerId, now: float) -> list[Effect]:
        """The node itself got no answer from it, to whatever it asked."""
        return self.detector.missed(peer, now)

    def note_alive(self, peer: PeerId, now: float) -> list[Effect]:
        """The node itself got an answer from it."""
        return self.detector.heard(peer, now)

    def renew(self, now: float) -> list[Effect]:
        """Sign all own adverts anew, and tell: the clock was set, or others may have given this node up."""
        effects: list[Effect] = []
        for root in self.own:
            self.own.sign(root, now)
            effects += self.news.tell(root, now)
        return effects

    def shift(self, by_s: float) -> None:
        """The clock was set by so much: what happened ``n`` seconds ago still did. Adverts keep their own times."""
        self.detector.shift(by_s)
        self.topics.shift(by_s)
        self._push_quotas.shift(by_s)
        self._pull_quotas.shift(by_s)
        self._watched_at += by_s
        self._swept_at += by_s
        self._refuted_at += by_s
        self.own.shift(by_s)

    # -- rounds ---------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Effect]:
        """What is due by now: renewing, pulling, pushing on, watching, forgetting."""
        effects: list[Effect] = []
        if now - self._swept_at >= SWEEP_S:
            self._sweep(now)
        for root, topic in self.topics.followed.items():
            if topic.fresh:
                effects += self.news.flush(root, topic, now)
            if now >= topic.want_at:
                effects += self._want(root, topic, now)
            if now >= topic.pull_at:
                topic.pull_at = now + PULL_S * (0.75 + self._rng.random() / 2)
                effects += self._pull_any(root, topic, now)
        if now - self._watched_at >= WATCH_S:
            self._watched_at = now
            effects += self.detector.watch(self._get_watched(now), now)
        effects += self.detector.tick(now)
        return effects

    # -- what the network says ------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Effect]:
        """One event in, effects out. Late or unknown ``rpc_id``s are nobody's fault and change nothing."""
        if isinstance(event, RequestReceived):
            effects = self.detector.heard(event.peer, now) if self._is_known(event.peer) else []
            return effects + self._on_request(event, now) + self._meet_revived(now)
        note = self._outbox.take(event.rpc_id)
        answer = event.message if isinstance(event, ReplyReceived) else None
        effects: list[Effect] = []
        if isinstance(note, PingNote):
            answered = None if isinstance(answer, Failure) else isinstance(answer, Pong)
            effects = self.detector.on_ping_done(note, answered, now)
        elif isinstance(note, DoubtNote | _Pull | PushNote):
            if answer is None:
                effects = self.detector.missed(note.peer, now)
            elif not isinstance(answer, Failure):
                effects = self.detector.heard(note.peer, now)
            if isinstance(note, DoubtNote):
                effects += self.detector.on_doubt_done(note, answer if isinstance(answer, Doubted) else None, now)
            elif isinstance(note, _Pull):
                effects += self._on_pulled(note, answer, now)
            else:
                self.news.farewells -= note.is_farewell
                for root in answer.unwanted if isinstance(answer, Pushed) else ():
                    self.topics.drop_member(ModelRoot(root), note.peer)
        return effects + self._meet_revived(now)

    def validate(self) -> None:
        """Asserts the invariants."""
        self.book.validate()
        self.topics.validate()
        self.detector.validate()
        self._push_quotas.validate()
        self._pull_quotas.validate()
        assert self.news.farewells >= 0
        self.own.validate()
        for topic in self.topics.followed.values():
            assert all(0 < hops <= HOPS for hops in topic.fresh.values())

    def _on_request(self, event: RequestReceived, now: float) -> list[Effect]:
        message = event.message
        if isinstance(message, Doubt):
            refuting: list[Effect] = []
            if any(mark == get_mark(self.peer_id) for mark, _ in unpack_versions(message.about)):
                refuting = self._refute(now)
            return refuting + self.detector.on_doubt(event.request_id, event.peer, message, now)
        if isinstance(message, PushAdverts):
            wait_s = self._push_quotas.take(event.peer, now, max(len(message.adverts), 1))
            if wait_s:
                return [_refuse(event.request_id, "too many adverts", wait_s)]
            effects, unwanted = self.news.take(message.adverts, event.peer, now, hops=message.hops)
            return [*effects, Reply(request_id=event.request_id, message=Pushed(unwanted=unwanted))]
        if isinstance(message, PullAdverts):
            return self._on_pull(event, message, now)
        if isinstance(message, Ping):
            return [Reply(request_id=event.request_id, message=Pong())]
        failure = Failure(code="unsupported", message=f"{type(message).__name__} is not for the membership")
        return [Reply(request_id=event.request_id, message=failure)]

    # -- pulling --------------------------------------------------------------------------------------------------

    def _on_pull(self, event: RequestReceived, message: PullAdverts, now: float) -> list[Effect]:
        root = ModelRoot(message.model_root)
        if root not in self.topics.followed:
            failure = Failure(code="not_followed", message="this node does not follow the model")
            return [Reply(request_id=event.request_id, message=failure)]
        pulled, size = compare(self.book, self.detector.health, root, message, now)
        wait_s = self._pull_quotas.take(event.peer, now, 1 + size / PULL_COST_BYTES)
        if wait_s:
            return [_refuse(event.request_id, "too many pulls", wait_s)]
        # It is told news from now on; one that can't be dialled, while it stays connected.
        contact = event.contact or Contact(peer_id=event.peer, addrs=[])
        self.topics.add_member(root, contact, now + MEMBER_S)
        return [Reply(request_id=event.request_id, message=pulled)]

    def _pull_any(self, root: ModelRoot, topic: Topic, now: float) -> list[Effect]:
        colleague = self.topics.pick_colleague(root, self._rng, now)
        if colleague is None:
            topic.want_at = min(topic.want_at, now + WANT_ALONE_S)
            return []
        return self._pull(root, topic, colleague, now)

    def _pull(self, root: ModelRoot, topic: Topic, peer: PeerId, now: float) -> list[Effect]:
        contact = self.topics.get_contact(peer)
        if contact is None:
            return []
        message = make_pull(self.book, root, self._rng, now)
        return [self._outbox.send(contact, message, DEADLINE_S, _Pull(peer, root))]

    def _on_pulled(self, note: _Pull, answer: object, now: float) -> list[Effect]:
        topic = self.topics.followed.get(note.root)
        if topic is None:
            return []
        if not isinstance(answer, Pulled):
            if isinstance(answer, Failure) and answer.code != "busy":
                self.topics.drop_member(note.root, note.peer)
            topic.pull_at = min(topic.pull_at, now + 2 * TICK_S)  # another may do
            return []
        before = len(self.book)
        effects, _ = self.news.take(answer.adverts, note.peer, now, root=note.root)
        effects += self.detector.consider(unpack_versions(answer.down), now)
        wanted = set(unpack_marks(answer.wanted))
        if wanted:
            found = [
                known.signed
                for known in self.book.get_all(note.root)
                if known.advert.expires_at > now and get_mark(known.advert.peer_id) in wanted
            ]
            for some in batch(found):
                effects += self.news.push(note.peer, some, 1)
        if answer.more and len(self.book) > before:
            effects += self._pull_any(note.root, topic, now)
        return effects

    # -- parts ----------------------------------------------------------------------------------------------------

    def _refute(self, now: float) -> list[Effect]:
        if now - self._refuted_at < REFUTE_S:
            return []
        self._refuted_at = now
        return self.renew(now)

    def _want(self, root: ModelRoot, topic: Topic, now: float) -> list[Effect]:
        topic.want_at = self._get_want_at(root, now, is_alone=not self.topics.get_colleagues(root, now))
        return [WantMembers(root=root)]

    def _get_want_at(self, root: ModelRoot, now: float, *, is_alone: bool) -> float:
        """When to look for members next."""
        if is_alone:
            return now + WANT_ALONE_S
        return now + WANT_S if root in self.own else float("inf")

    def _get_watched(self, now: float) -> list[PeerId]:
        """Of each model served here the next few hosts in the order of marks after this one, and one at random of one
        that is followed: who follows many models watches no more than who follows one."""
        watched: dict[PeerId, None] = {}
        own = get_mark(self.peer_id)
        for root in self.own:
            after = sorted(self.topics.get_hosts(root, now), key=lambda peer: (get_mark(peer) - own) & MARK_MAX)
            watched |= dict.fromkeys(after[:RING])
        for root in pick(self._rng, list(self.topics.followed), 1):
            if (host := self.topics.pick_host(root, self._rng, now)) is not None:
                watched[host] = None
        return list(watched)

    def _meet_revived(self, now: float) -> list[Effect]:
        """Who was thought dead knows what happened where it was: compare."""
        effects: list[Effect] = []
        for peer in self.detector.revived:
            for root in self.topics.get_shared(peer):
                effects += self._pull(root, self.topics.followed[root], peer, now)
        self.detector.revived.clear()
        return effects

    def _is_known(self, peer: PeerId) -> bool:
        return peer in self.detector.health or next(iter(self.topics.get_roots(peer)), None) is not None

    def _sweep(self, now: float) -> None:
        self._swept_at = now
        self.own.sign_due(now)
        gone = self.book.tick(now) + self.topics.expire(now)
        if gone:
            self.topics.rebuild()
        self.detector.sweep(now)


def _refuse(request_id: int, reason: str, wait_s: float) -> Reply:
    failure = Failure(code="busy", message=f"{reason} from this peer", retry_after_s=round(wait_s, 3))
    return Reply(request_id=request_id, message=failure)
