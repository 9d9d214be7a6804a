"""Bytes of a peer become a message or a DecodeError, and nothing else."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daaswarm import messages
from daaswarm.messages import Failure, Found, Ping, Signed, Store

KINDS = [messages.Request, messages.Reply, messages.Handshake, messages.Pointer, messages.Advert]
DEEP = b"\x91" * 100_000 + b"\x00"
SAMPLES = [
    messages.encode(message)
    for message in (
        Ping(),
        Failure(code="a", message="b", hint="c"),
        Store(records=[Signed(public_key=bytes(32), signature=bytes(64), payload=b"x")]),
        Found(),
    )
]


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (messages.Request, b"\x82\xa1t\xa4ping\xa1x" + DEEP),
        (messages.Reply, b"\x82\xa1t\xa4pong\xa1x" + DEEP),
        (messages.Handshake, b"\x82\xa1t\xa5hello\xa1x" + DEEP),
        (messages.Advert, b"\x81\xa1x" + DEEP),
        (messages.Request, b"\x81\xa1t\xa1\xff"),
        (messages.Reply, b"\x82\xa1t\xa7failure\xa4code\xa1\xff"),
        (messages.Request, b""),
    ],
)
def test_bad_bytes_are_a_decode_error(kind, data):
    with pytest.raises(msgspec.DecodeError):
        messages.decode(kind, data)


@given(
    st.sampled_from(KINDS), st.sampled_from(SAMPLES), st.lists(st.tuples(st.integers(0, 300), st.binary(max_size=3)))
)
def test_damaged_messages_raise_nothing_else(kind, sample, damage):
    data = bytearray(sample)
    for at, inserted in damage:
        at %= len(data) + 1
        data[at : at + 1] = inserted
    with contextlib.suppress(msgspec.DecodeError):
        messages.decode(kind, bytes(data))


def test_what_is_right_is_decoded():
    assert messages.decode(messages.Request, SAMPLES[0]) == Ping()
    assert messages.get_decode(messages.Reply)(SAMPLES[3]) == Found()
