"""The signed pointers that this node keeps for the swarm. Nothing gets in that was not checked."""

from __future__ import annotations

from daaswarm.core.signing import check_expiry, open_signed
from daaswarm.errors import RemoteProtocolError
from daaswarm.limits import RECORD_BYTES, RECORDS, RECORDS_PER_KEY
from daaswarm.messages import Pointer, Signed
from daaswarm.types import PeerId

POINTER_KIND = "pointer"
RECORDS_PER_SIGNER = 1_024  # a host publishes a few keys per model; one key pair must not fill the store


def open_pointer(signed: Signed, swarm: bytes, now: float) -> Pointer:
    """The checked pointer inside ``signed``: size, encoding, signer, signature, expiry.

    Raises:
        RemoteProtocolError: says which check failed; ``reject`` is False when only the time is wrong.
    """
    if len(signed.payload) > RECORD_BYTES:
        raise RemoteProtocolError(f"pointer record of {len(signed.payload)} bytes; {RECORD_BYTES} allowed")
    pointer = open_signed(signed, Pointer, POINTER_KIND, swarm)
    check_expiry(pointer.expires_at, now, POINTER_KIND)
    return pointer


class RecordStore:
    """One record per (key, peer), the one with the highest sequence number; bounded per key, signer and in all."""

    def __init__(
        self,
        swarm: bytes,
        *,
        records: int = RECORDS,
        records_per_key: int = RECORDS_PER_KEY,
        records_per_signer: int = RECORDS_PER_SIGNER,
    ) -> None:
        self._swarm = swarm
        self._limit = records
        self._limit_per_key = records_per_key
        self._limit_per_signer = records_per_signer
        self._by_key: dict[bytes, dict[PeerId, tuple[Pointer, Signed]]] = {}
        self._per_signer: dict[PeerId, int] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, signed: Signed, now: float) -> Pointer:
        """Checks and keeps a record; the same record twice is fine.

        Raises:
            RemoteProtocolError: a check failed, a newer record is there, or a limit is reached (``reject=False``).
        """
        pointer = open_pointer(signed, self._swarm, now)
        peer = PeerId(pointer.peer_id)
        self._drop_expired(pointer.key, now)
        known = self._by_key.get(pointer.key, {}).get(peer)
        if known is not None:
            if pointer.seq < known[0].seq:
                raise RemoteProtocolError(f"older than the stored record (seq {known[0].seq})", reject=False)
            if pointer.seq == known[0].seq and signed.payload != known[1].payload:
                raise RemoteProtocolError(f"conflicts with the stored record (seq {pointer.seq})", reject=False)
        else:
            self._check_room(pointer.key, peer)
            self._count += 1
            self._per_signer[peer] = self._per_signer.get(peer, 0) + 1
        self._by_key.setdefault(pointer.key, {})[peer] = (pointer, signed)
        return pointer

    def get(self, key: bytes, now: float) -> list[tuple[Pointer, Signed]]:
        """The live records under ``key``, at most :data:`RECORDS_PER_KEY`."""
        self._drop_expired(key, now)
        return list(self._by_key.get(key, {}).values())

    def tick(self, now: float) -> None:
        """Drops everything that has expired. Walks all keys: for a timer, not for each message."""
        for key in list(self._by_key):
            self._drop_expired(key, now)

    def validate(self) -> None:
        """Asserts the invariants."""
        assert self._count == sum(len(found) for found in self._by_key.values()) <= self._limit
        per_signer: dict[PeerId, int] = {}
        for key, found in self._by_key.items():
            assert 0 < len(found) <= self._limit_per_key
            for peer, (pointer, _) in found.items():
                assert pointer.key == key and pointer.peer_id == peer
                per_signer[peer] = per_signer.get(peer, 0) + 1
        assert per_signer == self._per_signer
        assert max(per_signer.values(), default=0) <= self._limit_per_signer

    def _check_room(self, key: bytes, peer: PeerId) -> None:
        if self._count >= self._limit:
            raise RemoteProtocolError(f"store is full ({self._limit} records)", reject=False)
        if self._per_signer.get(peer, 0) >= self._limit_per_signer:
            raise RemoteProtocolError(f"signer has {self._limit_per_signer} records here already", reject=False)
        if len(self._by_key.get(key, {})) >= self._limit_per_key:
            raise RemoteProtocolError(f"key has {self._limit_per_key} records already", reject=False)

    def _drop_expired(self, key: bytes, now: float) -> None:
        found = self._by_key.get(key, {})
        for peer in [peer for peer, (pointer, _) in found.items() if not pointer.expires_at > now]:
            del found[peer]
            self._count -= 1
            self._per_signer[peer] -= 1
            if not self._per_signer[peer]:
                del self._per_signer[peer]
        if not found:
            self._by_key.pop(key, None)
