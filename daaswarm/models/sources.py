"""MODEL on the command line: the default's name, a folder in Hugging Face layout, or a GGUF file.

Importable without torch and transformers; both are imported only when a model is seen for the first time.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from daaswarm.errors import ModelError
from daaswarm.models.checkpoint import Checkpoint
from daaswarm.models.manifest import (
    MANIFEST_NAME,
    VERSION,
    Manifest,
    Progress,
    check_against,
    fill_leaves,
    get_root,
    load_manifest,
    save_manifest,
)
from daaswarm.types import DTYPE_BYTES, Dtype, ModelRoot

DEFAULT_MODEL = "smollm2-135m-instruct"
_DEFAULT_NAMES = (DEFAULT_MODEL, "default")


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
        name_or_path: ``"default"``, the default's name, a folder in Hugging Face layout or a ``.gguf`` file.
        cache: where downloads, conversions and manifests of read-only folders are kept.

    Raises:
        ModelError: unknown, no checkpoint, damaged, altered, quantised or impossible to split.
        Offline: the default model has to be fetched and can't be.
    """
    if name_or_path.lower() in _DEFAULT_NAMES:
        from daaswarm.models.default import prepare_default

        return open_folder(prepare_default(cache, progress), cache, progress, name=DEFAULT_MODEL)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return open_folder(path.resolve(), cache, progress)
    if path.is_file() and path.suffix.lower() == ".gguf":
        from daaswarm.models.gguf import prepare_gguf

        return open_folder(prepare_gguf(path.resolve(), cache, progress), cache, progress, name=path.stem)
    what = (
        "is neither a folder nor a .gguf file" if path.exists() else "is not a known model, and there is no such path"
    )
    raise ModelError(
        f"{name_or_path} {what}",
        hint=f"use {DEFAULT_MODEL}, a folder in Hugging Face layout or a .gguf file",
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

    config = hashlib.sha256(checkpoint.read_config()).digest()
    plan = make_plan(checkpoint)
    entries = fill_leaves(checkpoint, plan.entries, progress)
    return Manifest(
        version=VERSION,
        root=get_root(entries, config),
        kind=plan.kind,
        hidden=plan.hidden,
        activation=plan.activation,
        config_sha256=config,
        layers=plan.layers,
        entries=entries,
    )


def list_models(cache: Path) -> list[KnownModel]:
    """The models that this cache holds. Reads folder names and manifests, never weights."""
    found: list[KnownModel] = []
    for path in sorted((cache / "models").glob(f"*/{MANIFEST_NAME}")):
        try:
            found.append(KnownModel(path.parent.name, path.parent, ModelRoot(load_manifest(path).root)))
        except ModelError:
            continue  # said when that model is used
    return found


def _get_paths(folder: Path, cache: Path) -> tuple[Path, Path]:
    """Where a folder's manifest may be: in it, or if it is read-only in the cache."""
    key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
    return folder / MANIFEST_NAME, cache / "manifests" / f"{key}.msgpack"


def _find_manifest(folder: Path, cache: Path) -> tuple[Path, Manifest | None]:
    paths = _get_paths(folder, cache)
    for path in paths:
        if path.is_file():
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
