"""The frame codec, sans-IO.

A frame is a fixed 16-byte head, then a msgpack header, then body bytes::

    0      1     2          4        8                 12          16
    magic  kind  deadline   call id  header length     body
    u8     u8    u16 (ms)   u32      u32 (bytes)       u32         big-endian

``body`` means, by kind: of REQUEST and REPLY the length of the call's *whole* body, of which this frame carries the
first ``min(body, CHUNK_BYTES)``; of BODY the length of this chunk; of WINDOW the bytes granted. So a receiver knows
from the first head how much is to come, and a call that fits in one chunk is one frame.

Every cap is checked on the head, before anything that it announces is buffered.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

from daaswarm.errors import RemoteProtocolError, TooLarge
from daaswarm.limits import CALL_BODY_BYTES, CALL_S, CHUNK_BYTES, CONTROL_BYTES
from daaswarm.types import format_bytes

Buffer = bytes | bytearray | memoryview

MAGIC = 0xDA  # changes when an old peer could not read what follows
HEAD = struct.Struct(">BBHIII")
HEAD_BYTES = HEAD.size
MAX_DEADLINE_MS = int(CALL_S * 1000)
HANDSHAKE_BYTES = 4096  # of a handshake message; ours take 300


class Kind(IntEnum):
    HANDSHAKE = 1
    REQUEST = 2
    REPLY = 3
    BODY = 4
    WINDOW = 5
    CANCEL = 6


class Frame(NamedTuple):
    """One received frame. ``body`` is the frame's own bytes, in memory of its own, writable."""

    kind: Kind
    call: int
    deadline_ms: int
    header: bytes
    total: int  # the head's ``body`` field
    body: bytearray


_KINDS: dict[int, Kind] = {int(kind): kind for kind in Kind}
_EMPTY = b""


def get_size(buffers: Iterable[Buffer]) -> int:
    """Bytes in ``buffers``, which must be contiguous byte buffers."""
    return sum(map(len, buffers))


def get_parts(body: Sequence[Buffer]) -> list[Buffer]:
    """The non-empty parts of a body, memoryviews of other formats cast to bytes without copying."""
    parts: list[Buffer] = []
    for part in body:
        if isinstance(part, memoryview) and (part.ndim != 1 or part.itemsize != 1):
            part = part.cast("B")
        if len(part):
            parts.append(part)
    return parts


def encode_head(kind: Kind, call: int, *, deadline_ms: int = 0, header_bytes: int = 0, body: int = 0) -> bytes:
    return HEAD.pack(MAGIC, kind, deadline_ms, call, header_bytes, body)


def encode_handshake(header: bytes) -> bytes:
    return encode_head(Kind.HANDSHAKE, 0, header_bytes=len(header)) + header


def check_outgoing(header: bytes, body_bytes: int) -> None:
    """Refuse to send what every peer would refuse to receive.

    Raises:
        TooLarge: the header or the body is over its limit.
    """
    if len(header) > CONTROL_BYTES:
        raise TooLarge(f"a message of {format_bytes(len(header))} is over the limit of {format_bytes(CONTROL_BYTES)}")
    if body_bytes > CALL_BODY_BYTES:
        raise TooLarge(
            f"a body of {format_bytes(body_bytes)} is over the limit of {format_bytes(CALL_BODY_BYTES)} a call",
            hint="send fewer rows per call",
        )


class FrameParser:
    """Bytes in, frames out. Holds at most one unfinished frame and what was fed last.

    A parser that raised stays broken: the stream can't be resynchronised.
    """

    def __init__(self, *, handshake: bool = False) -> None:
        self.handshake = handshake  # until it is done, nothing but small HANDSHAKE frames is let in
        self._buffer = bytearray()
        self._head: tuple[Kind, int, int, int, int] | None = None  # kind, deadline, call, header bytes, body field
        self._need = HEAD_BYTES
        self.frames = 0  # whole ones that were taken

    @property
    def buffered_bytes(self) -> int:
        return len(self._buffer)

    def take_rest(self) -> bytes:
        """What was fed after the last frame; for whoever parses on."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def feed(self, data: Buffer) -> None:
        self._buffer += data

    def next_frame(self) -> Frame | None:
        """The next whole frame; ``None`` when more bytes are needed.

        Raises:
            RemoteProtocolError: the bytes are not a frame, or one over a limit.
        """
        buffer = self._buffer
        if len(buffer) < self._need:
            return None
        if self._head is None:
            self._head = head = _check_head(HEAD.unpack_from(buffer), self.handshake)
            self._need = HEAD_BYTES + head[3] + _get_carried(head[0], head[4])
            if len(buffer) < self._need:
                return None
        kind, deadline_ms, call, header_bytes, total = self._head
        need, self._need, self._head = self._need, HEAD_BYTES, None
        split = HEAD_BYTES + header_bytes
        header = bytes(buffer[HEAD_BYTES:split]) if header_bytes else _EMPTY
        body = buffer[split:need]
        del buffer[:need]
        self.frames += 1
        return Frame(kind, call, deadline_ms, header, total, body)


def _get_carried(kind: Kind, body: int) -> int:
    """Body bytes in the frame itself."""
    if kind is Kind.REQUEST or kind is Kind.REPLY:
        return min(body, CHUNK_BYTES)
    return body if kind is Kind.BODY else 0


def _check_head(head: tuple[int, ...], handshake: bool) -> tuple[Kind, int, int, int, int]:
    magic, number, deadline_ms, call, header_bytes, body = head
    kind = _KINDS.get(number)
    if magic != MAGIC or kind is None:
        raise RemoteProtocolError(
            f"bytes that are not a frame (magic 0x{magic:02x}, kind {number})",
            hint="the peer runs another version, or isn't daaswarm",
        )
    if handshake != (kind is Kind.HANDSHAKE):
        state = "before the handshake was done" if handshake else "after the handshake"
        raise RemoteProtocolError(f"a {kind.name} frame {state}")
    if header_bytes > (HANDSHAKE_BYTES if handshake else CONTROL_BYTES):
        raise RemoteProtocolError(f"a {kind.name} frame with a header of {format_bytes(header_bytes)}, over the limit")
    if body > (CHUNK_BYTES if kind is Kind.BODY else CALL_BODY_BYTES):
        raise RemoteProtocolError(f"a {kind.name} frame announces {format_bytes(body)}, over the limit")
    has_header = kind in (Kind.HANDSHAKE, Kind.REQUEST, Kind.REPLY)
    has_body = kind in (Kind.BODY, Kind.WINDOW)
    if (
        has_header != (header_bytes > 0)
        or (has_body and body == 0)
        or (kind in (Kind.CANCEL, Kind.HANDSHAKE) and body)
        or (kind is Kind.HANDSHAKE) != (call == 0)
        or (kind is Kind.REQUEST) != (deadline_ms > 0)
        or deadline_ms > MAX_DEADLINE_MS
    ):
        raise RemoteProtocolError(
            f"a {kind.name} frame with impossible fields "
            f"(call {call}, deadline {deadline_ms} ms, header {header_bytes} B, body {body} B)"
        )
    return kind, deadline_ms, call, header_bytes, body
