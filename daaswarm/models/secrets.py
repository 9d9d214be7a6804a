"""A requester's secrets for auditing: made while a checkpoint is streamed once, kept in a file of its own, never sent.

They take some 3 % of the weights' bytes. Whoever knows the sketches can make up answers that pass, so the file is
readable by its owner only. One layer is read at a time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from daaswarm.errors import ModelError, StorageError
from daaswarm.models.auditing import FfnSecrets, Stage, join_slices, round_up
from daaswarm.models.checkpoint import Checkpoint
from daaswarm.models.experts import LayerExperts, read_experts
from daaswarm.models.manifest import Progress
from daaswarm.models.sources import LocalModel, ignore_progress
from daaswarm.systems import create_private
from daaswarm.types import Dtype, ModelRoot

ROWS = 16  # of a sketch
VERSION = "1"
HINT = "make it again: daaswarm model prepare MODEL --audit --dtype DTYPE"
_PARTS = ("gate", "up", "down")


class Form(NamedTuple):
    """A layer whose experts (or slices) are gated FFNs without biases: what can be audited.

    Attributes:
        activation: a key of :data:`daaswarm.models.dense.ACTIVATIONS`.
        matrices: for each expert held gate, up (width, hidden) and down (hidden, width).
    """

    activation: str
    matrices: Sequence[tuple[Tensor, Tensor, Tensor]]


def get_path(cache: Path, root: ModelRoot, dtype: Dtype) -> Path:
    """Where the secrets of a model in a dtype are, if they were made."""
    return cache / "audit" / f"{root}-{dtype}.safetensors"


def make_secrets(model: LocalModel, dtype: Dtype, path: Path, progress: Progress = ignore_progress) -> int:
    """Stream all experts once and keep what audits need of them. Blocks. Returns the bytes written.

    Raises:
        ModelError: the checkpoint was altered, or no layer has a form that can be audited.
        StorageError: the file can't be written.
    """
    layers = sorted(model.layers)

    def stream() -> Iterator[tuple[int, Form]]:
        with Checkpoint(model.folder, sequential=True) as checkpoint:
            for done, number in enumerate(layers):
                progress("making secrets", done, len(layers))
                held = read_experts(checkpoint, model, {number: list(range(model.layers[number]))}, dtype)[number]
                form = get_form(held)
                if form is not None:
                    yield number, form
        progress("making secrets", len(layers), len(layers))

    written = save_secrets(stream(), model.root, dtype, path)
    if not written:
        raise ModelError(
            f"{model.name}: its experts are no gated FFNs without biases, so they can't be audited by sketches",
            hint="infer --verify twin compares two hosts instead",
        )
    return written


@torch.inference_mode()
def save_secrets(forms: Iterable[tuple[int, Form]], root: ModelRoot, dtype: Dtype, path: Path) -> int:
    """Make and write the secrets of some layers; returns the bytes written, 0 without a layer.

    Raises:
        StorageError: the file can't be written.
    """
    kept: dict[str, Tensor] = {}
    activations: dict[str, str] = {}
    generator = torch.Generator()
    generator.seed()
    for number, form in forms:
        activations[f"{number}"] = form.activation
        kept |= {f"{number}.{name}": value for name, value in _sketch(form, generator).items()}
    if not kept:
        return 0
    metadata = {"version": VERSION, "root": root, "dtype": dtype, "activations": json.dumps(activations)}
    return _write(path, kept, metadata)


def get_form(held: LayerExperts) -> Form | None:
    """``None``: the layer's experts don't fit the audit."""
    return Form(held.activation, held.get_matrices()) if held.can_open else None


def _sketch(form: Form, generator: torch.Generator) -> dict[str, Tensor]:
    """Every expert's sketches but those of the down projections are its own; these are common, since what they give is
    summed by the host. Products are rounded to f32: less than the bound's second term by far.
    """
    hidden = form.matrices[0][2].shape[0]
    common = torch.randn(ROWS, hidden, generator=generator)
    kept: dict[str, list[Tensor]] = {}
    for matrices in form.matrices:
        for name, weight in zip(_PARTS, matrices, strict=True):
            wide = weight.double()
            sketch = common if name == "down" else torch.randn(ROWS, len(weight), generator=generator)
            if name != "down":
                kept.setdefault(f"{name}.sketch", []).append(sketch)
            kept.setdefault(f"{name}.product", []).append((sketch.double() @ wide).float())
            kept.setdefault(f"{name}.columns", []).append(round_up(wide.norm(dim=0)))
            kept.setdefault(f"{name}.row", []).append(round_up(wide.norm(dim=1).max()))
    return {"down.sketch": common, **{name: torch.stack(values) for name, values in kept.items()}}


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> int:
    from safetensors.torch import save

    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        data = save(tensors, metadata)
        with os.fdopen(create_private(part), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise StorageError(f"{path} can't be written: {error.strerror or error}") from error
    return len(data)


class Secrets:
    """Those of one model in one dtype, read as they are needed.

    Args:
        path: of :func:`get_path`; it must exist.

    Raises:
        StorageError: it is damaged, or of another version, model or dtype, or others may read it.
    """

    def __init__(self, path: Path, root: ModelRoot, dtype: Dtype) -> None:
        self.path = path
        with self._reading():
            if os.name == "posix" and path.stat().st_mode & 0o077:
                raise StorageError(
                    f"{path} can be read by others, who could make up answers that pass", hint=f"chmod 600, or {HINT}"
                )
            self._file: Any = safe_open(path, "pt")
            metadata = self._file.metadata() or {}
            if (metadata.get("version"), metadata.get("root"), metadata.get("dtype")) != (VERSION, root, dtype):
                raise StorageError(f"{path} is not of this model and dtype", hint=HINT)
            self._activations: dict[str, str] = json.loads(metadata["activations"])
        self.get = functools.lru_cache(maxsize=256)(self._get)

    def fits(self, layer: int) -> bool:
        """Whether the layer can be audited."""
        return str(layer) in self._activations

    def _get(self, layer: int, expert: int) -> FfnSecrets:
        """Of one expert or slice."""
        with self._reading():
            stages = []
            for name in _PARTS:
                key = f"{layer}.{name}"
                sketch = (
                    self._file.get_tensor(f"{key}.sketch")
                    if name == "down"
                    else self._file.get_slice(f"{key}.sketch")[expert]
                )
                product, columns, row = (
                    self._file.get_slice(f"{key}.{part}")[expert] for part in ("product", "columns", "row")
                )
                stages.append(Stage(sketch, product, columns, float(row)))
            gate, up, down = stages
            return FfnSecrets(gate, up, down, self._activations[str(layer)])

    @functools.lru_cache(maxsize=256)  # noqa: B019 - lives as long as the requester's process
    def join(self, layer: int, slices: tuple[int, ...]) -> FfnSecrets:
        """Of several slices together."""
        return join_slices([self.get(layer, number) for number in slices])

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
            raise StorageError(f"{self.path} can't be read: {error}", hint=HINT) from error
