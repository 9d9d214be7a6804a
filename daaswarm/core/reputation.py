"""Whom this node believes, and how often it checks: learnt from its own audits alone. Time is passed in (Unix time, s).

Per peer and model: a Beta distribution over the share of right answers, whose counts decay; a probation in which every
call is checked, after which the share falls to a floor and never to zero; and a cumulative sum of log-likelihood ratios
(Wald's sequential test, restarted at zero as in Page's CUSUM, so that a long good record buys no lies) that bans.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from daaswarm.types import ModelRoot, PeerId

PROBATION = 32  # audited calls, all right, before fewer are checked
TRUST_CALLS = 8  # after which the share above the floor has halved, beyond probation
HALF_LIFE_S = 7 * 86_400.0  # of what is remembered
LIE_SHARE = 0.05  # of its answers that a liar is taken to falsify, to be told from an honest host
BAN_AT = math.log(1e6)  # an honest host is banned with a probability of one in a million, at most
BAN_S = 30 * 86_400.0  # then it is on probation again
ENTRIES = 4_096  # peers and models remembered; those heard of last

EXACT = 4e-9  # how often the check by sketches fails an honest answer: four stages
COMPARED = 1e-6  # the same where answers were compared with what was computed here
REFUSED = 5e-3  # how often an honest host doesn't open a call that it computed


class Standing(msgspec.Struct, kw_only=True):
    """What is known of a peer for a model.

    Attributes:
        passed, failed: audited calls; they decay.
        suspicion: the sum of log-likelihood ratios, at least 0.
        updated_at: when the counts were decayed last.
        banned_at: 0 while it isn't.
        reason: why it was banned, or what failed last.
    """

    peer_id: PeerId
    model_root: ModelRoot
    passed: float = 0.0
    failed: float = 0.0
    suspicion: float = 0.0
    updated_at: float = 0.0
    banned_at: float = 0.0
    reason: str = ""

    @property
    def trust(self) -> float:
        """The mean of the Beta distribution that begins at Beta(1, 1)."""
        return (1 + self.passed) / (2 + self.passed + self.failed)


def is_banned(standing: Standing, now: float) -> bool:
    """Whether the ban holds."""
    return standing.banned_at > 0 and now - standing.banned_at < BAN_S


class Noted(NamedTuple):
    """``is_ban``: this is what got the peer banned."""

    standing: Standing
    is_ban: bool


class Reputation:
    """All standings of one node.

    Args:
        standings: of an earlier run.
    """

    def __init__(self, standings: Iterable[Standing] = ()) -> None:
        self._known = {(each.peer_id, each.model_root): each for each in standings}
        self._changed: set[tuple[PeerId, ModelRoot]] = set()

    def get_rate(self, peer: PeerId, model: ModelRoot, floor: float, now: float) -> float:
        """The share of this peer's calls to check, at least ``floor``."""
        known = self._known.get((peer, model))
        if known is None:
            return 1.0
        self._decay(known, now)
        beyond = known.passed - PROBATION
        if beyond < 0 or known.suspicion > 0:
            return 1.0
        return max(floor, 2 ** (-beyond / TRUST_CALLS))

    def note(
        self, peer: PeerId, model: ModelRoot, now: float, *, right: bool, false_alarm: float, why: str = ""
    ) -> Noted:
        """One call was audited.

        Args:
            false_alarm: how often such an audit fails an honest host.
            why: what failed.
        """
        key = peer, model
        known = self._known.setdefault(key, Standing(peer_id=peer, model_root=model, updated_at=now))
        self._decay(known, now)
        self._changed.add(key)
        if right:
            known.passed += 1
            known.suspicion = max(0.0, known.suspicion + math.log((1 - LIE_SHARE) / (1 - false_alarm)))
            return Noted(known, False)
        known.failed += 1
        known.suspicion += math.log(LIE_SHARE / false_alarm)
        known.reason = why
        is_ban = known.suspicion >= BAN_AT and not known.banned_at
        if is_ban:
            known.banned_at = now
        self._trim()
        return Noted(known, is_ban)

    def get_banned(self, now: float) -> dict[PeerId, Standing]:
        """Who isn't asked: a peer that lied about one model is believed about none."""
        banned: dict[PeerId, Standing] = {}
        for known in self._known.values():
            if known.banned_at and not is_banned(known, now):
                known.banned_at, known.suspicion, known.passed, known.failed = 0.0, 0.0, 0.0, 0.0
                self._changed.add((known.peer_id, known.model_root))
            if known.banned_at:
                banned[known.peer_id] = known
        return banned

    def forgive(self, peer: PeerId) -> bool:
        """Forget what a peer did; whether there was anything. It is on probation then."""
        keys = [key for key in self._known if key[0] == peer]
        for key in keys:
            self._known[key] = Standing(peer_id=key[0], model_root=key[1])
            self._changed.add(key)
        return bool(keys)

    def get_standings(self, now: float) -> list[Standing]:
        """All that is known, the least trusted first."""
        for known in self._known.values():
            self._decay(known, now)
        return sorted(self._known.values(), key=lambda known: (not known.banned_at, known.trust, known.peer_id))

    def take_changed(self) -> list[Standing]:
        """What changed since the last time, to be written down."""
        changed, self._changed = self._changed, set()
        return [self._known[key] for key in changed if key in self._known]

    def mark_changed(self, keys: Iterable[tuple[PeerId, ModelRoot]]) -> None:
        """:meth:`take_changed` gives these again."""
        self._changed.update(keys)

    def _decay(self, known: Standing, now: float) -> None:
        passed_s = now - known.updated_at
        if passed_s > 0:
            left = 0.5 ** (passed_s / HALF_LIFE_S)
            known.passed *= left
            known.failed *= left
        known.updated_at = now

    def _trim(self) -> None:
        while len(self._known) > ENTRIES:
            oldest = min(self._known, key=lambda key: self._known[key].updated_at)
            del self._known[oldest]
            self._changed.discard(oldest)
