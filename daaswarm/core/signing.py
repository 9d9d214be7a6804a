"""What is signed, by whom, and which signed records may be believed.

Every signature covers a domain tag (``daaswarm/<kind>/1``), the swarm and the payload, each preceded by its length:
a signature made for one purpose or one swarm is worth nothing in another, and no two inputs share their bytes.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar, cast

import base58
import msgspec
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from daaswarm import messages
from daaswarm.core.memo import memo
from daaswarm.errors import ConfigError, RemoteProtocolError
from daaswarm.types import PeerId

MAX_TTL_S = 15 * 60.0  # of a signed record; a host that vanishes is forgotten after this
CLOCK_SKEW_S = 60.0  # a publisher's clock may be this far ahead of ours

# libp2p peer-id spec: an identity multihash (0x00, 36 bytes) of the protobuf (type Ed25519, 32 bytes of data)
_PEER_ID_PREFIX = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])

Record = TypeVar("Record", messages.Pointer, messages.Advert, messages.Query)


def sign(key: SigningKey, kind: str, swarm: bytes, payload: bytes) -> bytes:
    """The 64 byte Ed25519 signature of ``payload`` for the purpose ``kind`` in ``swarm``."""
    return key.sign(_frame(kind, swarm, payload)).signature


def is_signed_by(public_key: bytes, signature: bytes, kind: str, swarm: bytes, payload: bytes) -> bool:
    """True when ``signature`` is what :func:`sign` gives for these arguments under ``public_key``."""
    if len(public_key) != 32 or len(signature) != 64:
        return False
    try:
        VerifyKey(public_key).verify(_frame(kind, swarm, payload), signature)
    except BadSignatureError:
        return False
    return True


def seal(record: Record, kind: str, key: SigningKey, swarm: bytes) -> messages.Signed:
    """``record`` encoded and signed. ``record.peer_id`` must be the peer of ``key`` for others to accept it."""
    payload = messages.encode(record)
    return messages.Signed(public_key=bytes(key.verify_key), signature=sign(key, kind, swarm, payload), payload=payload)


def open_signed(signed: messages.Signed, struct_type: type[Record], kind: str, swarm: bytes) -> Record:
    """The record inside ``signed``.

    Raises:
        RemoteProtocolError: undecodable, signed by another key than its ``peer_id`` names, or a bad signature.
    """
    # Cheapest check first: garbage must not cost a signature verification.
    try:
        record = cast("Record", messages.decode(struct_type, signed.payload))
    except msgspec.MsgspecError as error:
        raise RemoteProtocolError(f"undecodable {kind} record: {error}") from error
    if get_peer_id(signed.public_key) != record.peer_id:
        raise RemoteProtocolError(f"{kind} record is signed by another key than that of {record.peer_id}")
    if not is_signed_by(signed.public_key, signed.signature, kind, swarm, signed.payload):
        raise RemoteProtocolError(f"{kind} record has a bad signature for {record.peer_id}")
    return record


def check_expiry(expires_at: float, now: float, kind: str) -> None:
    """Refuses a record that has expired or that claims to live longer than :data:`MAX_TTL_S`; NaN never passes.

    Raises:
        RemoteProtocolError: with ``reject=False``, since a wrong clock is not an attack.
    """
    if not expires_at > now:
        raise RemoteProtocolError(f"{kind} record has expired", reject=False)
    if not expires_at <= now + MAX_TTL_S + CLOCK_SKEW_S:
        raise RemoteProtocolError(
            f"{kind} record lives too long: {expires_at - now:.0f} s, {MAX_TTL_S:.0f} s allowed",
            hint="check the clocks of both machines",
            reject=False,
        )


def get_peer_id(public_key: bytes) -> PeerId:
    """The libp2p PeerId (``12D3Koo...``) of a 32 byte Ed25519 public key.

    Raises:
        ConfigError: not 32 bytes.
    """
    if len(public_key) != 32:
        raise ConfigError(f"an Ed25519 public key has 32 bytes, not {len(public_key)}")
    return _encode_peer_id(public_key)


@memo(32_768)  # a simulation has ten thousand peers and those that left
def get_public_key(peer_id: str) -> bytes:
    """The 32 byte Ed25519 public key inside a PeerId.

    Raises:
        ConfigError: not a PeerId of an Ed25519 key.
    """
    try:
        raw = base58.b58decode(peer_id) if len(peer_id) <= 64 else b""
    except ValueError:
        raw = b""
    if len(raw) != 38 or not raw.startswith(_PEER_ID_PREFIX):
        raise ConfigError(
            f"{peer_id[:64]!r} is not the PeerId of an Ed25519 key",
            hint="PeerIds begin with 12D3Koo and have 52 letters",
        )
    return raw[6:]


def get_handshake_payload(
    server_cert_hash: bytes, nonce: bytes, swarm: bytes, server_peer_id: str, client_peer_id: str
) -> bytes:
    """What a client signs to prove its PeerId to one server, once, in one swarm.

    The hash of the server's certificate ties the proof to this TLS connection, so that a server can't pass it on;
    the nonce (drawn by the server) keeps it from being replayed.
    """
    parts = [b"daaswarm/handshake/1", swarm, server_cert_hash, nonce, server_peer_id.encode(), client_peer_id.encode()]
    return _join(parts)


def get_swarm_id(name: str) -> bytes:
    """The 32 byte id of the swarm called ``name``; the public default is ``"main"``."""
    return hashlib.sha256(_join([b"daaswarm/swarm/1", name.encode()])).digest()


def _frame(kind: str, swarm: bytes, payload: bytes) -> bytes:
    return _join([f"daaswarm/{kind}/1".encode(), swarm, payload])


def _join(parts: list[bytes]) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


@memo(32_768)
def _encode_peer_id(public_key: bytes) -> PeerId:
    return PeerId(base58.b58encode(_PEER_ID_PREFIX + public_key).decode("ascii"))
