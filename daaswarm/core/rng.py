"""The part of ``random.Random`` that the core uses. The caller makes, seeds and owns the generator."""

from __future__ import annotations

from typing import Protocol


class Rng(Protocol):
    """``random.Random`` fits; so does ``random.SystemRandom``."""

    def random(self) -> float: ...

    def getrandbits(self, k: int, /) -> int: ...
