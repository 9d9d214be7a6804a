"""Whether others can dial this node: what peers that tried say, weighed. Sans-IO; ``now`` in s, monotonic."""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Collection, Iterable
from typing import Literal

import msgspec

Verdict = Literal["unknown", "reachable", "unreachable"]

ASKED = 3  # peers that are asked at once; of different origins, so that no one machine decides
AGREEING = 2  # peers of different origins that must have reached an address that this machine does not have itself
ORIGINS = 16  # whose words are kept
VOTE_S = 45 * 60.0  # a word counts; longer than two rounds, so that one round without answers changes nothing
RECHECK_S = 15 * 60.0  # between two rounds when the verdict is known; routers and firewalls change seldom
RETRY_S = 20.0  # when it isn't: peers come one by one after a start


class Sight(enum.IntEnum):
    """From where a peer sees this node. Only the words of the farthest count: the others say nothing of the world. An
    own address of the internet is as far as the other side of a NAT: else one peer that made a NAT up would outweigh
    all the others."""

    SAME_MACHINE = 0
    OWN_ADDRESS = 1
    OWN_PUBLIC = 2  # of the internet's: nothing translates
    BEYOND_NAT = 3  # at an address that this machine doesn't have: something between translates

    @property
    def distance(self) -> int:
        return min(self, Sight.OWN_PUBLIC)


class Vote(msgspec.Struct, frozen=True):
    """``open_ports``: where this node answered at ``host``."""

    host: str
    open_ports: frozenset[int]
    sight: Sight
    at: float


class Reachability:
    """Collects what peers say of one node."""

    def __init__(self) -> None:
        self._votes: dict[str, Vote] = {}  # by the peer's origin, oldest first
        self._checked_at = float("-inf")

    def note(self, origin: str, host: str, ports: Iterable[int], own_hosts: Collection[str], now: float) -> None:
        """A peer at ``origin`` saw this node at ``host`` and reached it at ``ports`` (none: it could not)."""
        self._votes.pop(origin, None)
        self._votes[origin] = Vote(host, frozenset(ports), get_sight(host, own_hosts), now)
        while len(self._votes) > ORIGINS:
            del self._votes[next(iter(self._votes))]

    def clear(self) -> None:
        """This machine's addresses changed: nothing that was said holds any more."""
        self._votes.clear()
        self._checked_at = float("-inf")

    def note_round(self, now: float) -> None:
        """Peers were asked."""
        self._checked_at = now

    def is_due(self, now: float) -> bool:
        """Whether to ask (again)."""
        return now - self._checked_at >= (RETRY_S if self.get_verdict(now) == "unknown" else RECHECK_S)

    def choose(self, origins: Iterable[tuple[str, Sight | None]], now: float) -> list[str]:
        """Whom to ask, at most :data:`ASKED`: the farthest first, then those that said nothing yet.

        Args:
            origins: of the peers that could be asked, with how they see this node as far as that is known.
        """
        best: dict[str, int] = {}
        for origin, sight in origins:
            best[origin] = max(best.get(origin, 0), sight.distance if sight is not None else 0)
        order = sorted(best, key=lambda o: (-best[o], self._votes[o].at if o in self._votes else float("-inf")))
        return order[:ASKED]

    def get_verdict(self, now: float) -> Verdict:
        votes = self._get_counted(now)
        if not votes:
            return "unknown"
        if self.get_verified(now):
            return "reachable"
        if self.is_beyond_nat(now):
            return "unreachable" if any(not vote.open_ports for vote in votes) else "unknown"
        reached = sum(bool(vote.open_ports) for vote in votes if vote.sight is not Sight.BEYOND_NAT)
        return "reachable" if 2 * reached > len(votes) else "unreachable"

    def is_beyond_nat(self, now: float) -> bool:
        """Whether most peers see this node at an address that this machine doesn't have."""
        votes = self._get_counted(now)
        return 2 * sum(vote.sight is Sight.BEYOND_NAT for vote in votes) > len(votes)

    def get_verified(self, now: float) -> list[tuple[str, int]]:
        """Addresses that this machine doesn't have itself, at which enough peers reached it: a forwarded port. One peer
        alone could make a node announce, and others dial, whatever address it likes."""
        votes = [vote for vote in self._get_counted(now) if vote.sight is Sight.BEYOND_NAT]
        counts: dict[tuple[str, int], int] = {}
        for vote in votes:
            for port in vote.open_ports:
                counts[vote.host, port] = counts.get((vote.host, port), 0) + 1
        return sorted(a for a, count in counts.items() if count >= AGREEING and 2 * count > len(votes))

    def get_hosts(self, now: float) -> list[str]:
        """The addresses at which peers see this node, newest first."""
        return list(dict.fromkeys(vote.host for vote in reversed(self._get_counted(now))))

    def validate(self) -> None:
        """Asserts the invariants."""
        assert len(self._votes) <= ORIGINS

    def _get_counted(self, now: float) -> list[Vote]:
        votes = [vote for vote in self._votes.values() if now - vote.at < VOTE_S]
        farthest = max((vote.sight.distance for vote in votes), default=0)
        return [vote for vote in votes if vote.sight.distance == farthest]


def get_sight(host: str, own_hosts: Collection[str]) -> Sight:
    """How a peer that sees this node at ``host`` stands to it. Args: ``own_hosts``: this machine's IP addresses."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return Sight.OWN_ADDRESS if host in own_hosts else Sight.BEYOND_NAT
    if address.is_loopback:
        return Sight.SAME_MACHINE
    if host not in own_hosts:
        return Sight.BEYOND_NAT
    return Sight.OWN_PUBLIC if address.is_global else Sight.OWN_ADDRESS
