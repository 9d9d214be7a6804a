"""How fast a node may send: a token bucket of bytes."""

from __future__ import annotations

BURST_S = 1.0  # of the rate may be sent at once after a rest
KEPT_SHARE = 0.5  # of a burst that what can wait leaves to what can't


class TokenBucket:
    """Sent until any moment ``t`` after the first :meth:`take`: at most ``rate x (t + BURST_S)`` bytes.

    Args:
        rate: bytes per second.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._level = rate * BURST_S  # below zero: bytes that are promised but may not be sent yet
        self._at = float("-inf")

    def get_wait_s(self, size: float, now: float) -> float:
        """How long ``size`` bytes would have to wait if they were taken ``now`` (monotonic, s)."""
        return max((size - self._get_level(now)) / self.rate, 0.0)

    def take(self, size: int, now: float) -> float:
        """Claim ``size`` bytes; returns how many seconds to wait before sending them."""
        wait_s = self.get_wait_s(size, now)
        self._level = self._get_level(now) - size
        self._at = now
        return wait_s

    def get_spare_wait_s(self, size: int, now: float) -> float:
        """How long until :meth:`take_spare` gives ``size`` bytes in all if nothing else is taken."""
        return self.get_wait_s(size + self._get_kept(), now)

    def take_spare(self, size: int, now: float) -> int:
        """Claim of ``size`` bytes what leaves a part of a burst to others; returns how many. They may go at once."""
        spare = min(size, max(int(self._get_level(now) - self._get_kept()), 0))
        if spare:
            self.take(spare, now)
        return spare

    def give_back(self, size: int) -> None:
        """``size`` bytes that were taken are not sent after all."""
        self._level = min(self._level + size, self.rate * BURST_S)

    def _get_kept(self) -> float:
        return KEPT_SHARE * self.rate * BURST_S

    def _get_level(self, now: float) -> float:
        full = self.rate * BURST_S
        if self._at == float("-inf"):
            return full
        return min(self._level + max(now - self._at, 0.0) * self.rate, full)
