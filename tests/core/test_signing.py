"""Signatures hold for one purpose, one swarm and one payload; PeerIds and public keys are the same thing."""

from __future__ import annotations

import base58
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarm_driver import NOW, SWARM, make_key, make_peer

from daaswarm import messages
from daaswarm.core.signing import (
    CLOCK_SKEW_S,
    MAX_TTL_S,
    check_expiry,
    get_handshake_payload,
    get_peer_id,
    get_public_key,
    get_swarm_id,
    is_signed_by,
    open_signed,
    seal,
    sign,
)
from daaswarm.errors import ConfigError, RemoteProtocolError
from daaswarm.messages import Pointer, Signed

KEY = make_key(1)
PUBLIC = bytes(KEY.verify_key)
POINTER = Pointer(key=bytes(32), peer_id=make_peer(1), addrs=[], seq=1, expires_at=NOW + 60)


def test_peer_id_matches_libp2p() -> None:
    from libp2p.crypto.ed25519 import Ed25519PublicKey
    from libp2p.peer.id import ID

    expected = str(ID.from_pubkey(Ed25519PublicKey.from_bytes(PUBLIC)))
    assert get_peer_id(PUBLIC) == expected and expected.startswith("12D3Koo")


@given(st.binary(min_size=32, max_size=32))
def test_peer_id_and_public_key_are_inverse(public_key: bytes) -> None:
    assert get_public_key(get_peer_id(public_key)) == public_key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12D3Koo",
        "0OIl",
        "é" * 52,
        make_peer(1) + "1",
        make_peer(1)[:-1],
        "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG",
        base58.b58encode(bytes.fromhex("002408011221") + bytes(32)).decode(),
        "1" * 10000,
    ],
)
def test_malformed_peer_ids_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        get_public_key(text)


def test_a_short_public_key_is_refused() -> None:
    with pytest.raises(ConfigError):
        get_peer_id(b"short")


def test_a_signature_holds_only_for_what_it_was_made_for() -> None:
    signature = sign(KEY, "pointer", SWARM, b"payload")
    assert is_signed_by(PUBLIC, signature, "pointer", SWARM, b"payload")
    assert not is_signed_by(PUBLIC, signature, "advert", SWARM, b"payload")
    assert not is_signed_by(PUBLIC, signature, "pointer", get_swarm_id("other"), b"payload")
    assert not is_signed_by(PUBLIC, signature, "pointer", SWARM, b"payloae")
    assert not is_signed_by(bytes(make_key(2).verify_key), signature, "pointer", SWARM, b"payload")
    assert not is_signed_by(b"", signature, "pointer", SWARM, b"payload")
    assert not is_signed_by(PUBLIC, b"", "pointer", SWARM, b"payload")
    # Lengths are covered: moving a byte across a border changes what was signed.
    assert not is_signed_by(PUBLIC, signature, "pointer", SWARM + b"p", b"ayload")


def test_the_all_zero_public_key_signs_nothing() -> None:
    assert not is_signed_by(bytes(32), bytes(64), "pointer", SWARM, b"")


def test_open_gives_back_what_was_sealed() -> None:
    assert open_signed(seal(POINTER, "pointer", KEY, SWARM), Pointer, "pointer", SWARM) == POINTER


def test_open_says_why_it_refuses() -> None:
    good = seal(POINTER, "pointer", KEY, SWARM)
    with pytest.raises(RemoteProtocolError, match="bad signature"):
        open_signed(msgspec.structs.replace(good, signature=bytes(64)), Pointer, "pointer", SWARM)
    with pytest.raises(RemoteProtocolError, match="undecodable"):
        open_signed(msgspec.structs.replace(good, payload=b"\x00"), Pointer, "pointer", SWARM)
    with pytest.raises(RemoteProtocolError, match="another key"):
        open_signed(seal(POINTER, "pointer", make_key(2), SWARM), Pointer, "pointer", SWARM)
    with pytest.raises(RemoteProtocolError, match="bad signature"):
        open_signed(good, Pointer, "pointer", get_swarm_id("other"))


@given(st.binary(max_size=200))
def test_garbage_never_raises_anything_else(payload: bytes) -> None:
    signed = msgspec.structs.replace(seal(POINTER, "pointer", KEY, SWARM), payload=payload)
    with pytest.raises(RemoteProtocolError):
        open_signed(signed, Pointer, "pointer", SWARM)


@pytest.mark.parametrize("expires_at", [NOW, NOW - 1, NOW + MAX_TTL_S + CLOCK_SKEW_S + 1, float("nan"), float("inf")])
def test_records_must_expire_soon_but_not_yet(expires_at: float) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        check_expiry(expires_at, NOW, "pointer")
    assert not caught.value.reject
    check_expiry(NOW + 1, NOW, "pointer")
    check_expiry(NOW + MAX_TTL_S + CLOCK_SKEW_S, NOW, "pointer")


def test_handshake_payload_covers_each_part() -> None:
    parts = (bytes(32), b"n" * 32, SWARM, make_peer(1), make_peer(2))
    payloads = {get_handshake_payload(*parts)}
    for i, other in enumerate((b"x" * 32, b"m" * 32, bytes(32), make_peer(3), make_peer(3))):
        payloads.add(get_handshake_payload(*parts[:i], other, *parts[i + 1 :]))  # type: ignore[arg-type]
    assert len(payloads) == 6
    assert get_handshake_payload(b"ab", b"c", *parts[2:]) != get_handshake_payload(b"a", b"bc", *parts[2:])


def test_swarm_ids_differ_by_name() -> None:
    assert len(get_swarm_id("main")) == 32 and get_swarm_id("main") != get_swarm_id("Main")


@pytest.mark.parametrize("value", [b"\x91" * 3_000 + b"\x00", b"\xa1\xff"])
def test_what_makes_the_decoder_raise_other_errors_is_refused_like_other_garbage(value: bytes) -> None:
    fields = msgspec.msgpack.decode(messages.encode(POINTER))
    head = bytes([0x80 | len(fields) + 1])
    for name in (b"\xa4more", b"\xa7peer_id"):  # an unknown field, and text that isn't text
        payload = head + messages.encode(POINTER)[1:] + name + value
        signed = Signed(public_key=PUBLIC, signature=sign(KEY, "pointer", SWARM, payload), payload=payload)
        if name == b"\xa4more" and value == b"\xa1\xff":
            continue  # skipped without being looked at
        with pytest.raises(RemoteProtocolError, match="undecodable"):
            open_signed(signed, Pointer, "pointer", SWARM)
