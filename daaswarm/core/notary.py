"""Signs what a node says of itself, and checks what others say. A simulation brings its own, without the arithmetic."""

from __future__ import annotations

from typing import Protocol

import msgspec
from nacl.signing import SigningKey

from daaswarm import messages
from daaswarm.core.adverts import ADVERT_KIND, Known, check_advert
from daaswarm.core.record_store import POINTER_KIND, open_pointer
from daaswarm.core.signing import check_expiry, get_peer_id, open_signed, seal
from daaswarm.errors import RemoteProtocolError
from daaswarm.limits import RECORD_BYTES
from daaswarm.messages import Advert, Pointer, Query, Signed
from daaswarm.types import PeerId

QUERY_KIND = "query"


class Notary(Protocol):
    """Whatever opens raises ``RemoteProtocolError`` for what isn't valid."""

    @property
    def peer_id(self) -> PeerId: ...

    def seal_advert(self, advert: Advert) -> Signed: ...

    def peek_advert(self, signed: Signed) -> Advert:
        """What it says, before anything is checked: who has it already needs no check."""
        ...

    def open_advert(self, signed: Signed, now: float) -> Known: ...

    def seal_query(self, query: Query) -> Signed: ...

    def open_query(self, signed: Signed, now: float) -> Query: ...

    def seal_pointer(self, pointer: Pointer) -> Signed: ...

    def open_pointer(self, signed: Signed, now: float) -> Pointer: ...


class KeyNotary:
    """With a node's key, in one swarm."""

    def __init__(self, key: SigningKey, swarm: bytes) -> None:
        self.peer_id = get_peer_id(bytes(key.verify_key))
        self._key = key
        self._swarm = swarm

    def seal_advert(self, advert: Advert) -> Signed:
        return seal(advert, ADVERT_KIND, self._key, self._swarm)

    def peek_advert(self, signed: Signed) -> Advert:
        try:
            return messages.decode(Advert, signed.payload)  # type: ignore[return-value]
        except msgspec.DecodeError as error:
            raise RemoteProtocolError(f"undecodable advert: {error}") from error

    def open_advert(self, signed: Signed, now: float) -> Known:
        return check_advert(signed, self._swarm, now)

    def seal_query(self, query: Query) -> Signed:
        return seal(query, QUERY_KIND, self._key, self._swarm)

    def open_query(self, signed: Signed, now: float) -> Query:
        if len(signed.payload) > RECORD_BYTES:
            raise RemoteProtocolError(f"query of {len(signed.payload)} bytes; {RECORD_BYTES} allowed")
        query = open_signed(signed, Query, QUERY_KIND, self._swarm)
        check_expiry(query.expires_at, now, QUERY_KIND)
        return query

    def seal_pointer(self, pointer: Pointer) -> Signed:
        return seal(pointer, POINTER_KIND, self._key, self._swarm)

    def open_pointer(self, signed: Signed, now: float) -> Pointer:
        return open_pointer(signed, self._swarm, now)
