"""Simulated time: what happens next, in order, the earlier scheduled first among equals."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any

START = 1_800_000_000.0  # Unix time at which every simulation begins
SLOTS_PER_S = 32  # what is far off lies unsorted in slots, so that the heap stays small enough for a processor's cache

Entry = tuple[float, int, Callable[[Any, Any], object], Any, Any]


class Heap:
    """Attributes:

    now: Unix time, s.
    events: how many have happened.
    """

    __slots__ = ("_entries", "_pushed", "_slot", "_slots", "events", "now")

    def __init__(self) -> None:
        self.now = START
        self.events = 0
        self._pushed = count().__next__
        self._entries: list[Entry] = []  # of the slot that is now, a heap
        self._slot = int(START * SLOTS_PER_S)
        self._slots: dict[int, list[Entry]] = {}  # later ones

    def at(self, when: float, act: Callable[[Any, Any], object], a: Any = None, b: Any = None) -> None:
        """``act(a, b)`` happens at ``when`` (Unix, s)."""
        slot = int(when * SLOTS_PER_S)
        if slot <= self._slot:
            heapq.heappush(self._entries, (when, self._pushed(), act, a, b))
            return
        entries = self._slots.get(slot)
        if entries is None:
            self._slots[slot] = [(when, self._pushed(), act, a, b)]
        else:
            entries.append((when, self._pushed(), act, a, b))

    def run(self, until: float) -> None:
        """Everything up to that time, which it is then."""
        last = int(until * SLOTS_PER_S)
        pop = heapq.heappop
        events = 0
        while True:
            entries = self._entries
            while entries and entries[0][0] <= until:
                self.now, _, act, a, b = pop(entries)
                act(a, b)
                events += 1
            if self._slot >= last:
                break
            self._slot += 1
            self._entries = self._slots.pop(self._slot, [])
            heapq.heapify(self._entries)
        self.events += events
        self.now = until
