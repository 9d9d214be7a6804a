"""Peers in few bytes: what membership messages carry instead of PeerIds of 52 letters."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

from daaswarm.core.memo import memo
from daaswarm.types import PeerId

MARK_MAX = (1 << 63) - 1
_SEQ_MAX = (1 << 64) - 1


@memo(65_536)
def get_mark(peer: PeerId | str) -> int:
    """63 bits of a hash of the PeerId. Two peers share one by accident once in a swarm of billions, and whoever makes
    two keys with one mark only hides one of its own behind the other: a stranger's can't be met in 2^63 tries."""
    return int.from_bytes(hashlib.blake2b(peer.encode(), digest_size=8).digest(), "big") >> 1


def pack_marks(marks: Iterable[int]) -> bytes:
    """8 bytes each, big-endian."""
    return b"".join(mark.to_bytes(8, "big") for mark in marks)


def unpack_marks(data: bytes) -> list[int]:
    """The inverse of :func:`pack_marks`; an incomplete one at the end is ignored."""
    return [mark for (mark,) in struct.iter_unpack(">Q", data[: len(data) // 8 * 8])]


def pack_versions(versions: Iterable[tuple[int, int]]) -> bytes:
    """(mark, seq), 16 bytes each, big-endian; a seq beyond u64 counts as the highest."""
    numbers = [number for mark, seq in versions for number in (mark, min(seq, _SEQ_MAX))]
    return struct.pack(f">{len(numbers)}Q", *numbers)


def unpack_versions(data: bytes) -> list[tuple[int, int]]:
    """The inverse of :func:`pack_versions`; an incomplete one at the end is ignored."""
    return list(struct.iter_unpack(">QQ", data[: len(data) // 16 * 16]))
