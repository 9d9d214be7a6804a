"""The parts of tensors: hashed once, and read with their hash checked. Bounded memory, exact byte ranges."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import msgspec

from daaswarm.errors import ModelError
from daaswarm.limits import MIB
from daaswarm.models.checkpoint import ITEM_BYTES, Checkpoint, Tensor
from daaswarm.models.manifest import Entry, Progress

BLOCK_BYTES = 8 * MIB  # read at once while hashing
STRIDE_BYTES = 64 * MIB  # of a row that all parts have a piece of, which is held whole; in the largest models 512 KiB


def read_parts(checkpoint: Checkpoint, entry: Entry, parts: list[int], *, where: Path) -> bytearray:
    """The bytes of some parts of a tensor, in the order given, each checked against its hash.

    They are as if the tensor had only those parts along ``entry.axis``. Reads their bytes and no others.

    Args:
        where: the manifest file, named if they differ.

    Raises:
        ModelError: the checkpoint is not what the manifest says.
    """
    outer, run = _get_runs(entry)
    if outer * run * entry.parts != checkpoint.tensors[entry.name].nbytes or not all(
        0 <= part < entry.parts for part in parts
    ):
        raise ModelError(
            f"{checkpoint.folder}: tensor {entry.name} has no such parts as the manifest says", hint=hint_for(where)
        )
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
        if content.digest() != entry.hashes[part]:
            which = f" (part {part} of {entry.parts})" if entry.parts > 1 else ""
            raise ModelError(
                f"{checkpoint.folder}: tensor {entry.name}{which} is not what the manifest says: it was altered",
                hint=hint_for(where),
            )
    return data


def hint_for(manifest: Path) -> str:
    return f"if you changed the checkpoint on purpose, delete {manifest}"


def fill_hashes(checkpoint: Checkpoint, entries: list[Entry], progress: Progress) -> list[Entry]:
    """The entries with their hashes, by name: one pass over the checkpoint, file by file, front to back."""
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
        msgspec.structs.replace(entry, hashes=hash_parts(checkpoint.read_into, entry, 0, entry.parts, advance))
        for entry in sorted(entries, key=where)
    ]
    return sorted(filled, key=lambda entry: entry.name)


def hash_parts(
    read_into: Callable[[str, int, memoryview], None],
    entry: Entry,
    first: int,
    count: int,
    advance: Callable[[int], None] = lambda size: None,
) -> list[bytes]:
    """The SHA-256 of ``count`` parts of one tensor from part ``first`` on, in one pass over their bytes.

    A tensor whose parts lie in every row is hashed whole.

    Args:
        read_into: fills a buffer from an offset of the tensor of that name.
    """
    outer, run = _get_runs(entry)
    assert outer == 1 or count == entry.parts
    hashes = [hashlib.sha256() for _ in range(count)]
    total = outer * run * count
    stride = run * count
    begin = first * run
    if outer == 1 or entry.parts == 1 or total == 0:  # each part is one run
        stride, run = total, total // count
        step = BLOCK_BYTES
    else:
        step = max(BLOCK_BYTES // stride, 1) * stride
    buffer = memoryview(bytearray(min(step, total)))
    at = 0
    while at < total:
        block = buffer[: min(step, total - at)]
        read_into(entry.name, begin + at, block)
        if stride == total:
            _feed_contiguous(hashes, block, at, run)
        else:
            for part, digest in enumerate(hashes):
                digest.update(
                    b"".join(block[i + part * run : i + (part + 1) * run] for i in range(0, len(block), stride))
                )
        at += len(block)
        advance(len(block))
    return [digest.digest() for digest in hashes]


def _get_runs(entry: Entry) -> tuple[int, int]:
    """A tensor in memory is ``outer`` times (``parts`` runs of ``run`` bytes); part i is the i-th run of each.

    Raises:
        ModelError: a row is larger than :data:`STRIDE_BYTES`.
    """
    outer = math.prod(entry.shape[: entry.axis])
    run = math.prod(entry.shape) * ITEM_BYTES[entry.dtype] // max(outer * entry.parts, 1)
    if outer > 1 and entry.parts > 1 and run * entry.parts > STRIDE_BYTES:
        raise ModelError(
            f"tensor {entry.name} has rows of {run * entry.parts} bytes, cut into {entry.parts} parts each;"
            f" {STRIDE_BYTES} is the limit",
            hint="whoever made this model is hostile, or its file damaged",
        )
    return outer, run


def _feed_contiguous(hashes: list[hashlib._Hash], block: memoryview, at: int, run: int) -> None:
    done = 0
    while done < len(block):
        part, inside = divmod(at + done, run)
        size = min(run - inside, len(block) - done)
        hashes[part].update(block[done : done + size])
        done += size


def _group_neighbours(parts: list[int]) -> list[tuple[int, int, int]]:
    """``[4, 5, 9]`` → ``[(4, 2, 0), (9, 1, 2)]``: first part, how many, where in the result."""
    groups: list[tuple[int, int, int]] = []
    for at, part in enumerate(parts):
        if groups and groups[-1][0] + groups[-1][1] == part:
            groups[-1] = groups[-1][0], groups[-1][1] + 1, groups[-1][2]
        else:
            groups.append((part, 1, at))
    return groups
