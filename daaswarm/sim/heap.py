"""Simulated time: what happens next, in order, the earlier scheduled first among equals."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any

START = 1_800_000_000.0  # Unix time at which every simulation begins


class Heap:
    """Attributes:

    now: Unix time, s.
    events: how many have happened.
    """

    __slots__ = ("_entries", "_pushed", "events", "now")

    def __init__(self) -> None:
        self.now = START
        self.events = 0
        self._pushed = count().__next__
        self._entries: list[tuple[float, int, Callable[[Any, Any], object], Any, Any]] = []

    def at(self, when: float, act: Callable[[Any, Any], object], a: Any = None, b: Any = None) -> None:
        """``act(a, b)`` happens at ``when`` (Unix, s)."""
        heapq.heappush(self._entries, (when, self._pushed(), act, a, b))

    def run(self, until: float) -> None:
        """Everything up to that time, which it is then."""
        entries, pop = self._entries, heapq.heappop
        events = 0
        while entries and entries[0][0] <= until:
            self.now, _, act, a, b = pop(entries)
            act(a, b)
            events += 1
        self.events += events
        self.now = until
