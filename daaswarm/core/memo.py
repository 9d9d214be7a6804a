"""Results remembered by the argument, for functions that are asked about the same few peers again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class _Memo(dict[Key, Value]):
    def __init__(self, compute: Callable[[Key], Value], limit: int) -> None:
        super().__init__()
        self._compute = compute
        self._limit = limit

    def __missing__(self, key: Key) -> Value:
        value = self._compute(key)
        if len(self) >= self._limit:
            self.clear()
        self[key] = value
        return value


def memo(limit: int) -> Callable[[Callable[[Key], Value]], Callable[[Key], Value]]:
    """Like ``functools.lru_cache`` for one argument, but all is forgotten at once when there are ``limit`` results: it
    keeps no order, which costs an LRU five times the memory accesses. What raises is not remembered."""

    def decorate(compute: Callable[[Key], Value]) -> Callable[[Key], Value]:
        return _Memo(compute, limit).__getitem__  # itself: a function around it would double the time

    return decorate
