"""How many bytes a message takes on the wire, without encoding it: a simulation passes objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from daaswarm.messages import (
    Adverts,
    Contact,
    Doubt,
    Doubted,
    ExpertReply,
    FindNode,
    FindValue,
    Found,
    Ping,
    Pong,
    PullAdverts,
    Pulled,
    PushAdverts,
    Pushed,
    Signed,
    Store,
    Stored,
    encode,
)

FRAME_BYTES = 16  # daaswarm.net.frames.HEAD
ENVELOPE_BYTES = 22 + 40  # a TLS 1.3 record; headers of TCP and IP of the first packet
SIGNED_BYTES = len(encode(Signed(public_key=bytes(32), signature=bytes(64), payload=bytes(300)))) - 300

_KEY = bytes(32)
_FOUND = len(encode(Found()))
_FIND_NODE = len(encode(FindNode(target=_KEY)))
_FIND_KEY = len(encode(FindValue(key=_KEY)))
_FIND_PLACE = len(encode(FindValue(key=_KEY, place=_KEY)))
_LISTS = 24  # names and lengths of lists that aren't empty, roughly


def get_size(message: Any, contact_bytes: int) -> int:
    """Bytes of a message and what surrounds it, without bodies. ``contact_bytes``: of one contact in it."""
    measure = _MEASURES.get(type(message))
    size = measure(message, contact_bytes) if measure is not None else len(encode(message))
    return size + FRAME_BYTES + ENVELOPE_BYTES


def get_contact_bytes(contact: Contact) -> int:
    """Of one contact in a list."""
    return len(encode(contact))


def _sum(signed: Iterable[Signed]) -> int:
    return sum(SIGNED_BYTES + len(each.payload) for each in signed)


_MEASURES: dict[type, Callable[[Any, int], int]] = {
    Found: lambda m, c: _FOUND + (_LISTS if m.contacts or m.records else 0) + c * len(m.contacts) + _sum(m.records),
    FindNode: lambda m, c: _FIND_NODE,
    FindValue: lambda m, c: _FIND_KEY if m.place is None else _FIND_PLACE,
    Store: lambda m, c: _LISTS + _sum(m.records),
    Stored: lambda m, c: _LISTS + 40 * len(m.refused),
    Ping: lambda m, c: 9,
    Pong: lambda m, c: 9 + len(m.near),
    Doubt: lambda m, c: _LISTS + len(m.about),
    Doubted: lambda m, c: _LISTS + len(m.alive),
    PullAdverts: lambda m, c: 120 + len(m.have),
    Pulled: lambda m, c: _LISTS + _sum(m.adverts) + len(m.wanted) + len(m.down),
    PushAdverts: lambda m, c: _LISTS + _sum(m.adverts),
    Pushed: lambda m, c: _LISTS + 66 * len(m.unwanted),
    Adverts: lambda m, c: _LISTS + _sum(m.adverts),
    ExpertReply: lambda m, c: 60,
}
