"""The part of ``random.Random`` that the core uses. The caller makes, seeds and owns the generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Rng(Protocol):
    """``random.Random`` fits; so does ``random.SystemRandom``."""

    def random(self) -> float: ...

    def getrandbits(self, k: int, /) -> int: ...


def pick(rng: Rng, items: Sequence[Item], count: int) -> list[Item]:
    """``count`` different ones of ``items`` (all, if there are no more), in random order."""
    if count >= len(items) or count > 8:
        rest = list(items)
        for i in range(min(count, len(rest))):
            j = i + int(rng.random() * (len(rest) - i))
            rest[i], rest[j] = rest[j], rest[i]
        return rest[:count]
    chosen: list[int] = []
    while len(chosen) < count:  # few of many: without a copy
        i = int(rng.random() * len(items))
        if i not in chosen:
            chosen.append(i)
    return [items[i] for i in chosen]
