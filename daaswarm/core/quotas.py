"""How much each peer may ask for: one token bucket a peer, in a table of bounded size."""

from __future__ import annotations

from collections import OrderedDict

from daaswarm.types import PeerId

PEERS = 4_096  # remembered; who is forgotten starts with a full bucket, and has been silent for longest


class Quotas:
    """Args:

    rate: units a second, for each peer.
    burst: units that a peer may use at once after a rest.
    """

    def __init__(self, rate: float, burst: float, *, peers: int = PEERS) -> None:
        self._rate = rate
        self._burst = burst
        self._limit = peers
        self._used: OrderedDict[PeerId, tuple[float, float]] = OrderedDict()  # units in use, and when

    def take(self, peer: PeerId, now: float, cost: float = 1.0) -> float:
        """0.0 if granted; else nothing is taken, and the peer should wait for so many seconds. A cost beyond the burst
        takes all of it."""
        used = self._get_used(peer, now) + min(cost, self._burst)
        if used > self._burst:
            return (used - self._burst) / self._rate
        self._used.pop(peer, None)
        self._used[peer] = used, now
        if len(self._used) > self._limit:
            self._used.popitem(last=False)
        return 0.0

    def shift(self, by_s: float) -> None:
        """The clock was set by so much."""
        for peer, (used, at) in self._used.items():
            self._used[peer] = used, at + by_s

    def validate(self) -> None:
        """Asserts the invariants."""
        assert len(self._used) <= self._limit

    def _get_used(self, peer: PeerId, now: float) -> float:
        used, at = self._used.get(peer, (0.0, now))
        return max(used - max(now - at, 0.0) * self._rate, 0.0)
