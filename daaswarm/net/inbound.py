"""What all connections of a node may hold together: unfinished bodies in bytes, and calls being served."""

from __future__ import annotations

import threading
from collections.abc import Callable

from daaswarm.limits import CALLS_PER_HOST, INBOUND_BYTES, INBOUND_BYTES_PER_PEER, WINDOW_BYTES


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

    Of the shared half one peer may hold ``limit_peer_bytes``: beyond, its bodies are refused or wait, while others' are
    let in. The bytes of a call count until it is answered.
    """

    def __init__(
        self,
        limit_bytes: int = INBOUND_BYTES,
        limit_calls: int = CALLS_PER_HOST,
        limit_peer_bytes: int = INBOUND_BYTES_PER_PEER,
    ) -> None:
        self._lock = threading.Lock()
        self._limit_bytes = limit_bytes
        self._limit_calls = limit_calls
        self._limit_peer_bytes = limit_peer_bytes
        self._by_peer: dict[str, int] = {}  # used and reserved
        self._waiting: dict[InboundBody, tuple[Callable[[], None], str]] = {}  # in the order in which they began
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

    def charge(self, size: int, body: InboundBody | None = None, peer: str = "") -> bool:
        """Count ``size`` bytes that arrived from ``peer``; ``False`` (and nothing counted) when they don't fit."""
        with self._lock:
            expected = min(size, body.reserved) if body is not None else 0
            limit = self._limit_bytes if expected else self._limit_bytes // 2
            if self.used_bytes + size > limit:
                return False
            if not expected and self._by_peer.get(peer, 0) + size > self._limit_peer_bytes:
                return False
            if body is not None and expected:
                body.reserved -= expected
                self.reserved_bytes -= expected
            self.used_bytes += size
            self._hold(peer, size - expected)
            return True

    def release(self, size: int, peer: str = "") -> None:
        """Give back charged bytes and wake whoever waits for a window."""
        with self._lock:
            self.used_bytes -= size
            self._hold(peer, -size)
            following = self._get_following()
        for wake in following:
            wake()

    def may_grant(self, body: InboundBody, wake: Callable[[], None], peer: str = "") -> bool:
        """May ``body`` be sent another window? If not, ``wake`` is called (from any thread) when it's worth asking."""
        following: list[Callable[[], None]] = []
        with self._lock:
            wanted = self.used_bytes + self.reserved_bytes + WINDOW_BYTES
            granted = roomy = wanted <= self._limit_bytes // 2 and self._has_room(peer)
            if roomy and self._waiting:
                self._waiting.pop(body, None)
                following = self._get_following()
            elif not roomy:
                self._waiting.setdefault(body, (wake, peer))  # the first stays first until it's complete
                granted = next(iter(self._waiting)) is body and wanted <= self._limit_bytes
            if granted:
                body.reserved += WINDOW_BYTES
                self.reserved_bytes += WINDOW_BYTES
                self._hold(peer, WINDOW_BYTES)
        for wake_following in following:
            wake_following()
        return granted

    def forget(self, body: InboundBody, peer: str = "") -> None:
        """``body`` wants no more windows: it's complete or abandoned."""
        with self._lock:
            self.reserved_bytes -= body.reserved
            self._hold(peer, -body.reserved)
            body.reserved = 0
            self._waiting.pop(body, None)
            following = self._get_following()
        for wake in following:
            wake()

    def _has_room(self, peer: str) -> bool:
        return self._by_peer.get(peer, 0) + WINDOW_BYTES <= self._limit_peer_bytes

    def _get_following(self) -> list[Callable[[], None]]:
        """Who may be granted something now: the first in line, and the first whose peer holds less than its share."""
        found: list[Callable[[], None]] = []
        for wake, peer in self._waiting.values():
            if self._has_room(peer):
                return [*found, wake]
            if not found:
                found.append(wake)
        return found

    def _hold(self, peer: str, size: int) -> None:
        held = self._by_peer.get(peer, 0) + size
        if held:
            self._by_peer[peer] = held
        else:
            self._by_peer.pop(peer, None)
