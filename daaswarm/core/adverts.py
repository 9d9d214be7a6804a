"""Who serves which experts: the signed adverts this node believes, last writer (highest ``seq``) first.

Correctness never rests on how an advert arrived (gossip, pull, handed on): it is signed by the peer it speaks for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import msgspec

from daaswarm.core.signing import check_expiry, open_signed
from daaswarm.errors import RemoteProtocolError
from daaswarm.limits import GOSSIP_BYTES
from daaswarm.messages import Advert, Signed
from daaswarm.types import DTYPES, Dtype, ExpertId, ModelRoot, PeerId, format_range

ADVERT_KIND = "advert"
ADVERTS = 4_096  # peers x models known to one node; at most 16 KiB each as signed, as much again parsed: 128 MiB
ADVERTS_PER_PEER = 64  # models one peer may serve; also what fits in one Adverts message
REPLICAS = 8  # of one expert that are counted when dtypes are compared; more make an answer no safer
MISSING_GROUPS = 12  # lines of an error text; beyond, only counted

Holders = Mapping[ExpertId, list[PeerId]]


class Known(msgspec.Struct, frozen=True):
    """A believed advert: parsed, and as it was signed (to hand on)."""

    advert: Advert
    signed: Signed

    @property
    def experts(self) -> dict[int, list[int]]:
        """``{layer: [experts]}``, ascending. Made anew each time: the lists take up to 300 times the bitmaps' room."""
        return {layer: from_bitmap(bitmap) for layer, bitmap in sorted(self.advert.held.items())}


def check_advert(signed: Signed, swarm: bytes, now: float) -> Known:
    """Whatever can be checked of an advert by itself.

    Raises:
        RemoteProtocolError: a check failed.
    """
    if len(signed.payload) > GOSSIP_BYTES:
        raise RemoteProtocolError(f"advert of {len(signed.payload)} bytes; {GOSSIP_BYTES} allowed")
    advert = open_signed(signed, Advert, ADVERT_KIND, swarm)
    check_expiry(advert.expires_at, now, ADVERT_KIND)
    for name, value in (
        ("capacity", advert.capacity_rows_per_s),
        ("price", advert.price),
        ("load", advert.load),
    ):
        if not (math.isfinite(value) and value >= 0):
            raise RemoteProtocolError(f"advert with {name} {value}")
    if not all(any(bitmap) for bitmap in advert.held.values()):
        raise RemoteProtocolError("advert names a layer of which it holds nothing")
    return Known(advert, signed)


class AdvertBook:
    """One advert per (peer, model). A withdrawn one stays as a tombstone until it expires, so no replay revives it."""

    def __init__(self, swarm: bytes, *, adverts: int = ADVERTS, adverts_per_peer: int = ADVERTS_PER_PEER) -> None:
        self._swarm = swarm
        self._limit = adverts
        self._limit_per_peer = adverts_per_peer
        self._by_model: dict[ModelRoot, dict[PeerId, Known]] = {}
        self._per_peer: dict[PeerId, int] = {}
        self._hidden: dict[tuple[PeerId, ModelRoot], int] = {}  # withdrawn here, up to this seq
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, signed: Signed, now: float) -> bool:
        """Checks and keeps an advert. False when it brings nothing new (same or older ``seq``).

        Raises:
            RemoteProtocolError: a check failed, or a limit is reached (``reject=False``).
        """
        return self.keep(check_advert(signed, self._swarm, now))

    def keep(self, checked: Known) -> bool:
        """Like :meth:`put`, of one that was checked."""
        advert = checked.advert
        peer, root = PeerId(advert.peer_id), ModelRoot(advert.model_root)
        known = self._by_model.get(root, {}).get(peer)
        if known is not None:
            if advert.seq <= known.advert.seq:
                return False
        else:
            if self._count >= self._limit:
                raise RemoteProtocolError(f"advert book is full ({self._limit})", reject=False)
            if self._per_peer.get(peer, 0) >= self._limit_per_peer:
                raise RemoteProtocolError(f"peer {peer} has {self._limit_per_peer} adverts already", reject=False)
            self._count += 1
            self._per_peer[peer] = self._per_peer.get(peer, 0) + 1
        self._by_model.setdefault(root, {})[peer] = checked
        return True

    def get_adverts(self, model_root: str, now: float) -> list[Known]:
        """The live adverts of a model, by PeerId; tombstones and expired ones are left out."""
        found = self._by_model.get(ModelRoot(model_root), {})
        return [found[peer] for peer in sorted(found) if self._is_live(found[peer].advert, now)]

    def get(self, peer: PeerId, model_root: str) -> Known | None:
        """What a peer said last of a model, also that it withdrew it; expired or not."""
        return self._by_model.get(ModelRoot(model_root), {}).get(peer)

    def get_all(self, model_root: str) -> Collection[Known]:
        """Tombstones and expired ones too, in the order in which their peers came."""
        return self._by_model.get(ModelRoot(model_root), {}).values()

    def get_models(self, now: float) -> dict[ModelRoot, str]:
        """Every model with a live advert, with one of the names that its hosts give it (a name proves nothing)."""
        return {
            root: found[0].advert.model_name
            for root in sorted(self._by_model)
            if (found := self.get_adverts(root, now))
        }

    def holders(
        self, model_root: str, now: float, dtype: Dtype, layers: Mapping[int, int] | None = None
    ) -> dict[ExpertId, list[PeerId]]:
        """Who serves each expert of a model in ``dtype``; PeerIds ascending. Experts without a host are absent.

        With ``layers`` (experts per layer, from the manifest), claims to experts that the model lacks are left out.
        """
        holders: dict[ExpertId, list[PeerId]] = {}
        for known in self.get_adverts(model_root, now):
            if known.advert.dtype != dtype:
                continue
            for layer, bitmap in _clip(known.advert.held, layers).items():
                for expert in from_bitmap(bitmap.to_bytes((bitmap.bit_length() + 7) // 8, "little")):
                    holders.setdefault(ExpertId(layer, expert), []).append(PeerId(known.advert.peer_id))
        return holders

    def withdraw(self, peer: PeerId, model_root: str) -> None:
        """Stops believing a peer's advert (it is gone, or doesn't hold what it says) until it signs a newer one."""
        known = self._by_model.get(ModelRoot(model_root), {}).get(peer)
        if known is not None:
            self._hidden[peer, ModelRoot(model_root)] = known.advert.seq

    def tick(self, now: float) -> int:
        """Drops everything that has expired. Returns how many adverts that were."""
        before = self._count
        for root in list(self._by_model):
            found = self._by_model[root]
            for peer in [peer for peer, known in found.items() if not known.advert.expires_at > now]:
                del found[peer]
                self._hidden.pop((peer, root), None)
                self._count -= 1
                self._per_peer[peer] -= 1
                if not self._per_peer[peer]:
                    del self._per_peer[peer]
            if not found:
                del self._by_model[root]
        return before - self._count

    def validate(self) -> None:
        """Asserts the invariants."""
        assert self._count == sum(map(len, self._by_model.values())) == sum(self._per_peer.values()) <= self._limit
        assert all(0 < n <= self._limit_per_peer for n in self._per_peer.values())
        for root, found in self._by_model.items():
            assert found
            for peer, known in found.items():
                assert (known.advert.peer_id, known.advert.model_root) == (peer, root)
        for peer, root in self._hidden:
            assert peer in self._by_model[root]

    def _is_live(self, advert: Advert, now: float) -> bool:
        if advert.withdrawn or not advert.expires_at > now:
            return False
        return not self._hidden or advert.seq > self._hidden.get(
            (PeerId(advert.peer_id), ModelRoot(advert.model_root)), -1
        )


def to_bitmap(numbers: Iterable[int]) -> bytes:
    """``[0, 9]`` → ``b"\\x01\\x02"``: number ``i`` is bit ``i % 8`` of byte ``i // 8``; no trailing zero bytes."""
    value = 0
    for number in numbers:
        value |= 1 << number
    return value.to_bytes((value.bit_length() + 7) // 8, "little")


def from_bitmap(bitmap: bytes) -> list[int]:
    """The inverse of :func:`to_bitmap`, ascending."""
    return [i * 8 + bit for i, byte in enumerate(bitmap) if byte for bit in range(8) if byte >> bit & 1]


def has_tag(advert: Advert, tag: str) -> bool:
    """Whether a host says so; case doesn't count."""
    return tag.lower() in (own.lower() for own in advert.tags)


def get_missing(layers: Mapping[int, int], holders: Holders) -> dict[int, list[int]]:
    """The experts without a live host: ``layers`` says how many experts (or slices) each layer has."""
    missing: dict[int, list[int]] = {}
    for layer, count in sorted(layers.items()):
        experts = [expert for expert in range(count) if not holders.get(ExpertId(layer, expert))]
        if experts:
            missing[layer] = experts
    return missing


def format_missing(missing: Mapping[int, list[int]], layers: Mapping[int, int], *, kind: str = "moe") -> str:
    """``"layers 15-29 (all 8 slices); layer 3: slices 0-2,7"``; ``kind`` is ``"moe"`` or ``"dense"``."""
    noun = "slices" if kind == "dense" else "experts"
    groups: dict[tuple[bool, tuple[int, ...]], list[int]] = {}
    for layer, experts in sorted(missing.items()):
        whole = len(experts) == layers.get(layer)
        groups.setdefault((whole, tuple(experts)), []).append(layer)
    parts: list[str] = []
    for (whole, experts), where in sorted(groups.items(), key=lambda group: (not group[0][0], group[1])):
        label = f"layer{'s' if len(where) > 1 else ''} {format_range(where)}"
        if whole:
            parts.append(f"{label} (all {len(experts)} {noun})")
        else:
            parts.append(f"{label}: {noun if len(experts) > 1 else noun[:-1]} {format_range(list(experts))}")
    if len(parts) > MISSING_GROUPS:
        parts[MISSING_GROUPS:] = [f"and {len(parts) - MISSING_GROUPS} more"]
    return "; ".join(parts)


def leave_out_paused(adverts: Iterable[Known], layers: Mapping[int, int], *, kind: str) -> list[Known]:
    """Without the hosts that say they are paused, as long as some dtype then still covers all of ``layers``."""
    everybody = list(adverts)
    awake = [known for known in everybody if not known.advert.paused]
    if len(awake) == len(everybody):
        return everybody
    return awake if is_covered(awake, layers, kind=kind) else everybody


def is_covered(adverts: Iterable[Known], layers: Mapping[int, int], *, kind: str, dtype: Dtype | None = None) -> bool:
    """Whether every expert of ``layers`` has a host in ``dtype``, or in some dtype, that isn't paused."""
    held: dict[str, dict[int, int]] = {}
    for known in adverts:
        advert = known.advert
        if advert.kind == kind and not advert.paused and dtype in (None, advert.dtype):
            by_layer = held.setdefault(advert.dtype, {})
            for layer, bitmap in _clip(advert.held, layers).items():
                by_layer[layer] = by_layer.get(layer, 0) | bitmap
    return any(
        all(by_layer.get(layer, 0) == (1 << count) - 1 for layer, count in layers.items()) for by_layer in held.values()
    )


def choose_dtype(
    adverts: Iterable[Known],
    requested: Dtype | None = None,
    layers: Mapping[int, int] | None = None,
    *,
    kind: str | None = None,
) -> Dtype:
    """The one dtype of an answer: the requested one, else the first of :func:`rank_dtypes`."""
    return requested if requested is not None else rank_dtypes(adverts, layers, kind=kind)[0]


def rank_dtypes(
    adverts: Iterable[Known], layers: Mapping[int, int] | None = None, *, kind: str | None = None
) -> list[Dtype]:
    """All dtypes, best first. An answer is made in one, and an advert may lie, so no single peer should decide.

    First come those in which every expert has a host. Among them more hosts of the rarest expert are better (at most
    :data:`REPLICAS` count); among the others, more experts with a host. Ties go to the more exact (f32, bf16, f16).

    Args:
        layers: experts per layer, from the manifest; claims to others don't count. Without it, whatever anyone claims
            in any dtype is needed.
        kind: adverts of another kind (``"moe"``, ``"dense"``) don't count.
    """
    # Per dtype and layer, bitmaps: bit e of the n-th says that expert e has more than n hosts.
    held: dict[str, dict[int, list[int]]] = {dtype: {} for dtype in DTYPES}
    for known in adverts:
        if kind is not None and known.advert.kind != kind:
            continue
        for layer, bitmap in _clip(known.advert.held, layers).items():
            counts = held[known.advert.dtype].setdefault(layer, [])
            for n, at_least in enumerate(counts):
                counts[n], bitmap = at_least | bitmap, at_least & bitmap
            if bitmap and len(counts) < REPLICAS:
                counts.append(bitmap)
    needed: dict[int, int] = {}
    if layers is not None:
        needed = {layer: (1 << count) - 1 for layer, count in layers.items()}
    else:
        for by_layer in held.values():
            for layer, counts in by_layer.items():
                needed[layer] = needed.get(layer, 0) | (counts[0] if counts else 0)

    def get_merit(dtype: Dtype) -> tuple[int, int]:
        by_layer = held[dtype]
        least = min(
            (sum(at_least == needed[layer] for at_least in by_layer.get(layer, ())) for layer in needed), default=0
        )
        return least, sum(counts[0].bit_count() for counts in by_layer.values() if counts)

    return sorted(DTYPES, key=get_merit, reverse=True)  # stable, also in reverse


def _clip(held: Mapping[int, bytes], layers: Mapping[int, int] | None) -> dict[int, int]:
    """Bitmaps as integers, without what ``layers`` doesn't have."""
    bitmaps = {layer: int.from_bytes(bitmap, "little") for layer, bitmap in held.items()}
    if layers is None:
        return bitmaps
    return {layer: bitmap & ((1 << layers[layer]) - 1) for layer, bitmap in bitmaps.items() if layer in layers}
