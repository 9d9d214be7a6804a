"""What a model is made of: a SHA-256 leaf for each part of each tensor, and the Merkle root that names the model.

A *part* is what one host may hold alone: an expert inside a fused three-dimensional tensor, a slice of a dense FFN
matrix, or else a whole tensor. The root covers every leaf (name, part, dtype, shape and content), their number, and
``config.json``. Beside the leaves the manifest keeps the split plan, so that a host of a dense model never has to
build the architecture, and nobody hashes a checkpoint twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from daaswarm.errors import ModelError
from daaswarm.limits import MIB
from daaswarm.models.checkpoint import ITEM_BYTES, RANK, Checkpoint, Tensor
from daaswarm.types import DTYPE_BYTES, Dtype, ModelRoot

MANIFEST_NAME = "daaswarm-manifest.msgpack"
MANIFEST_BYTES = 256 * MIB  # 100,000 tensors of 100 bytes, and a leaf for each of 1,000,000 parts
VERSION = 1
BLOCK_BYTES = 8 * MIB  # read at once while hashing
TRUNK = -1  # the layer of a tensor that stays with the requester
SHARED = -1  # the owner of a tensor that every host of its layer holds

Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done, bytes in all."""

Kind = Literal["moe", "dense"]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Count = Annotated[int, Meta(ge=0, le=1 << 40)]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of the checkpoint and whose it is.

    With ``parts`` > 1 the tensor is cut along ``axis`` (0 or 1) into equal parts, and part ``i`` belongs to expert
    (or slice) ``i``. With ``parts`` == 1 the whole tensor belongs to expert ``owner`` of ``layer``, to each host of
    that layer (``SHARED``), or, if ``layer`` is ``TRUNK``, to the requester.

    Attributes:
        param: the parameter inside the experts module or dense FFN that it becomes, or a part of it.
        leaves: one for each part.
    """

    name: Annotated[str, Meta(max_length=1_024)]
    dtype: Annotated[str, Meta(max_length=8)]
    shape: Annotated[list[Count], Meta(max_length=RANK)]
    layer: Annotated[int, Meta(ge=TRUNK, le=65_535)] = TRUNK
    param: Annotated[str, Meta(max_length=256)] = ""
    axis: Annotated[int, Meta(ge=0, le=1)] = 0
    parts: Annotated[int, Meta(ge=1, le=65_536)] = 1
    owner: Annotated[int, Meta(ge=SHARED, le=65_535)] = SHARED
    leaves: Annotated[list[Digest], Meta(max_length=65_536)] = []

    @property
    def shape_of_part(self) -> list[int]:
        return [n // self.parts if d == self.axis else n for d, n in enumerate(self.shape)]

    def is_of(self, experts: set[int]) -> bool:
        """Does a host of these experts of this layer need any of it?"""
        return self.parts > 1 or self.owner == SHARED or self.owner in experts


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """One split layer.

    Attributes:
        experts: how many experts, or slices of the dense FFN.
        numel: parameters of one expert or slice.
        shared: parameters beyond them that each host holds.
    """

    experts: Annotated[int, Meta(ge=1, le=65_536)]
    numel: Count
    shared: Count = 0


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is known of a checkpoint without reading it.

    Attributes:
        hidden: the width of the rows that go to experts.
        activation: of a dense FFN, a key of :data:`daaswarm.models.dense.ACTIVATIONS`; empty for MoE.
    """

    version: int
    root: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    kind: Kind
    hidden: Annotated[int, Meta(ge=1, le=1 << 20)]
    activation: Annotated[str, Meta(max_length=64)]
    config_sha256: Digest
    layers: Annotated[dict[Annotated[int, Meta(ge=0, le=65_535)], Layer], Meta(max_length=65_536)]
    entries: Annotated[list[Entry], Meta(max_length=1_000_000)]

    def of_layer(self, layer: int) -> list[Entry]:
        return [entry for entry in self.entries if entry.layer == layer]

    def get_expert_bytes(self, layer: int, dtype: Dtype) -> int:
        """Memory that one expert of a layer takes, without what the layer's experts share."""
        return self.layers[layer].numel * DTYPE_BYTES[dtype]


# -- leaves and root ----------------------------------------------------------------------------------------------


def get_leaf(entry: Entry, part: int, content: bytes) -> bytes:
    """The leaf of one part, from the SHA-256 of its bytes (row-major). 0x00 sets leaves apart from nodes (RFC 6962)."""
    what = [entry.name, part, entry.parts, entry.axis, entry.dtype, entry.shape]
    return hashlib.sha256(b"\0" + json.dumps(what, separators=(",", ":")).encode() + b"\0" + content).digest()


def get_root(entries: Sequence[Entry], config_sha256: bytes) -> ModelRoot:
    """The Merkle root over the leaves sorted by (tensor, part), bound to their number and to ``config.json``.

    An odd node moves up unchanged; the number of leaves makes that unambiguous.
    """
    row = [leaf for entry in sorted(entries, key=lambda e: e.name) for leaf in entry.leaves]
    count = len(row)
    while len(row) > 1:
        pairs = [hashlib.sha256(b"\1" + a + b).digest() for a, b in zip(row[::2], row[1::2], strict=False)]
        row = pairs + row[len(row) - len(row) % 2 :]
    top = row[0] if row else bytes(32)
    return ModelRoot(
        hashlib.sha256(b"\2daaswarm/manifest/1" + config_sha256 + count.to_bytes(8, "big") + top).hexdigest()
    )


def _get_runs(entry: Entry) -> tuple[int, int]:
    """A tensor in memory is ``outer`` times (``parts`` runs of ``run`` bytes); part i is the i-th run of each."""
    outer = math.prod(entry.shape[: entry.axis])
    return outer, math.prod(entry.shape) * ITEM_BYTES[entry.dtype] // max(outer * entry.parts, 1)


def hash_entry(checkpoint: Checkpoint, entry: Entry, advance: Callable[[int], None]) -> list[bytes]:
    """The leaves of one tensor, in one pass over its bytes with bounded memory."""
    outer, run = _get_runs(entry)
    hashes = [hashlib.sha256() for _ in range(entry.parts)]
    total = outer * run * entry.parts
    stride = run * entry.parts
    if outer == 1 or entry.parts == 1:  # each part is one run
        stride, run = total, total // entry.parts
        step = BLOCK_BYTES
    else:
        step = max(BLOCK_BYTES // stride, 1) * stride
    buffer = memoryview(bytearray(min(step, total)))
    at = 0
    while at < total:
        block = buffer[: min(step, total - at)]
        checkpoint.read_into(entry.name, at, block)
        if stride == total:
            _feed_contiguous(hashes, block, at, run)
        else:
            for part, digest in enumerate(hashes):
                digest.update(
                    b"".join(block[i + part * run : i + (part + 1) * run] for i in range(0, len(block), stride))
                )
        at += len(block)
        advance(len(block))
    return [get_leaf(entry, part, digest.digest()) for part, digest in enumerate(hashes)]


def _feed_contiguous(hashes: list[hashlib._Hash], block: memoryview, at: int, run: int) -> None:
    done = 0
    while done < len(block):
        part, inside = divmod(at + done, run)
        size = min(run - inside, len(block) - done)
        hashes[part].update(block[done : done + size])
        done += size


# -- reading checked ----------------------------------------------------------------------------------------------


def read_parts(checkpoint: Checkpoint, entry: Entry, parts: list[int], *, where: Path) -> bytearray:
    """The bytes of some parts of a tensor, in the order given, each checked against its leaf.

    They are as if the tensor had only those parts along ``entry.axis``. Reads their bytes and no others.

    Args:
        where: the manifest file, named if they differ.

    Raises:
        ModelError: the checkpoint is not what the manifest says.
    """
    outer, run = _get_runs(entry)
    data = bytearray(outer * run * len(parts))
    view = memoryview(data)
    stride = run * len(parts)
    for first, count, at in _group_neighbours(parts):
        if outer == 1 or count == len(parts) == entry.parts:  # one stretch of the file
            size = outer * run * count
            checkpoint.read_into(entry.name, first * run, view[at * run : at * run + size])
        else:
            for row in range(outer):
                begin = row * stride + at * run
                checkpoint.read_into(entry.name, (row * entry.parts + first) * run, view[begin : begin + run * count])
    for i, part in enumerate(parts):
        if len(parts) == 1 or outer == 1:
            content = hashlib.sha256(view[i * outer * run : (i + 1) * outer * run])
        else:
            content = hashlib.sha256(
                b"".join(view[row * stride + i * run : row * stride + (i + 1) * run] for row in range(outer))
            )
        if get_leaf(entry, part, content.digest()) != entry.leaves[part]:
            which = f" (part {part} of {entry.parts})" if entry.parts > 1 else ""
            raise ModelError(
                f"{checkpoint.folder}: tensor {entry.name}{which} is not what the manifest says: it was altered",
                hint=hint_for(where),
            )
    return data


def hint_for(manifest: Path) -> str:
    return f"if you changed the checkpoint on purpose, delete {manifest}"


def _group_neighbours(parts: list[int]) -> list[tuple[int, int, int]]:
    """``[4, 5, 9]`` → ``[(4, 2, 0), (9, 1, 2)]``: first part, how many, where in the result."""
    groups: list[tuple[int, int, int]] = []
    for at, part in enumerate(parts):
        if groups and groups[-1][0] + groups[-1][1] == part:
            groups[-1] = groups[-1][0], groups[-1][1] + 1, groups[-1][2]
        else:
            groups.append((part, 1, at))
    return groups


# -- on disk ------------------------------------------------------------------------------------------------------


def fill_leaves(checkpoint: Checkpoint, entries: list[Entry], progress: Progress) -> list[Entry]:
    """The entries with their leaves: one pass over the checkpoint, file by file, front to back."""
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        progress("hashing the checkpoint", done, total)

    def where(entry: Entry) -> tuple[str, int]:
        tensor: Tensor = checkpoint.tensors[entry.name]
        return tensor.file, tensor.start

    filled = [
        msgspec.structs.replace(entry, leaves=hash_entry(checkpoint, entry, advance))
        for entry in sorted(entries, key=where)
    ]
    return sorted(filled, key=lambda entry: entry.name)


def save_manifest(manifest: Manifest, path: Path) -> None:
    """Write it whole or not at all.

    Raises:
        OSError: the folder is not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.msgpack.encode(manifest))
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_manifest(path: Path) -> Manifest:
    """A manifest from disk; its root is computed again from its leaves.

    Raises:
        ModelError: damaged, of another version, or not self-consistent.
    """
    rebuild = f"delete {path}: it is built again from the checkpoint"
    try:
        if path.stat().st_size > MANIFEST_BYTES:
            raise ModelError(f"{path} is larger than {MANIFEST_BYTES} bytes", hint=rebuild)
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error}", hint="check its permissions") from None
    try:
        manifest = msgspec.msgpack.decode(data, type=Manifest)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ModelError(f"{path} is not a manifest: {str(error)[:200]}", hint=rebuild) from None
    if manifest.version != VERSION:
        raise ModelError(f"{path} is a manifest of version {manifest.version}, not {VERSION}", hint=rebuild)
    for entry in manifest.entries:
        bad = entry.dtype not in ITEM_BYTES or len(entry.leaves) != entry.parts
        bad = bad or (entry.layer != TRUNK and entry.layer not in manifest.layers)
        if entry.parts > 1:
            bad = bad or entry.axis >= len(entry.shape) or entry.shape[entry.axis] % entry.parts != 0
        if bad:
            raise ModelError(f"{path}: the entry of tensor {entry.name} contradicts itself", hint=rebuild)
    if get_root(manifest.entries, manifest.config_sha256) != manifest.root:
        raise ModelError(f"{path}: its root is not that of its leaves: it was altered", hint=rebuild)
    return manifest


def check_against(manifest: Manifest, checkpoint: Checkpoint, *, where: Path) -> None:
    """Presence, dtype and shape of every tensor, and ``config.json``; content is checked when it is read.

    Raises:
        ModelError: names the first that differs.
    """
    if hashlib.sha256(checkpoint.read_config()).digest() != manifest.config_sha256:
        raise ModelError(
            f"{checkpoint.folder}: config.json is not what the manifest says: it was altered", hint=hint_for(where)
        )
    known = {entry.name: entry for entry in manifest.entries}
    for name in sorted(known.keys() | checkpoint.tensors.keys()):
        if name not in checkpoint.tensors:
            raise ModelError(f"{checkpoint.folder}: tensor {name} is missing", hint=hint_for(where))
        if name not in known:
            raise ModelError(f"{checkpoint.folder}: tensor {name} is not in the manifest", hint=hint_for(where))
        tensor, entry = checkpoint.tensors[name], known[name]
        if (tensor.dtype, list(tensor.shape)) != (entry.dtype, entry.shape):
            raise ModelError(
                f"{checkpoint.folder}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, "
                f"the manifest says {entry.dtype} {entry.shape}",
                hint=hint_for(where),
            )
