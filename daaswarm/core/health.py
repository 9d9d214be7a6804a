"""Which peers answer, as far as this node can tell: heard of, doubted, or down."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set
from enum import IntEnum

from daaswarm.types import PeerId

PEERS = 4_096  # remembered; as many as there are adverts in a full book
RETRY_S = 8.0  # until one that is down is asked again for the first time, then twice as long each time ...
RETRY_MAX_S = 30.0  # ... up to this: after a partition both sides see each other within a minute
NEVER = float("-inf")


class State(IntEnum):
    UP = 0  # answers, or nobody said otherwise
    DOUBTED = 1  # didn't answer once; a second opinion is being asked for
    DOWN = 2  # didn't answer twice, or two ways: not offered until it answers here


class Health:
    """What is known of one peer. Times are Unix times, s."""

    __slots__ = ("alive_at", "checking", "delay_s", "failed_at", "retry_at", "state", "vouched")

    def __init__(self) -> None:
        self.state = State.UP
        self.alive_at = NEVER  # last heard of, directly
        self.failed_at = NEVER  # when it last didn't answer, or stopped being up
        self.retry_at = NEVER  # of one that isn't up: when it is asked again
        self.delay_s = RETRY_S
        self.checking = False  # it is being asked
        self.vouched = 0  # times in a row that others heard of it and this node did not


class HealthTable:
    """Bounded; who was heard of longest ago is forgotten first, those in trouble last."""

    def __init__(self, *, peers: int = PEERS) -> None:
        self._limit = peers
        self._known: OrderedDict[PeerId, Health] = OrderedDict()
        self._troubled: dict[PeerId, None] = {}  # not up, in the order in which they got there

    def __contains__(self, peer: object) -> bool:
        return peer in self._known

    def get_state(self, peer: PeerId) -> State:
        """UP for one that nothing is known of."""
        health = self._known.get(peer)
        return health.state if health is not None else State.UP

    def get_alive_at(self, peer: PeerId) -> float:
        """When it was last heard of."""
        health = self._known.get(peer)
        return health.alive_at if health is not None else NEVER

    def get(self, peer: PeerId) -> Health:
        """What is known of a peer, to be changed by :meth:`set_state` and the caller."""
        health = self._known.get(peer)
        if health is None:
            health = self._known[peer] = Health()
            if len(self._known) > self._limit:
                self._forget_one(peer)
        return health

    def note_alive(self, peer: PeerId, now: float) -> State:
        """It was heard of. Returns the state before."""
        health = self.get(peer)
        before = health.state
        health.alive_at = max(now, health.alive_at)
        health.vouched = 0
        health.delay_s = RETRY_S
        self._known.move_to_end(peer)
        if before is not State.UP:
            self.set_state(peer, State.UP)
        return before

    def set_state(self, peer: PeerId, state: State) -> None:
        self.get(peer).state = state
        if state is State.UP:
            self._troubled.pop(peer, None)
        else:
            self._troubled[peer] = None

    def note_missed(self, peer: PeerId, now: float) -> None:
        """One that is not up was asked again, in vain."""
        health = self.get(peer)
        health.failed_at = now
        health.retry_at = now + health.delay_s
        health.delay_s = min(health.delay_s * 2, RETRY_MAX_S)

    def retry_all(self, now: float) -> None:
        """Ask all that are not up again now: one of them answered, so the network may be whole again."""
        for peer in self._troubled:
            self._known[peer].retry_at = min(self._known[peer].retry_at, now)

    def get_due(self, now: float, limit: int) -> list[PeerId]:
        """Of those not up, whom to ask again now; those who wait longest first."""
        if not self._troubled:
            return []
        due = [p for p in self._troubled if self._known[p].retry_at <= now and not self._known[p].checking]
        return sorted(due, key=lambda p: (self._known[p].retry_at, p))[:limit]

    def get_troubled(self) -> Set[PeerId]:
        """All that are not up."""
        return self._troubled.keys()

    def forget(self, peer: PeerId) -> None:
        """Nothing is wanted of it any more."""
        self._known.pop(peer, None)
        self._troubled.pop(peer, None)

    def shift(self, by_s: float) -> None:
        """The clock was set by so much."""
        for health in self._known.values():
            health.alive_at += by_s
            health.failed_at += by_s
            health.retry_at += by_s

    def validate(self) -> None:
        """Asserts the invariants."""
        assert len(self._known) <= self._limit
        assert {p for p, health in self._known.items() if health.state is not State.UP} == self._troubled.keys()
        assert all(health.delay_s <= RETRY_MAX_S for health in self._known.values())

    def _forget_one(self, fresh: PeerId) -> None:
        for peer, health in self._known.items():
            if health.state is State.UP and peer != fresh:
                break
        else:
            peer = next(iter(self._known))
        self.forget(peer)
