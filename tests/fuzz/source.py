"""Decisions drawn from bytes, the same way for Hypothesis and for a coverage-guided fuzzer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Source:
    """Reads ``data`` from front to back; past its end everything is 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def is_empty(self) -> bool:
        return self._at >= len(self._data)

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes, or fewer."""
        part = self._data[self._at : self._at + count]
        self._at += count
        return part

    def number(self, size: int = 1) -> int:
        return int.from_bytes(self.take(size), "big")

    def choose(self, options: Sequence[T]) -> T:
        return options[self.number() % len(options)]

    def rest(self) -> bytes:
        return self.take(len(self._data))

    def damage(self, data: bytes) -> bytes:
        """``data`` with a few changes: bits flipped, bytes put in or left out, cut off."""
        damaged = bytearray(data)
        for _ in range(self.number() % 5):
            at = self.number(2) % (len(damaged) + 1)
            how = self.number() % 4
            if how == 0 and at < len(damaged):
                damaged[at] ^= self.number() or 1
            elif how == 1:
                damaged[at:at] = self.take(self.number() % 8)
            elif how == 2:
                del damaged[at : at + self.number() % 8]
            elif how == 3:
                del damaged[at:]
        return bytes(damaged)
