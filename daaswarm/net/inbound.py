"""What all connections of a node may hold together: unfinished bodies in bytes, and calls being served."""

from __future__ import annotations

import threading
from collections.abc import Callable

from daaswarm.limits import CALLS_PER_HOST, INBOUND_BYTES, WINDOW_BYTES


class InboundBody:
    """A body on its way in, as the budget sees it: ``reserved`` bytes were granted and haven't arrived."""

    __slots__ = ("reserved",)

    def __init__(self) -> None:
        self.reserved = 0


class InboundBudget:
    """Counts bytes when they arrive, never when they are announced. Thread-safe; one per node.

    First windows, which nobody has to ask for, and further ones share half of the limit. The other half is for the
    one body that has waited longest for a window: it can always be completed, so that half-received bodies never wait
    for each other.
    """

    def __init__(self, limit_bytes: int = INBOUND_BYTES, limit_calls: int = CALLS_PER_HOST) -> None:
        self._lock = threading.Lock()
        self._limit_bytes = limit_bytes
        self._limit_calls = limit_calls
        self._waiting: dict[InboundBody, Callable[[], None]] = {}  # in the order in which they began to wait
        self.used_bytes = 0
        self.reserved_bytes = 0
        self.calls = 0

    def add_call(self) -> bool:
        """Count one more served call; ``False`` when the node is full."""
        with self._lock:
            if self.calls >= self._limit_calls:
                return False
            self.calls += 1
            return True

    def end_call(self) -> None:
        with self._lock:
            self.calls -= 1

    def charge(self, size: int, body: InboundBody | None = None) -> bool:
        """Count ``size`` arrived bytes; ``False`` (and nothing counted) when they don't fit."""
        with self._lock:
            expected = min(size, body.reserved) if body is not None else 0
            limit = self._limit_bytes if expected else self._limit_bytes // 2
            if self.used_bytes + size > limit:
                return False
            if body is not None and expected:
                body.reserved -= expected
                self.reserved_bytes -= expected
            self.used_bytes += size
            return True

    def release(self, size: int) -> None:
        """Give back charged bytes and wake whoever waits for a window."""
        with self._lock:
            self.used_bytes -= size
            first = next(iter(self._waiting.values())) if self._waiting else None
        if first is not None:
            first()

    def may_grant(self, body: InboundBody, wake: Callable[[], None]) -> bool:
        """May ``body`` be sent another window? If not, ``wake`` is called (from any thread) when it's worth asking."""
        following = None
        with self._lock:
            wanted = self.used_bytes + self.reserved_bytes + WINDOW_BYTES
            granted = roomy = wanted <= self._limit_bytes // 2
            if roomy and self._waiting:
                self._waiting.pop(body, None)
                following = next(iter(self._waiting.values()), None)
            elif not roomy:
                self._waiting.setdefault(body, wake)  # the first stays first until it's complete
                granted = next(iter(self._waiting)) is body and wanted <= self._limit_bytes
            if granted:
                body.reserved += WINDOW_BYTES
                self.reserved_bytes += WINDOW_BYTES
        if following is not None:
            following()
        return granted

    def forget(self, body: InboundBody) -> None:
        """``body`` wants no more windows: it's complete or abandoned."""
        with self._lock:
            self.reserved_bytes -= body.reserved
            body.reserved = 0
            self._waiting.pop(body, None)
            first = next(iter(self._waiting.values())) if self._waiting else None
        if first is not None:
            first()
