"""MODEL on the command line: the default's name, a folder in Hugging Face layout, or a GGUF file.

Importable without torch and transformers; both are imported only when a model is seen for the first time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import msgspec

from daaswarm.errors import ModelError
from daaswarm.models.checkpoint import Checkpoint
from daaswarm.models.files import hash_files
from daaswarm.models.manifest import VERSION, Manifest, OutdatedManifest, Progress, get_root, parse_manifest
from daaswarm.models.manifest_file import MANIFEST_NAME, check_against, load_manifest, save_manifest
from daaswarm.models.parts import fill_hashes
from daaswarm.systems import expand_user
from daaswarm.types import DTYPE_BYTES, Dtype, ModelRoot

DEFAULT_MODEL = "smollm2-135m-instruct"
ROOT_PREFIX = 8  # digits of a root that stand for it where only one model's begins so
DEFAULT_NAMES = (DEFAULT_MODEL, "default")


class LocalModel(NamedTuple):
    """A model whose weights are on this machine.

    Attributes:
        manifest_path: where the manifest is kept; named when the checkpoint no longer matches it.
    """

    name: str
    folder: Path
    manifest: Manifest
    manifest_path: Path

    @property
    def root(self) -> ModelRoot:
        return ModelRoot(self.manifest.root)

    @property
    def kind(self) -> str:
        """``"moe"`` or ``"dense"``."""
        return self.manifest.kind

    @property
    def layers(self) -> dict[int, int]:
        """The split layers: how many experts (or slices) each has."""
        return {number: layer.experts for number, layer in self.manifest.layers.items()}

    @property
    def hidden(self) -> int:
        """The width of the rows that go to experts."""
        return self.manifest.hidden

    def expert_bytes(self, layer: int, dtype: Dtype) -> int:
        """Memory that one expert (or slice) of a layer takes, bytes."""
        return self.manifest.get_expert_bytes(layer, dtype)

    def get_trunk_bytes(self, dtype: Dtype) -> int:
        """Memory that the requester's part takes, bytes."""
        sizes = [entry for entry in self.manifest.entries if entry.layer < 0]
        total = 0
        for entry in sizes:
            numel = 1
            for n in entry.shape:
                numel *= n
            total += numel * DTYPE_BYTES[dtype]
        return total


class KnownModel(NamedTuple):
    """A model that was prepared on this machine before."""

    name: str
    folder: Path
    root: ModelRoot


def ignore_progress(what: str, done: int, total: int) -> None:
    """A :data:`Progress` that shows nothing."""


def find_model(name_or_path: str, cache: Path, progress: Progress = ignore_progress) -> LocalModel:
    """Get a model ready: fetch or convert it if need be, and have its manifest. Blocks, the first time for long.

    Args:
        name_or_path: ``"default"``, the default's name, a folder in Hugging Face layout, a ``.gguf`` file, or the name
            or root of a model in the cache.
        cache: where downloads, conversions and manifests of read-only folders are kept.

    Raises:
        ModelError: unknown, no checkpoint, damaged, altered, quantised or impossible to split.
        Offline: the default model has to be fetched and can't be.
    """
    if name_or_path.lower() in DEFAULT_NAMES:
        from daaswarm.models.default import check_root, prepare_default

        model = open_folder(prepare_default(cache, progress), cache, progress, name=DEFAULT_MODEL)
        check_root(model.folder, model.root)
        return model
    path = expand_user(name_or_path)
    if path.is_dir():
        return open_folder(path.resolve(), cache, progress)
    if path.is_file() and path.suffix.lower() == ".gguf":
        from daaswarm.models.gguf import prepare_gguf

        return open_folder(prepare_gguf(path.resolve(), cache, progress), cache, progress, name=path.stem)
    if not path.exists() and (known := find_known(name_or_path, cache)) is not None:
        return open_folder(known.folder, cache, progress, name=known.name)
    what = (
        "is neither a folder nor a .gguf file" if path.exists() else "is not a known model, and there is no such path"
    )
    raise ModelError(
        f"{name_or_path} {what}",
        hint=f"use {DEFAULT_MODEL}, a folder in Hugging Face layout, a .gguf file, or a name of daaswarm model list",
    )


def open_folder(folder: Path, cache: Path, progress: Progress, *, name: str = "") -> LocalModel:
    """A checkpoint folder with its manifest, which is built if there is none yet.

    Raises:
        ModelError: see :func:`find_model`.
    """
    with Checkpoint(folder, sequential=True) as checkpoint:
        path, manifest = _find_manifest(folder, cache)
        if manifest is None:
            manifest = build_manifest(checkpoint, progress)
            path = _save_beside(manifest, folder, cache)
        else:
            check_against(manifest, checkpoint, where=path)
    return LocalModel(name or folder.name, folder, manifest, path)


def build_manifest(checkpoint: Checkpoint, progress: Progress) -> Manifest:
    """Work out the split and hash every part: one pass over the checkpoint.

    Raises:
        ModelError: it can't be split.
    """
    from daaswarm.models.plan import make_plan

    files = hash_files(checkpoint.folder)
    plan = make_plan(checkpoint)
    manifest = Manifest(
        version=VERSION,
        root="",
        kind=plan.kind,
        hidden=plan.hidden,
        activation=plan.activation,
        files=files,
        layers=plan.layers,
        entries=fill_hashes(checkpoint, plan.entries, progress),
    )
    manifest = msgspec.structs.replace(manifest, root=get_root(manifest))
    # What is saved must be what can be loaded, limits included.
    encoded = msgspec.msgpack.encode(manifest)
    return parse_manifest(encoded, what=f"{checkpoint.folder}: what it is split into", hint="choose another model")


def list_models(cache: Path) -> list[KnownModel]:
    """The models that this cache holds. Reads folder names and manifests, never weights."""
    found: list[KnownModel] = []
    for path in sorted((cache / "models").glob(f"*/{MANIFEST_NAME}")):
        if path.parent.name.startswith("."):
            continue  # being made, or left by somebody who was killed
        try:
            found.append(KnownModel(path.parent.name, path.parent, ModelRoot(load_manifest(path).root)))
        except ModelError:
            continue  # said when that model is used
    return found


def find_known(name: str, cache: Path) -> KnownModel | None:
    """The model in the cache of this name, or of this root: all of it, or :data:`ROOT_PREFIX` digits and more.

    Raises:
        ModelError: several roots begin like this.
    """
    models = list_models(cache)
    for model in models:
        if name in (model.name, model.root):
            return model
    found = {m.root: m for m in models if len(name) >= ROOT_PREFIX and m.root.startswith(name)}
    if len(found) > 1:
        raise ModelError(f"several models' roots begin with {name}: {', '.join(found)}", hint="write more digits")
    return next(iter(found.values()), None)


def find_manifest(folder: Path, cache: Path) -> Manifest | None:
    """The manifest that a folder has from before, if any. Weights are not looked at.

    Raises:
        ModelError: it is damaged.
    """
    return _find_manifest(folder, cache)[1]


def _get_paths(folder: Path, cache: Path) -> tuple[Path, Path]:
    """Where a folder's manifest may be: in it, or if it is read-only in the cache."""
    key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
    return folder / MANIFEST_NAME, cache / "manifests" / f"{key}.msgpack"


def _find_manifest(folder: Path, cache: Path) -> tuple[Path, Manifest | None]:
    paths = _get_paths(folder, cache)
    for path in paths:
        if path.is_file():
            with contextlib.suppress(OutdatedManifest):
                return path, load_manifest(path)
    return paths[0], None


def _save_beside(manifest: Manifest, folder: Path, cache: Path) -> Path:
    beside, cached = _get_paths(folder, cache)
    try:
        save_manifest(manifest, beside)
    except OSError:
        try:
            save_manifest(manifest, cached)
        except OSError as error:
            raise ModelError(
                f"the manifest can be saved neither in {folder} nor in {cache}: {error}", hint="make one writable"
            ) from None
        return cached
    return beside
