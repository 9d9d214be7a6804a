"""The manifest on disk, and whether it is that of the checkpoint beside it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import msgspec

from daaswarm.errors import ModelError
from daaswarm.models.checkpoint import Checkpoint
from daaswarm.models.files import hash_files
from daaswarm.models.manifest import MANIFEST_BYTES, Manifest, parse_manifest
from daaswarm.models.parts import hint_for

MANIFEST_NAME = "daaswarm-manifest.msgpack"


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
    """A manifest from disk.

    Raises:
        ModelError: see :func:`parse_manifest`; unreadable or too large.
    """
    rebuild = f"delete {path}: it is built again from the checkpoint"
    try:
        if path.stat().st_size > MANIFEST_BYTES:
            raise ModelError(f"{path} is larger than {MANIFEST_BYTES} bytes", hint=rebuild)
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error}", hint="check its permissions") from None
    return parse_manifest(data, what=str(path), hint=rebuild)


def check_against(manifest: Manifest, checkpoint: Checkpoint, *, where: Path) -> None:
    """Presence, dtype and shape of every tensor, and the small files; tensors' content is checked when it is read.

    Raises:
        ModelError: names the first that differs.
    """
    files = hash_files(checkpoint.folder)
    for name in sorted(files.keys() | manifest.files.keys()):
        if files.get(name) == manifest.files.get(name):
            continue
        how = "is missing" if name not in files else "is not what the manifest says: it was altered"
        how = how if name in manifest.files else "is not in the manifest"
        raise ModelError(f"{checkpoint.folder}: {name} {how}", hint=hint_for(where))
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
