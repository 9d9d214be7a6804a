"""Notices that a peer has died, and tells those whom it concerns.

After SWIM (Das, Gupta and Motivala, 2002), for a swarm in which anybody may lie. A peer that misses a ping is doubted;
two others are asked for it (`Doubt`, SWIM's ping-req). If they can't reach it either, it is down, and the same message
tells more of those who care. **Nobody believes it**: each asks the peer itself, once, and only one that got no answer
tells others. So a lie costs its target one ping from each of few, and a truth travels like any epidemic. Whoever is
doubted and lives hears of it, and signs its adverts anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import msgspec

from daaswarm.core.health import RETRY_MAX_S, HealthTable, State
from daaswarm.core.marks import get_mark, pack_marks, pack_versions, unpack_marks, unpack_versions
from daaswarm.core.membership_events import Doubtful, Effect, Reply
from daaswarm.core.outbox import Outbox
from daaswarm.core.quotas import Quotas
from daaswarm.core.rng import Rng, pick
from daaswarm.core.signing import MAX_TTL_S
from daaswarm.messages import Contact, Doubt, Doubted, Failure, Ping
from daaswarm.types import ModelRoot, PeerId

PING_S = 10.0  # silence after which a watched peer is asked whether it is there
PING_DEADLINE_S = 3.0  # for its answer, a new connection included
HELP_DEADLINE_S = 5.0  # for another's opinion: its ping, and the way to it and back
HELPERS = 2  # asked for an opinion
SPREAD = 8  # told of one that is down, by each who found it so
RECENT_S = 5.0  # heard of so lately, it isn't asked again because others doubt it
VOUCHES = 3  # in a row by others for one that never answers here: then it isn't offered here
DOUBTS = 64  # in one message; more wait for the next round
INQUIRIES = 256  # of others waiting for an answer at once; beyond, they get what is known
RETRIES = 8  # of those that are down, a round
HEARSAY = 32  # checks because of one list of those that are down elsewhere
DOUBTS_PER_S, DOUBTS_BURST = 4.0, 128.0  # of one peer


class Roster(Protocol):
    """What the detector has to know of the peers."""

    def get_contact(self, peer: PeerId) -> Contact | None: ...

    def get_roots(self, peer: PeerId) -> Iterable[ModelRoot]:
        """The followed models that it serves."""
        ...

    def get_seq(self, peer: PeerId) -> int:
        """Of its newest advert known."""
        ...

    def get_colleagues(self, root: ModelRoot, now: float) -> list[PeerId]:
        """Who follows or serves a model, and isn't known to be down; never this node."""
        ...

    def find(self, mark: int) -> PeerId | None: ...


class PingNote(msgspec.Struct, frozen=True):
    """``is_check``: others doubt it too, so that one miss is enough."""

    peer: PeerId
    is_check: bool


class DoubtNote(msgspec.Struct, frozen=True):
    """``about``: whose case waits for this opinion; ``None`` where the news was told."""

    peer: PeerId
    about: PeerId | None


class _Inquiry(msgspec.Struct):
    waiting: int
    alive: list[int]


class Detector:
    """A part of :class:`~daaswarm.core.membership.Membership`, which routes events to it.

    Attributes:
        revived: who was down and answered, since the caller last emptied it.
    """

    def __init__(self, own: PeerId, roster: Roster, health: HealthTable, outbox: Outbox[object], rng: Rng) -> None:
        self.health = health
        self.revived: list[PeerId] = []
        self._own = own
        self._roster = roster
        self._outbox = outbox
        self._rng = rng
        self._quotas = Quotas(DOUBTS_PER_S, DOUBTS_BURST)
        self._opinions: dict[PeerId, list[int]] = {}  # under way: how many are out, how many heard of it
        self._news: dict[PeerId, None] = {}  # found to be down, not told yet
        self._inquiries: dict[int, _Inquiry] = {}
        self._asked_by: dict[PeerId, list[int]] = {}  # whose inquiries wait for a peer's ping

    # -- what others learn ----------------------------------------------------------------------------------------

    def heard(self, peer: PeerId, now: float) -> list[Effect]:
        """A sign of life that can't be forged: it answered, or asked something, over a connection that it proved."""
        before = self.health.note_alive(peer, now)
        effects = self._tell_inquirers(peer, True)
        if before is State.UP:
            return effects
        self._news.pop(peer, None)
        self._opinions.pop(peer, None)
        if before is State.DOWN:
            self.revived.append(peer)
            self.health.retry_all(now)  # a healed network gives many back at once
        # It ought to know, and to refute with newer adverts: others may still hold it for dead.
        return [*effects, *self._send_doubt(peer, [peer], None)]

    def missed(self, peer: PeerId, now: float, *, is_check: bool = False) -> list[Effect]:
        """It didn't answer within a deadline, or no connection could be made."""
        effects = self._tell_inquirers(peer, False)
        health = self.health.get(peer)
        health.failed_at = now
        if health.state is State.DOWN:
            self.health.note_missed(peer, now)
            return effects
        if peer in self._opinions:
            return effects
        if is_check:
            return effects + self._confirm(peer, now)
        if health.state is State.UP:
            self.health.set_state(peer, State.DOUBTED)
            effects.append(Doubtful(peer=peer))
        health.retry_at = now + 2 * HELP_DEADLINE_S  # should the opinions never come
        helpers = self._get_helpers(peer, now)
        if not helpers:
            return effects + self.check(peer, is_check=True)
        self._opinions[peer] = [len(helpers), 0]
        for helper in helpers:
            effects += self._send_doubt(helper, [peer], peer)
        return effects

    # -- rounds -----------------------------------------------------------------------------------------------------

    def watch(self, peers: Iterable[PeerId], now: float) -> list[Effect]:
        """Ask those of whom nothing was heard for :data:`PING_S`."""
        effects: list[Effect] = []
        for peer in peers:
            if self.health.get_state(peer) is State.UP and now - self.health.get_alive_at(peer) >= PING_S:
                effects += self.check(peer)
        return effects

    def tick(self, now: float) -> list[Effect]:
        """Ask again those that are not up, and tell of those that went down."""
        effects: list[Effect] = []
        for peer in self.health.get_due(now, RETRIES):
            asked = self.check(peer)
            if not asked:  # nobody says at the moment where it is; remembered all the same, see sweep
                self.health.get(peer).retry_at = now + RETRY_MAX_S
            effects += asked
        if self._news:
            effects += self._spread(now)
        return effects

    def sweep(self, now: float) -> None:
        """Forget the down of whom nothing is left to point at them."""
        for peer in list(self.health.get_troubled()):
            if self._roster.get_contact(peer) is None and now - self.health.get(peer).failed_at > MAX_TTL_S:
                self.health.forget(peer)

    def check(self, peer: PeerId, *, is_check: bool = False) -> list[Effect]:
        """A ping, unless one is under way. Nothing for one without a contact."""
        contact = self._roster.get_contact(peer)
        if contact is None or peer == self._own:
            return []
        health = self.health.get(peer)
        if not health.checking:
            health.checking = True
            return [self._outbox.send(contact, Ping(), PING_DEADLINE_S, PingNote(peer, is_check))]
        return []

    def consider(self, versions: Iterable[tuple[int, int]], now: float) -> list[Effect]:
        """Another says that these are down: ask them, unless they were heard of."""
        effects: list[Effect] = []
        checks = 0
        for mark, _ in versions:
            peer = self._roster.find(mark)
            if peer is None or peer == self._own or self.health.get_state(peer) is State.DOWN:
                continue
            if checks < HEARSAY and now - self.health.get_alive_at(peer) > RECENT_S:
                checks += 1
                effects.append(Doubtful(peer=peer))
                effects += self.check(peer, is_check=True)
        return effects

    # -- what comes in ------------------------------------------------------------------------------------------------

    def on_doubt(self, request_id: int, asker: PeerId, message: Doubt, now: float) -> list[Effect]:
        """Somebody can't reach some peers. Answered when it is known whether this node can."""
        versions = unpack_versions(message.about)[:DOUBTS]
        wait_s = self._quotas.take(asker, now, max(len(versions), 1))
        if wait_s:
            failure = Failure(code="busy", message="too many doubts", retry_after_s=round(wait_s, 3))
            return [Reply(request_id=request_id, message=failure)]
        effects: list[Effect] = []
        inquiry = _Inquiry(waiting=0, alive=[])
        for mark, _ in versions:
            peer = self._roster.find(mark)
            if peer == self._own or (peer is not None and now - self.health.get_alive_at(peer) <= RECENT_S):
                inquiry.alive.append(mark)
            elif peer is not None and self.health.get_state(peer) is not State.DOWN:
                asked = self.check(peer, is_check=True)
                effects += asked
                if len(self._inquiries) < INQUIRIES and self.health.get(peer).checking:
                    inquiry.waiting += 1
                    self._asked_by.setdefault(peer, []).append(request_id)
        if not inquiry.waiting:
            return [*effects, Reply(request_id=request_id, message=Doubted(alive=pack_marks(inquiry.alive)))]
        self._inquiries[request_id] = inquiry
        return effects

    def on_ping_done(self, note: PingNote, answered: bool | None, now: float) -> list[Effect]:
        """``None``: it could not even be asked, or was too busy to say."""
        self.health.get(note.peer).checking = False
        if answered:
            return self.heard(note.peer, now)
        if answered is None:
            if self.health.get_state(note.peer) is not State.UP:
                self.health.note_missed(note.peer, now)
            return self._tell_inquirers(note.peer, False)
        return self.missed(note.peer, now, is_check=note.is_check)

    def on_doubt_done(self, note: DoubtNote, message: Doubted | None, now: float) -> list[Effect]:
        """The opinion, or ``None``."""
        alive = unpack_marks(message.alive) if message is not None else []
        if note.about is None:
            for mark in alive[:DOUBTS]:
                peer = self._roster.find(mark)
                if peer is not None and self.health.get_state(peer) is State.DOWN:
                    self.health.get(peer).retry_at = now  # somebody heard of it just now
            return []
        opinion = self._opinions.get(note.about)
        if opinion is None:
            return []
        opinion[0] -= 1
        opinion[1] += get_mark(note.about) in alive
        if opinion[0]:
            return []
        del self._opinions[note.about]
        if not opinion[1]:
            return self._confirm(note.about, now)
        health = self.health.get(note.about)
        health.retry_at = now + PING_S
        health.vouched += 1
        if health.vouched >= VOUCHES:
            self.health.set_state(note.about, State.DOWN)  # for this node it is; others reach it
            return [Doubtful(peer=note.about)]
        return []

    def shift(self, by_s: float) -> None:
        """The clock was set by so much."""
        self.health.shift(by_s)
        self._quotas.shift(by_s)

    def validate(self) -> None:
        """Asserts the invariants."""
        self.health.validate()
        self._quotas.validate()
        assert len(self._inquiries) <= INQUIRIES
        for peer, opinion in self._opinions.items():
            assert self.health.get_state(peer) is State.DOUBTED and opinion[0] > 0
        waiting: dict[int, int] = {}
        for ids in self._asked_by.values():
            for request_id in ids:
                waiting[request_id] = waiting.get(request_id, 0) + 1
        assert waiting == {request_id: inquiry.waiting for request_id, inquiry in self._inquiries.items()}

    # -- parts ----------------------------------------------------------------------------------------------------

    def _confirm(self, peer: PeerId, now: float) -> list[Effect]:
        self.health.set_state(peer, State.DOWN)
        self.health.note_missed(peer, now)
        self._news[peer] = None
        return [Doubtful(peer=peer)]

    def _spread(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        told = list(self._news)[:DOUBTS]
        by_root: dict[ModelRoot, list[PeerId]] = {}
        for peer in told:
            del self._news[peer]
            for root in self._roster.get_roots(peer):
                by_root.setdefault(root, []).append(peer)
        for root, peers in by_root.items():
            for target in pick(self._rng, self._roster.get_colleagues(root, now), SPREAD):
                effects += self._send_doubt(target, peers, None)
        return effects

    def _get_helpers(self, peer: PeerId, now: float) -> list[PeerId]:
        """Others who know it, of each of its models the same chance."""
        roots = list(self._roster.get_roots(peer))
        if not roots:
            return []
        root = pick(self._rng, roots, 1)[0]
        others = [p for p in self._roster.get_colleagues(root, now) if p != peer]
        return pick(self._rng, [p for p in others if self.health.get_state(p) is State.UP], HELPERS)

    def _send_doubt(self, target: PeerId, peers: list[PeerId], about: PeerId | None) -> list[Effect]:
        contact = self._roster.get_contact(target)
        if contact is None:
            return []
        message = Doubt(about=pack_versions((get_mark(p), self._roster.get_seq(p)) for p in peers))
        return [self._outbox.send(contact, message, HELP_DEADLINE_S, DoubtNote(target, about))]

    def _tell_inquirers(self, peer: PeerId, is_alive: bool) -> list[Effect]:
        effects: list[Effect] = []
        for request_id in self._asked_by.pop(peer, ()):
            inquiry = self._inquiries[request_id]
            inquiry.waiting -= 1
            if is_alive:
                inquiry.alive.append(get_mark(peer))
            if not inquiry.waiting:
                del self._inquiries[request_id]
                effects.append(Reply(request_id=request_id, message=Doubted(alive=pack_marks(inquiry.alive))))
        return effects
