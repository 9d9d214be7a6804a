"""The signed pointers that this node keeps for the swarm. Nothing gets in that was not checked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from daaswarm.core.signing import check_expiry, open_signed
from daaswarm.errors import RemoteProtocolError
from daaswarm.limits import RECORD_BYTES, RECORDS, RECORDS_PER_KEY
from daaswarm.messages import Pointer, Signed
from daaswarm.types import PeerId

POINTER_KIND = "pointer"
RECORDS_PER_SIGNER = 1_024  # a host publishes a few keys per model; one key pair must not fill the store
RECORDS_PER_GIVER = 4_096  # that one peer brought, of whichever signers: making signers costs nothing
OPENED = 8_192  # records whose signatures are known to be right: the same ones come with every lookup of their key


OpenPointer = Callable[[Signed, float], Pointer]
"""The checked pointer inside, at that time (Unix, s); raises ``RemoteProtocolError`` for what isn't valid."""


def open_pointer(signed: Signed, swarm: bytes, now: float) -> Pointer:
    """The checked pointer inside ``signed``: size, encoding, signer, signature, expiry.

    Raises:
        RemoteProtocolError: says which check failed; ``reject`` is False when only the time is wrong.
    """
    if len(signed.payload) > RECORD_BYTES:
        raise RemoteProtocolError(f"pointer record of {len(signed.payload)} bytes; {RECORD_BYTES} allowed")
    pointer = _open(signed.public_key, signed.signature, signed.payload, swarm)
    check_expiry(pointer.expires_at, now, POINTER_KIND)
    return pointer


@functools.lru_cache(maxsize=OPENED)
def _open(public_key: bytes, signature: bytes, payload: bytes, swarm: bytes) -> Pointer:
    signed = Signed(public_key=public_key, signature=signature, payload=payload)
    return open_signed(signed, Pointer, POINTER_KIND, swarm)


def _open_in(swarm: bytes, signed: Signed, now: float) -> Pointer:
    return open_pointer(signed, swarm, now)


class _Kept(NamedTuple):
    pointer: Pointer
    signed: Signed
    giver: PeerId | None  # who brought it; None is this node itself


class RecordStore:
    """One record per (key, peer), the one with the highest sequence number; bounded per key, signer, giver, in all.

    Args:
        open_pointer: :func:`open_pointer` in ``swarm``, unless something else checks the records.
    """

    def __init__(
        self,
        swarm: bytes,
        *,
        records: int = RECORDS,
        records_per_key: int = RECORDS_PER_KEY,
        records_per_signer: int = RECORDS_PER_SIGNER,
        records_per_giver: int = RECORDS_PER_GIVER,
        open_pointer: OpenPointer | None = None,
    ) -> None:
        self._open = open_pointer or functools.partial(_open_in, swarm)
        self._limit = records
        self._limit_per_key = records_per_key
        self._limit_per_signer = records_per_signer
        self._limit_per_giver = records_per_giver
        self._by_key: dict[bytes, dict[PeerId, _Kept]] = {}
        self._per_signer: dict[PeerId, int] = {}
        self._per_giver: dict[PeerId, int] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, signed: Signed, now: float, giver: PeerId | None = None) -> Pointer:
        """Checks and keeps a record that ``giver`` brought; the same record twice is fine.

        Raises:
            RemoteProtocolError: a check failed, a newer record is there, or a limit is reached (``reject=False``; the
                message says which, in 64 letters at most).
        """
        pointer = self._open(signed, now)
        peer = PeerId(pointer.peer_id)
        self._drop_expired(pointer.key, now)
        known = self._by_key.get(pointer.key, {}).get(peer)
        if known is not None:
            if pointer.seq < known.pointer.seq:
                raise RemoteProtocolError(f"older than the stored record (seq {known.pointer.seq})", reject=False)
            if pointer.seq == known.pointer.seq and signed.payload != known.signed.payload:
                raise RemoteProtocolError(f"conflicts with the stored record (seq {pointer.seq})", reject=False)
        else:
            self._check_room(pointer.key, peer, giver)
            self._count += 1
            self._per_signer[peer] = self._per_signer.get(peer, 0) + 1
            if giver is not None:
                self._per_giver[giver] = self._per_giver.get(giver, 0) + 1
        # Whoever brought the first keeps counting for it: a newer record takes no more room.
        giver = known.giver if known is not None else giver
        self._by_key.setdefault(pointer.key, {})[peer] = _Kept(pointer, signed, giver)
        return pointer

    def get(self, key: bytes, now: float) -> list[tuple[Pointer, Signed]]:
        """The live records under ``key``, at most :data:`RECORDS_PER_KEY`."""
        self._drop_expired(key, now)
        return [(kept.pointer, kept.signed) for kept in self._by_key.get(key, {}).values()]

    def get_keys(self) -> list[bytes]:
        """All keys under which something is kept, in the order in which they came."""
        return list(self._by_key)

    def tick(self, now: float) -> None:
        """Drops everything that has expired. Walks all keys: for a timer, not for each message."""
        for key in list(self._by_key):
            self._drop_expired(key, now)

    def validate(self) -> None:
        """Asserts the invariants."""
        assert self._count == sum(len(found) for found in self._by_key.values()) <= self._limit
        per_signer: dict[PeerId, int] = {}
        per_giver: dict[PeerId, int] = {}
        for key, found in self._by_key.items():
            assert 0 < len(found) <= self._limit_per_key
            for peer, kept in found.items():
                assert kept.pointer.key == key and kept.pointer.peer_id == peer
                per_signer[peer] = per_signer.get(peer, 0) + 1
                if kept.giver is not None:
                    per_giver[kept.giver] = per_giver.get(kept.giver, 0) + 1
        assert per_signer == self._per_signer and per_giver == self._per_giver
        assert max(per_giver.values(), default=0) <= self._limit_per_giver
        assert max(per_signer.values(), default=0) <= self._limit_per_signer

    def _check_room(self, key: bytes, peer: PeerId, giver: PeerId | None) -> None:
        if self._count >= self._limit:
            raise RemoteProtocolError(f"store is full ({self._limit} records)", reject=False)
        if giver is not None and self._per_giver.get(giver, 0) >= self._limit_per_giver:
            raise RemoteProtocolError(f"you brought {self._limit_per_giver} records already", reject=False)
        if self._per_signer.get(peer, 0) >= self._limit_per_signer:
            raise RemoteProtocolError(f"signer has {self._limit_per_signer} records here already", reject=False)
        if len(self._by_key.get(key, {})) >= self._limit_per_key:
            raise RemoteProtocolError(f"key has {self._limit_per_key} records already", reject=False)

    def _drop_expired(self, key: bytes, now: float) -> None:
        found = self._by_key.get(key)
        if found is None:
            return
        for peer, kept in [item for item in found.items() if not item[1].pointer.expires_at > now]:
            del found[peer]
            self._count -= 1
            _decrease(self._per_signer, peer)
            if kept.giver is not None:
                _decrease(self._per_giver, kept.giver)
        if not found:
            del self._by_key[key]


def _decrease(counts: dict[PeerId, int], peer: PeerId) -> None:
    counts[peer] -= 1
    if not counts[peer]:
        del counts[peer]
