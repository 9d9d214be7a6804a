"""Signatures without arithmetic: the simulator signs for everybody and remembers what it signed.

Ed25519 costs 80 microseconds a signature, and a swarm of ten thousand checks millions. Here a signature is a number
that the registry gave to exactly these bytes under exactly this key, once. Who didn't ask the registry has none: a
forged, altered or re-attributed record is refused just like one with a wrong signature.
"""

from __future__ import annotations

from typing import cast

import msgspec

from daaswarm import messages
from daaswarm.core.adverts import ADVERT_KIND, Known
from daaswarm.core.notary import QUERY_KIND
from daaswarm.core.record_store import POINTER_KIND
from daaswarm.core.signing import check_expiry, get_peer_id
from daaswarm.errors import RemoteProtocolError
from daaswarm.messages import Advert, Pointer, Query, Signed
from daaswarm.types import PeerId

Record = Pointer | Advert | Query


class Registry:
    """What was signed, by whom: one for all nodes of a simulation. What has expired is forgotten."""

    def __init__(self) -> None:
        self._issued: dict[bytes, tuple[Signed, Record, Known | None]] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._issued)

    def seal(self, record: Record, public_key: bytes) -> Signed:
        """Signs ``record`` for the owner of the key, whoever asks: a node has only its own notary."""
        self._count += 1
        payload = messages.encode(record)
        signed = Signed(public_key=public_key, signature=self._count.to_bytes(64, "big"), payload=payload)
        self._issued[signed.signature] = (
            signed,
            record,
            Known(record, signed) if isinstance(record, Advert) else None,
        )
        return signed

    def open(self, signed: Signed, kind: str) -> tuple[Record, Known | None]:
        """What was signed.

        Raises:
            RemoteProtocolError: never by that key, or not these bytes.
        """
        issued = self._issued.get(signed.signature)
        if issued is None or (issued[0] is not signed and issued[0] != signed):
            raise RemoteProtocolError(f"{kind} record has a bad signature")
        return issued[1], issued[2]

    def forget_expired(self, now: float) -> None:
        """Walks over all."""
        self._issued = {s: issued for s, issued in self._issued.items() if issued[1].expires_at > now}


class SimNotary:
    """One node's, with the time of the simulation only where it is passed in."""

    def __init__(self, public_key: bytes, registry: Registry) -> None:
        self.peer_id: PeerId = get_peer_id(public_key)
        self._public_key = public_key
        self._registry = registry

    def seal_advert(self, advert: Advert) -> Signed:
        return self._registry.seal(advert, self._public_key)

    def peek_advert(self, signed: Signed) -> Advert:
        try:
            record, _ = self._registry.open(signed, ADVERT_KIND)
        except RemoteProtocolError:  # to be read before it is checked
            try:
                record = cast("Record", messages.decode(Advert, signed.payload))
            except msgspec.DecodeError as error:
                raise RemoteProtocolError(f"undecodable advert: {error}") from error
        if not isinstance(record, Advert):
            raise RemoteProtocolError("undecodable advert")
        return record

    def open_advert(self, signed: Signed, now: float) -> Known:
        record, known = self._registry.open(signed, ADVERT_KIND)
        self._check(record, signed, now, ADVERT_KIND)
        if known is None:
            raise RemoteProtocolError("advert record has a bad signature")
        return known

    def seal_query(self, query: Query) -> Signed:
        return self._registry.seal(query, self._public_key)

    def open_query(self, signed: Signed, now: float) -> Query:
        record, _ = self._registry.open(signed, QUERY_KIND)
        self._check(record, signed, now, QUERY_KIND)
        if not isinstance(record, Query):
            raise RemoteProtocolError("query record has a bad signature")
        return record

    def seal_pointer(self, pointer: Pointer) -> Signed:
        return self._registry.seal(pointer, self._public_key)

    def open_pointer(self, signed: Signed, now: float) -> Pointer:
        record, _ = self._registry.open(signed, POINTER_KIND)
        if not isinstance(record, Pointer):
            raise RemoteProtocolError("pointer record has a bad signature")
        self._check(record, signed, now, POINTER_KIND)
        return record

    def _check(self, record: Record, signed: Signed, now: float, kind: str) -> None:
        if get_peer_id(signed.public_key) != record.peer_id:
            raise RemoteProtocolError(f"{kind} record is signed by another key than that of {record.peer_id}")
        check_expiry(record.expires_at, now, kind)
