"""The key of a private swarm: its id, its text, and the proofs that a node holds it.

The key is 32 random bytes, never a password: whoever sees a proof or the id can only try all keys. What it is used for
has a hash of its own each (BLAKE2b's ``person``), so that one use says nothing about another.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from dataclasses import dataclass, field

from daaswarm.errors import ConfigError

KEY_BYTES = 32
NAME_CHARS = 32  # so that an id fits in the 64 letters of network.swarm, with room
TAG_BYTES = 10  # of the id, from the key: nobody makes a second key for an id (2^80 attempts)
CHECK_BYTES = 4  # of the text: a typo goes unnoticed once in four thousand million
MAX_TEXT = 256  # letters of a key's text; ours have at most 109
TEXT_PREFIX = "daaswarm-key"
PROOF_BYTES = 32

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ID = re.compile(rf"(?P<name>{_NAME.pattern})@[a-z2-7]{{16}}")
_TEXT_HINT = "it is one line, daaswarm-key:NAME:…, as daaswarm swarm show --key prints it; copy it again"


@dataclass(frozen=True)
class SwarmKey:
    """Args: ``name``: what people call the swarm; ``secret``: 32 random bytes."""

    name: str
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        check_swarm_name(self.name)
        if len(self.secret) != KEY_BYTES:
            raise ConfigError(f"a swarm's key has {KEY_BYTES} bytes, not {len(self.secret)}")

    @property
    def swarm_id(self) -> str:
        """``NAME@k3x7q2m4a5bcd2ef``: public. Two swarms called alike differ in it."""
        tag = _hash(self.secret, b"swarm-id/1", self.name.encode(), TAG_BYTES)
        return f"{self.name}@{_to_base32(tag)}"

    @property
    def realm(self) -> bytes:
        """The 32 bytes in everything that the swarm's members sign: no record of another swarm is valid in it."""
        return _hash(self.secret, b"swarm-realm/1", self.name.encode(), PROOF_BYTES)

    @property
    def text(self) -> str:
        """One line that :func:`parse_swarm_key` reads. Secret."""
        return f"{TEXT_PREFIX}:{self.name}:{_to_base32(self.secret + _get_check(self.name, self.secret))}"

    def prove_server(self, binding: bytes, nonce: bytes, server: str) -> bytes:
        """What a server shows in its first message.

        Args:
            binding: SHA-256 of the server's certificate. Only who has that certificate's key can use the proof, and
                the certificate is made anew with each process; so it needs no number from the client.
            nonce: the server's.
            server: its PeerId.
        """
        return _hash(self.secret, b"swarm-server/1", _join([binding, nonce, server.encode()]), PROOF_BYTES)

    def prove_client(self, binding: bytes, nonce: bytes, server: str, client: str) -> bytes:
        """What a client shows, on this connection, to this server, once."""
        parts = [binding, nonce, server.encode(), client.encode()]
        return _hash(self.secret, b"swarm-client/1", _join(parts), PROOF_BYTES)


def is_proof(proof: bytes, expected: bytes) -> bool:
    """Compares in constant time."""
    return hmac.compare_digest(proof, expected)


def check_swarm_name(name: str) -> None:
    """Raises:
    ConfigError: a name that can't be part of an id or of a file's name.
    """
    if len(name) > NAME_CHARS or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name[:64]!r} can't be a private swarm's name",
            hint=f"up to {NAME_CHARS} letters, digits, dots, dashes and underscores, the first a letter or digit",
        )


def is_private_id(swarm: str) -> bool:
    """Whether ``network.swarm`` names a swarm that has a key."""
    match = _ID.fullmatch(swarm)
    return match is not None and len(match["name"]) <= NAME_CHARS


def parse_swarm_key(text: str, *, source: str) -> SwarmKey:
    """The key in ``text``; white space around it, and its case, don't matter. ``source`` is named in errors.

    Raises:
        ConfigError: no key, or one with a typo. The text itself is never repeated.
    """
    text = text.strip()
    prefix, _, rest = text.partition(":")
    name, _, encoded = rest.partition(":")
    if len(text) > MAX_TEXT or prefix.lower() != TEXT_PREFIX or not encoded:
        raise ConfigError(f"{source} holds no swarm key", hint=_TEXT_HINT)
    check_swarm_name(name)
    try:
        raw = base64.b32decode(encoded.upper() + "=" * (-len(encoded) % 8))
    except (binascii.Error, ValueError):
        raw = b""
    secret, check = raw[:KEY_BYTES], raw[KEY_BYTES:]
    is_whole = len(raw) == KEY_BYTES + CHECK_BYTES and _to_base32(raw) == encoded.lower()  # two bits are no part of it
    if not is_whole or not hmac.compare_digest(check, _get_check(name, secret)):
        raise ConfigError(f"the swarm key in {source} has a typo: its checksum is wrong", hint=_TEXT_HINT)
    return SwarmKey(name, secret)


def _get_check(name: str, secret: bytes) -> bytes:
    return _hash(secret, b"swarm-text/1", name.encode(), CHECK_BYTES)


def _hash(key: bytes, use: bytes, data: bytes, size: int) -> bytes:
    return hashlib.blake2b(data, digest_size=size, key=key, person=use).digest()


def _join(parts: list[bytes]) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _to_base32(data: bytes) -> str:
    return base64.b32encode(data).decode("ascii").rstrip("=").lower()
