"""What a model is made of and how it is split, and the Merkle root over all of it, which names the model.

A *part* is what one host may hold alone: an expert inside a fused three-dimensional tensor, a slice of a dense FFN
matrix, or else a whole tensor. The root covers everything that decides what is computed: the split plan, the small
files (configuration, tokenizer, chat template), and for each part whose it is, its dtype, shape and content. The
manifest keeps it, so that a host of a dense model never builds the architecture, and nobody hashes a checkpoint twice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from daaswarm.errors import ModelError
from daaswarm.limits import MIB
from daaswarm.messages import decode
from daaswarm.models.checkpoint import DIMENSION, ITEM_BYTES, NAME_CHARS, RANK, TENSORS
from daaswarm.models.files import CONFIG_NAME
from daaswarm.types import DTYPE_BYTES, Dtype, ModelRoot

VERSION = 2
MANIFEST_BYTES = 256 * MIB  # 100,000 tensors of 100 bytes, and a hash for each of 1,000,000 parts
PARTS = 1_000_000  # of one model; 100 layers of 512 experts of three matrices are 150,000
PARAMETERS = 1 << 44  # of one tensor, expert or layer: 17 trillion, more than any whole model has
TRUNK = -1  # the layer of a tensor that stays with the requester
SHARED = -1  # the owner of a tensor that every host of its layer holds

Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done, bytes in all."""

Kind = Literal["moe", "dense"]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Count = Annotated[int, Meta(ge=0, le=PARAMETERS)]
LayerNumber = Annotated[int, Meta(ge=0, le=65_535)]


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tensor of the checkpoint and whose it is.

    With ``parts`` > 1 the tensor is cut along ``axis`` (0 or 1) into equal parts, and part ``i`` belongs to expert
    (or slice) ``i``. With ``parts`` == 1 the whole tensor belongs to expert ``owner`` of ``layer``, to each host of
    that layer (``SHARED``), or, if ``layer`` is ``TRUNK``, to the requester.

    Attributes:
        param: the parameter inside the experts module or dense FFN that it becomes, or a part of it.
        hashes: the SHA-256 of each part's bytes, row by row.
    """

    name: Annotated[str, Meta(max_length=NAME_CHARS)]
    dtype: Annotated[str, Meta(max_length=8)]
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=DIMENSION)]], Meta(max_length=RANK)]
    layer: Annotated[int, Meta(ge=TRUNK, le=65_535)] = TRUNK
    param: Annotated[str, Meta(max_length=256)] = ""
    axis: Annotated[int, Meta(ge=0, le=1)] = 0
    parts: Annotated[int, Meta(ge=1, le=65_536)] = 1
    owner: Annotated[int, Meta(ge=SHARED, le=65_535)] = SHARED
    hashes: Annotated[list[Digest], Meta(max_length=65_536)] = []

    @property
    def shape_of_part(self) -> list[int]:
        return [n // self.parts if d == self.axis else n for d, n in enumerate(self.shape)]

    def is_of(self, experts: set[int]) -> bool:
        """Does a host of these experts of this layer need any of it?"""
        return self.parts > 1 or self.owner == SHARED or self.owner in experts


class Layer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One split layer.

    Attributes:
        experts: how many experts, or slices of the dense FFN.
        numel: parameters of one expert or slice.
        shared: parameters beyond them that each host holds.
    """

    experts: Annotated[int, Meta(ge=1, le=65_536)]
    numel: Count
    shared: Count = 0


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that is known of a checkpoint without reading it.

    Attributes:
        hidden: the width of the rows that go to experts.
        activation: of a dense FFN, a key of :data:`daaswarm.models.dense.ACTIVATIONS`; empty for MoE.
        files: the SHA-256 of each small file (:data:`daaswarm.models.files.FILES`) that the checkpoint has.
    """

    version: int
    root: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    kind: Kind
    hidden: Annotated[int, Meta(ge=1, le=1 << 20)]
    activation: Annotated[str, Meta(max_length=64)]
    files: Annotated[dict[Annotated[str, Meta(max_length=256)], Digest], Meta(max_length=256)]
    layers: Annotated[dict[LayerNumber, Layer], Meta(min_length=1, max_length=65_536)]
    entries: Annotated[list[Entry], Meta(max_length=TENSORS)]

    def of_layer(self, layer: int) -> list[Entry]:
        return [entry for entry in self.entries if entry.layer == layer]

    def get_expert_bytes(self, layer: int, dtype: Dtype) -> int:
        """Memory that one expert of a layer takes, without what the layer's experts share."""
        return self.layers[layer].numel * DTYPE_BYTES[dtype]


# -- leaves and root ----------------------------------------------------------------------------------------------


def get_root(manifest: Manifest) -> ModelRoot:
    """The Merkle root over :func:`get_leaves`, bound to their number; ``manifest.root`` is not looked at.

    0x00 sets leaves apart from nodes, 0x01, and both from the root, 0x02 (RFC 6962, section 2.1). An odd node moves
    up unchanged; the number of leaves makes that unambiguous.
    """
    row = list(get_leaves(manifest))
    count = len(row)
    while len(row) > 1:
        pairs = [hashlib.sha256(b"\1" + a + b).digest() for a, b in zip(row[::2], row[1::2], strict=False)]
        row = pairs + row[len(row) - len(row) % 2 :]
    domain = f"\2daaswarm/manifest/{VERSION}".encode()
    return ModelRoot(hashlib.sha256(domain + count.to_bytes(8, "big") + row[0]).hexdigest())


def get_leaves(manifest: Manifest) -> Iterator[bytes]:
    """The plan's leaf, then one for each file by name, then one for each part by (tensor, part)."""
    layers = [[number, layer.experts, layer.numel, layer.shared] for number, layer in sorted(manifest.layers.items())]
    yield _get_leaf("plan", manifest.version, manifest.kind, manifest.hidden, manifest.activation, layers)
    for name, digest in sorted(manifest.files.items()):
        yield _get_leaf("file", name, digest.hex())
    for e in sorted(manifest.entries, key=lambda entry: entry.name):
        for part, digest in enumerate(e.hashes):
            where = (e.name, e.layer, e.param, e.owner, e.axis, e.parts, part)
            yield _get_leaf("part", *where, e.dtype, e.shape, digest.hex())


def _get_leaf(*fields: object) -> bytes:
    """JSON of strings, integers and lists is canonical as it is written here: ASCII, without spaces."""
    return hashlib.sha256(b"\0" + json.dumps(fields, separators=(",", ":")).encode()).digest()


# -- reading one --------------------------------------------------------------------------------------------------


class OutdatedManifest(ModelError):
    """A manifest of an older version: to be built again."""


class _Versioned(msgspec.Struct):
    version: int


def parse_manifest(data: bytes, *, what: str, hint: str) -> Manifest:
    """A manifest from its bytes; its root is computed again from all that it says.

    Args:
        what: begins the sentence of each error.

    Raises:
        OutdatedManifest: of an older version.
        ModelError: damaged, of an unknown version, or not self-consistent.
    """
    try:
        version = decode(_Versioned, data).version  # type: ignore[attr-defined]
        if version == VERSION:
            manifest: Manifest = decode(Manifest, data)  # type: ignore[assignment]
        elif 1 <= version < VERSION:
            raise OutdatedManifest(f"{what} is a manifest of version {version}, not {VERSION}", hint=hint)
        else:
            raise ModelError(f"{what} is a manifest of the unknown version {version}, not {VERSION}", hint=hint)
    except msgspec.DecodeError as error:
        raise ModelError(f"{what} is not a manifest: {str(error)[:200]}", hint=hint) from None
    for wrong in _find_contradictions(manifest):
        raise ModelError(f"{what}: {wrong}", hint=hint)
    if get_root(manifest) != manifest.root:
        raise ModelError(f"{what}: its root is not that of what it says: it was altered", hint=hint)
    return manifest


def _find_contradictions(manifest: Manifest) -> Iterator[str]:
    if CONFIG_NAME not in manifest.files:
        yield f"{CONFIG_NAME} is not in it"
    if (manifest.kind == "moe") != (manifest.activation == ""):
        yield f"a {manifest.kind} model with the activation {manifest.activation[:40]!r}"
    if sum(entry.parts for entry in manifest.entries) > PARTS:
        yield f"it has over {PARTS} parts"
    names: set[str] = set()
    claimed: dict[tuple[int, str], Entry] = {}  # (layer, parameter): an entry that becomes it
    for entry in manifest.entries:
        if entry.name in names:
            yield f"tensor {entry.name!r} occurs twice"
        names.add(entry.name)
        if not entry.name.isprintable():
            yield f"the tensor name {entry.name!r} is not printable"
        if not _is_consistent(manifest, entry):
            yield f"the entry of tensor {entry.name} contradicts itself"
        if entry.layer != TRUNK:
            other = claimed.setdefault((entry.layer, entry.param), entry)
            if other is not entry and _overlap(manifest, entry, other):
                yield f"tensors {other.name} and {entry.name} overlap: both are {entry.param} of layer {entry.layer}"


def _is_consistent(manifest: Manifest, entry: Entry) -> bool:
    if entry.dtype not in ITEM_BYTES or len(entry.hashes) != entry.parts or math.prod(entry.shape) > PARAMETERS:
        return False
    if entry.layer == TRUNK:
        return entry.parts == 1 and entry.owner == SHARED and not entry.param
    layer = manifest.layers.get(entry.layer)
    if layer is None or not entry.param or entry.owner >= layer.experts:
        return False
    if entry.parts == 1:
        return True
    cuts = entry.axis < len(entry.shape) and entry.shape[entry.axis] % entry.parts == 0
    return cuts and entry.parts == layer.experts and entry.owner == SHARED


def _overlap(manifest: Manifest, entry: Entry, other: Entry) -> bool:
    """May not both become one parameter? Of a MoE several tensors are joined in one (gate and up), all of one form."""

    def form(e: Entry) -> tuple[bool, bool]:
        return e.parts > 1, e.owner == SHARED

    return manifest.kind == "dense" or form(entry) != form(other)
