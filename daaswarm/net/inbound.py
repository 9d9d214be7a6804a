"""What all connections of a node may hold together: unfinished bodies in bytes, and calls being served."""

from __future__ import annotations

import threading
from collections.abc import Callable

from daaswarm.limits import CALLS_PER_HOST, INBOUND_BYTES, WINDOW_BYTES


class InboundBudget:
    """Counts bytes when they arrive, never when they are announced. Thread-safe; one per node.

    Windows are granted freely below half of the limit, so that what was granted already still fits. Above it, only
    the call that has waited longest is granted more: several half-received bodies must not wait for each other.
    """

    def __init__(self, limit_bytes: int = INBOUND_BYTES, limit_calls: int = CALLS_PER_HOST) -> None:
        self._lock = threading.Lock()
        self._limit_bytes = limit_bytes
        self._limit_calls = limit_calls
        self._waiting: dict[object, Callable[[], None]] = {}  # in the order in which they began to wait
        self.used_bytes = 0
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

    def charge(self, size: int) -> bool:
        """Count ``size`` arrived bytes; ``False`` (and nothing counted) when they don't fit."""
        with self._lock:
            if self.used_bytes + size > self._limit_bytes:
                return False
            self.used_bytes += size
            return True

    def release(self, size: int) -> None:
        """Give back charged bytes and wake whoever waits for a window."""
        with self._lock:
            self.used_bytes -= size
            first = next(iter(self._waiting.values())) if self._waiting else None
        if first is not None:
            first()

    def may_grant(self, call: object, wake: Callable[[], None]) -> bool:
        """May ``call`` be sent another window? If not, ``wake`` is called (from any thread) when it's worth asking."""
        following = None
        with self._lock:
            roomy = self.used_bytes + WINDOW_BYTES <= self._limit_bytes // 2
            if roomy:
                if self._waiting:
                    self._waiting.pop(call, None)
                    following = next(iter(self._waiting.values()), None)
                granted = True
            else:
                self._waiting.setdefault(call, wake)  # the first stays first until its body is complete
                first = next(iter(self._waiting)) is call
                granted = first and self.used_bytes + WINDOW_BYTES <= self._limit_bytes
        if following is not None:
            following()
        return granted

    def forget(self, call: object) -> None:
        """``call`` wants no more windows: its body is complete or abandoned."""
        with self._lock:
            if self._waiting.pop(call, None) is None or not self._waiting:
                return
            wake = next(iter(self._waiting.values()))
        wake()
