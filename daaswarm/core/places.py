"""Where records of a key are kept: near the key, and near other points that follow from it.

Whoever makes PeerIds until enough of them lie near a key could hide that key if it had one place alone. The others
are looked up at the same time, by paths that share no peer.
"""

from __future__ import annotations

import hashlib

from daaswarm.core.memo import memo

SIDE_PLACES = 2  # beside the key itself; a lookup has a path to each


@memo(8_192)
def get_places(key: bytes) -> tuple[bytes, ...]:
    """The 32 byte places of a key: first the key itself, then SHA-256("daaswarm/place/1", number, key)."""
    sides = (hashlib.sha256(b"daaswarm/place/1" + bytes([i]) + key).digest() for i in range(1, SIDE_PLACES + 1))
    return (key, *sides)


def get_replicas(k: int, place: int) -> int:
    """How many peers keep a record at place number ``place``: k near the key, half as many near each other."""
    return k if place == 0 else max(k // 2, 1)
