from __future__ import annotations

import contextlib
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daaswarm.errors import RemoteProtocolError, TooLarge
from daaswarm.limits import CALL_BODY_BYTES, CHUNK_BYTES, CONTROL_BYTES
from daaswarm.net.frames import (
    HANDSHAKE_BYTES,
    HEAD,
    MAGIC,
    FrameParser,
    Kind,
    check_outgoing,
    encode_handshake,
    encode_head,
    get_parts,
)


def parse(data: bytes, *, handshake: bool = False) -> list:
    parser = FrameParser(handshake=handshake)
    parser.feed(data)
    frames = []
    while (frame := parser.next_frame()) is not None:
        frames.append(frame)
    return frames


def test_golden_bytes():
    head = encode_head(Kind.REQUEST, 7, deadline_ms=1500, header_bytes=3, body=5)
    assert head.hex() == "da0205dc" + "00000007" + "00000003" + "00000005"
    assert encode_handshake(b"hi").hex() == "da010000" + "00000000" + "00000002" + "00000000" + "6869"
    assert encode_head(Kind.WINDOW, 9, body=4 << 20).hex() == "da050000" + "00000009" + "00000000" + "00400000"
    [frame] = parse(head + b"abc" + b"12345")
    assert frame == (Kind.REQUEST, 7, 1500, b"abc", 5, bytearray(b"12345"))


@st.composite
def frames(draw) -> bytes:
    kind = draw(st.sampled_from([Kind.REQUEST, Kind.REPLY, Kind.BODY, Kind.WINDOW, Kind.CANCEL]))
    header = draw(st.binary(min_size=1, max_size=50)) if kind in (Kind.REQUEST, Kind.REPLY) else b""
    body = draw(st.binary(min_size=int(kind is Kind.BODY), max_size=200)) if kind < Kind.WINDOW else b""
    return (
        encode_head(
            kind,
            draw(st.integers(1, 2**32 - 1)),
            deadline_ms=draw(st.integers(1, 30_000)) if kind is Kind.REQUEST else 0,
            header_bytes=len(header),
            body=draw(st.integers(1, CALL_BODY_BYTES)) if kind is Kind.WINDOW else len(body),
        )
        + header
        + body
    )


@given(st.lists(frames(), max_size=6), st.data())
def test_any_split_gives_the_same_frames(parts, data):
    stream = b"".join(parts)
    whole = parse(stream)
    assert len(whole) == len(parts)
    parser, got = FrameParser(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        parser.feed(stream[:size])
        stream = stream[size:]
        while (frame := parser.next_frame()) is not None:
            got.append(frame)
    assert got == whole
    assert parser.buffered_bytes == 0


@given(st.binary(max_size=400), st.booleans())
def test_garbage_raises_nothing_but_the_named_error(data, handshake):
    with contextlib.suppress(RemoteProtocolError):
        parse(data, handshake=handshake)


heads = st.builds(
    HEAD.pack,
    st.sampled_from([MAGIC, MAGIC, MAGIC, 0]),
    st.integers(0, 8),
    st.integers(0, 2**16 - 1),
    st.integers(0, 3),
    st.sampled_from([0, 1, 10, CONTROL_BYTES, CONTROL_BYTES + 1, 2**32 - 1]),
    st.sampled_from([0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, CALL_BODY_BYTES, CALL_BODY_BYTES + 1, 2**32 - 1]),
)


@settings(max_examples=300)
@given(heads, st.booleans())
def test_no_head_makes_the_parser_want_more_than_a_frame(head, handshake):
    parser = FrameParser(handshake=handshake)
    parser.feed(head)
    try:
        parser.next_frame()
    except RemoteProtocolError:
        return
    assert parser._need <= HEAD.size + CONTROL_BYTES + CHUNK_BYTES
    if handshake:
        assert parser._need <= HEAD.size + HANDSHAKE_BYTES


@pytest.mark.parametrize(
    "head",
    [
        encode_head(Kind.REQUEST, 1, deadline_ms=1, header_bytes=CONTROL_BYTES + 1),
        encode_head(Kind.REQUEST, 1, deadline_ms=1, header_bytes=1, body=CALL_BODY_BYTES + 1),
        encode_head(Kind.REQUEST, 1, deadline_ms=0, header_bytes=1),
        encode_head(Kind.REQUEST, 1, deadline_ms=30_001, header_bytes=1),
        encode_head(Kind.REQUEST, 0, deadline_ms=1, header_bytes=1),
        encode_head(Kind.REPLY, 1, header_bytes=0, body=5),
        encode_head(Kind.BODY, 1, body=CHUNK_BYTES + 1),
        encode_head(Kind.BODY, 1, body=0),
        encode_head(Kind.CANCEL, 1, body=1),
        encode_handshake(b"x"),
    ],
)
def test_limits_are_checked_on_the_head(head):
    with pytest.raises(RemoteProtocolError):
        parse(head)


def test_a_declared_body_is_not_allocated():
    tracemalloc.start()
    parser = FrameParser()
    parser.feed(encode_head(Kind.REQUEST, 1, deadline_ms=1, header_bytes=CONTROL_BYTES, body=CALL_BODY_BYTES))
    assert parser.next_frame() is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_outgoing_limits_and_parts():
    with pytest.raises(TooLarge):
        check_outgoing(b"x" * (CONTROL_BYTES + 1), 0)
    with pytest.raises(TooLarge):
        check_outgoing(b"x", CALL_BODY_BYTES + 1)
    parts = get_parts([b"", memoryview(bytearray(8)).cast("f"), b"ab"])
    assert [len(part) for part in parts] == [8, 2]
