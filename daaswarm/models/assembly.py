"""A checkpoint that is put together from pieces of others: one folder, which counts as a model when it is whole.

The manifest, checked against the model's root, says all that belongs there. Pieces are written to their final place in
a hidden folder and count for nothing until the hash of their part is right; whoever goes on after a kill hashes what
is there, so no journal can lie. The folder gets its name, by one rename, when every part is right.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from daaswarm.errors import ConfigError, ModelError
from daaswarm.limits import MIB
from daaswarm.models.cache import publish
from daaswarm.models.checkpoint import HEADER_BYTES, ITEM_BYTES, Checkpoint
from daaswarm.models.files import FILES, SMALL_FILE_BYTES
from daaswarm.models.manifest import Entry, Manifest, Progress
from daaswarm.models.manifest_file import MANIFEST_NAME, save_manifest
from daaswarm.models.parts import hash_parts
from daaswarm.types import ModelRoot

WEIGHTS_NAME = "model.safetensors"
UNIT_BYTES = 8 * MIB  # of small parts that are asked of one peer together; a larger part is one by itself
SPARE_BYTES = 64 * MIB  # that the disk keeps free
_TEMPLATE = re.compile(r"additional_chat_templates/[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\.jinja")


class Unit(NamedTuple):
    """Some parts of one tensor that lie side by side: what one peer is asked for, and what is believed or not.

    Attributes:
        offset: of the first byte in the tensor.
    """

    entry: Entry
    first: int
    count: int
    offset: int
    nbytes: int


def get_pulled_folder(cache: Path, root: ModelRoot) -> Path:
    """Where a model that came from peers lies."""
    return cache / "models" / f"root-{root}"


def check_names(manifest: Manifest) -> None:
    """Only files that a model may have beside its tensors; a name is never a path of somebody's choice.

    Raises:
        ModelError: another name is in it.
    """
    for name in manifest.files:
        if name not in FILES and not _TEMPLATE.fullmatch(name):
            raise ModelError(
                f"the manifest names a file {name[:80]!r} that no model has", hint="whoever made this model is hostile"
            )


class Assembly:
    """The folder of one model in the making. Only one process may have it open: hold its lock.

    Args:
        manifest: its root is the one that was asked for.

    Raises:
        ModelError: the manifest names files that no model has.
        ConfigError: the disk has no room for it.
    """

    def __init__(self, manifest: Manifest, cache: Path) -> None:
        check_names(manifest)
        self.manifest = manifest
        self.root = ModelRoot(manifest.root)
        self.folder = get_pulled_folder(cache, self.root)
        self.partial = self.folder.with_name(f".{self.folder.name}.partial")
        self._header, self._starts = _make_header(manifest)
        self.total = sum(get_bytes(entry) for entry in manifest.entries)
        self.partial.mkdir(parents=True, exist_ok=True)
        self._is_new = not (self.partial / WEIGHTS_NAME).exists()
        self._fd = os.open(
            self.partial / WEIGHTS_NAME,
            os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0),
            0o644,
        )
        try:
            self._check_room()
            _write_at(self._fd, self._header, 0)
            os.ftruncate(self._fd, len(self._header) + self.total)
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _check_room(self) -> None:
        found = os.fstat(self._fd)
        there = getattr(found, "st_blocks", 0) * 512  # POSIX's unit of st_blocks
        free = shutil.disk_usage(self.partial).free
        if self.total - there + SPARE_BYTES > free:
            raise ConfigError(
                f"the model takes {self.total} bytes, {free} are free at {self.partial.parent}",
                hint="make room or choose another cache (DAASWARM_CACHE)",
            )

    # -- small files --------------------------------------------------------------------------------------------

    def get_missing_files(self) -> list[str]:
        """The small files that are not there, or not right."""
        missing: list[str] = []
        for name, digest in sorted(self.manifest.files.items()):
            path = self.partial / name
            try:
                right = path.stat().st_size <= SMALL_FILE_BYTES and hashlib.sha256(path.read_bytes()).digest() == digest
            except OSError:
                right = False
            if not right:
                missing.append(name)
        return missing

    def put_file(self, name: str, data: bytes) -> bool:
        """Write a small file if it is what the manifest says."""
        if hashlib.sha256(data).digest() != self.manifest.files[name]:
            return False
        path = self.partial / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return True

    # -- tensors ------------------------------------------------------------------------------------------------

    def list_units(self) -> list[Unit]:
        """All tensors, in parts that can be checked by themselves."""
        return [unit for entry in self.manifest.entries for unit in split(entry)]

    def find_missing(self, progress: Progress) -> list[Unit]:
        """The units that are not there, or not right: everything in a new folder."""
        units = self.list_units()
        if self._is_new:
            return units
        missing: list[Unit] = []
        done = 0
        for unit in units:
            if not self.verify(unit):
                missing.append(unit)
            done += unit.nbytes
            progress("checking what is there", done, self.total)
        return missing

    def write(self, unit: Unit, offset: int, data: memoryview) -> None:
        """Put bytes of a unit in their place; ``offset`` counts from the unit's first. They count for nothing yet."""
        assert offset >= 0 and offset + len(data) <= unit.nbytes
        _write_at(self._fd, data, self._starts[unit.entry.name] + unit.offset + offset)

    def verify(self, unit: Unit) -> bool:
        """Whether what is there is what the manifest says."""
        start = self._starts[unit.entry.name]

        def read_into(name: str, offset: int, buffer: memoryview) -> None:
            _read_at(self._fd, buffer, start + offset)

        hashes = hash_parts(read_into, unit.entry, unit.first, unit.count)
        return hashes == unit.entry.hashes[unit.first : unit.first + unit.count]

    def finish(self) -> Path:
        """Give the folder its name. Everything was verified before."""
        self.close()
        save_manifest(self.manifest, self.partial / MANIFEST_NAME)
        for path in self.partial.rglob("*"):  # of an earlier try, or of somebody else
            name = path.relative_to(self.partial).as_posix()
            if path.is_file() and name not in {WEIGHTS_NAME, MANIFEST_NAME, *self.manifest.files}:
                path.unlink()
        with Checkpoint(self.partial) as checkpoint:  # can be opened, as any other
            assert len(checkpoint.tensors) == len(self.manifest.entries)
        self.partial.chmod(0o755)
        publish(self.partial, self.folder)
        return self.folder


def split(entry: Entry) -> Iterator[Unit]:
    """A tensor as units, from its first byte to its last."""
    nbytes = get_bytes(entry)
    if entry.parts == 1 or math.prod(entry.shape[: entry.axis]) != 1 or nbytes == 0:  # each part lies in every row
        yield Unit(entry, 0, entry.parts, 0, nbytes)
        return
    size = nbytes // entry.parts
    step = max(UNIT_BYTES // size, 1)
    for first in range(0, entry.parts, step):
        count = min(step, entry.parts - first)
        yield Unit(entry, first, count, first * size, count * size)


def get_bytes(entry: Entry) -> int:
    """Of one whole tensor."""
    return math.prod(entry.shape) * ITEM_BYTES[entry.dtype]


def _make_header(manifest: Manifest) -> tuple[bytes, dict[str, int]]:
    """The beginning of the safetensors file, and where in the file each tensor starts."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    offsets: dict[str, int] = {}
    for entry in sorted(manifest.entries, key=lambda e: (-ITEM_BYTES[e.dtype], e.name)):  # as the format aligns them
        nbytes = get_bytes(entry)
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [at, at + nbytes]}
        offsets[entry.name] = at
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_BYTES:
        raise ModelError("the manifest has more tensors than one file can hold")
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + offset for name, offset in offsets.items()}


def _write_at(file: int, data: bytes | memoryview, position: int) -> None:
    view = memoryview(data)
    while len(view):
        if hasattr(os, "pwrite"):
            done = os.pwrite(file, view, position)
        else:
            os.lseek(file, position, os.SEEK_SET)
            done = os.write(file, view)
        view, position = view[done:], position + done


def _read_at(file: int, buffer: memoryview, position: int) -> None:
    done = 0
    while done < len(buffer):
        if hasattr(os, "preadv"):
            got = os.preadv(file, [buffer[done:]], position + done)
        else:
            os.lseek(file, position + done, os.SEEK_SET)
            data = os.read(file, len(buffer) - done)
            buffer[done : done + len(data)] = data
            got = len(data)
        if not got:
            raise ModelError("the file of a model in the making ended early", hint="is the disk all right? try again")
        done += got


def remove_partial(cache: Path, root: ModelRoot) -> None:
    """Forget what was pulled of a model."""
    folder = get_pulled_folder(cache, root)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder.with_name(f".{folder.name}.partial"))
