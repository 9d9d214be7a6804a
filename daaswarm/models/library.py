"""The models in the cache: which there are, where one is, and away with it. No torch."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from daaswarm.errors import ConfigError, ModelError
from daaswarm.models.cache import try_lock
from daaswarm.models.checkpoint import ITEM_BYTES
from daaswarm.models.manifest import Manifest, Progress
from daaswarm.models.manifest_file import MANIFEST_NAME, load_manifest
from daaswarm.models.sources import DEFAULT_MODEL, find_known
from daaswarm.systems import expand_user


class Kept(NamedTuple):
    """One row of ``model list``.

    Attributes:
        bytes: of its tensors; 0 if that isn't known.
        dtype: that most of them are stored in.
        note: what is the matter with it.
    """

    name: str
    kind: str
    root: str
    bytes: int
    dtype: str
    folder: str
    in_cache: bool
    note: str = ""


def list_kept(cache: Path) -> list[Kept]:
    """All models in the cache, those that can't be read included; last those that a pull left unfinished, for they may
    have the root of a finished one."""
    found: list[Kept] = []
    unfinished: list[Kept] = []
    models = cache / "models"
    for folder in sorted(models.iterdir()) if models.is_dir() else ():
        name = folder.name
        if not folder.is_dir():
            continue
        if name.startswith("."):
            if name.endswith(".partial"):
                root = name.removeprefix(".root-").removesuffix(".partial")
                unfinished.append(Kept(name, "", root, 0, "", str(folder), True, "unfinished: pull it again to go on"))
            continue
        try:
            found.append(describe_kept(name, folder, load_manifest(folder / MANIFEST_NAME)))
        except ModelError as error:
            found.append(Kept(name, "", "", 0, "", str(folder), True, error.message))
    return found + unfinished


def describe_kept(name: str, folder: Path, manifest: Manifest) -> Kept:
    """A model's row."""
    sizes: dict[str, int] = {}
    for entry in manifest.entries:
        nbytes = math.prod(entry.shape) * ITEM_BYTES[entry.dtype]
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + nbytes
    most = max(sizes, key=lambda dtype: sizes[dtype], default="").lower()
    return Kept(name, manifest.kind, manifest.root, sum(sizes.values()), most, str(folder), True)


def locate_folder(name_or_path: str, cache: Path, progress: Progress) -> Path:
    """The checkpoint folder that a user means. Nothing is fetched; a GGUF file is converted if need be.

    Raises:
        ModelError: there is none on this machine.
    """
    path = expand_user(name_or_path)
    if name_or_path.lower() in (DEFAULT_MODEL, "default"):
        path = cache / "models" / DEFAULT_MODEL
        if not path.is_dir():
            raise ModelError(f"{DEFAULT_MODEL} is not on this machine yet", hint="daaswarm model pull fetches it")
        return path
    if path.is_dir():
        return path.resolve()
    if path.is_file() and path.suffix.lower() == ".gguf":
        from daaswarm.models.gguf import prepare_gguf

        return prepare_gguf(path.resolve(), cache, progress)
    known = None if path.exists() else find_known(name_or_path, cache)
    if known is None:
        raise ModelError(
            f"there is no model {name_or_path} on this machine", hint="see daaswarm model list, or get one: model pull"
        )
    return known.folder


def forget_folder(folder: Path) -> None:
    """Remove a model's folder from the cache: its name goes at once, so that nobody finds half of it. Of a link to a
    folder elsewhere only the link is removed.

    Raises:
        ConfigError: another process makes it right now, or the cache can't be written.
    """
    base = folder.name.removeprefix(".").removesuffix(".partial") if folder.name.startswith(".") else folder.name
    try:
        lock = try_lock(folder.with_name(f".{base}.lock"))
        if lock is None:
            raise ConfigError(f"another process is making {base}", hint="wait for it, or stop it")
        try:
            if folder.is_symlink():
                folder.unlink()
                return
            doomed = folder.with_name(f".{base}-removed")
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
            shutil.rmtree(doomed)
        finally:
            os.close(lock)
    except OSError as error:
        raise ConfigError(f"{folder} can't be removed: {error}", hint="check its owner and mode") from None
