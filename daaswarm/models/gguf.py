"""A GGUF file as a folder in Hugging Face layout, converted once: f32, dequantised by transformers."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from daaswarm.errors import ModelError
from daaswarm.models.cache import make_once
from daaswarm.models.gguf_header import check_header
from daaswarm.models.manifest import Progress
from daaswarm.models.refusals import REFUSALS, first_line

_MAGIC = b"GGUF"
_BLOCK_BYTES = 1 << 20
_KEY_DIGITS = 32  # of the content's SHA-256, in the folder's name


def prepare_gguf(file: Path, cache: Path, progress: Progress) -> Path:
    """The folder that a GGUF file was converted to, converting it first if need be. Keyed by the file's content.

    Raises:
        ModelError: damaged, or an architecture that transformers can't read from GGUF.
    """
    before = _get_version(file)
    key = _hash(file, progress)[:_KEY_DIGITS]

    def make(folder: Path) -> None:
        check_header(file)
        convert_gguf(file, folder, progress)
        if _get_version(file) != before:  # the folder is named after the content that was hashed
            raise ModelError(f"{file} was changed while it was converted", hint="wait until it is written, then again")

    return make_once(cache / "models" / f"gguf-{key}", make, progress)


def convert_gguf(file: Path, folder: Path, progress: Progress) -> None:
    """Write ``folder``: weights in f32, configuration, and the tokenizer if the file has one.

    Raises:
        ModelError: see :func:`prepare_gguf`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

    from daaswarm.models.quiet import silence_transformers
    from daaswarm.models.safetensors_writer import write_safetensors

    silence_transformers()
    with _show_conversion(progress):
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype="float32",
                quantization_config=GgufConfig(dequantize=True),
                local_files_only=True,
            )
        except REFUSALS as error:
            raise _refuse(file, error) from None
        tied = set(getattr(model, "all_tied_weights_keys", {}))
        state = {name: value for name, value in sorted(model.state_dict().items()) if name not in tied}
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        write_safetensors(
            folder / "model.safetensors", shapes, ((n, v.detach().float().cpu().numpy()) for n, v in state.items())
        )
        _save_config(model, folder)
        try:
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True).save_pretrained(
                folder
            )
        except Exception:  # noqa: BLE001 - tokenizers raises Exception itself for what it can't parse
            progress("the GGUF file has no tokenizer that transformers can read", 0, 0)


@contextlib.contextmanager
def _show_conversion(progress: Progress) -> Iterator[None]:
    """Report the loop over tensors, round which transformers' reader draws a bar that can't be turned off."""
    from transformers import modeling_gguf_pytorch_utils as reader

    def show(tensors: Sequence[Any], **_: Any) -> Iterator[Any]:
        for done, tensor in enumerate(tensors):
            progress("converting the GGUF file (tensors)", done, len(tensors))
            yield tensor

    module: Any = reader
    drawn = getattr(module, "tqdm", None)
    module.tqdm = show
    try:
        yield
    finally:
        module.tqdm = drawn


def _save_config(model: Any, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = "float32"
    written = config.to_dict()
    for key in ("quantization_config", "transformers_version", "_name_or_path"):
        written.pop(key, None)
    _write_json(folder / "config.json", written)
    if model.generation_config is not None:
        generation = model.generation_config.to_diff_dict()
        kept = {k: v for k, v in generation.items() if k != "transformers_version" and not k.startswith("_")}
        _write_json(folder / "generation_config.json", kept)


def _write_json(path: Path, value: Any) -> None:
    path.write_bytes((json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def _get_version(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _hash(file: Path, progress: Progress) -> str:
    digest, done, total = hashlib.sha256(), 0, file.stat().st_size
    try:
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                if done == 0 and block[:4] != _MAGIC:
                    raise ModelError(f"{file} is not a GGUF file", hint="give a GGUF file or a Hugging Face folder")
                digest.update(block)
                done += len(block)
                progress("hashing the GGUF file", done, total)
    except OSError as error:
        raise ModelError(f"{file} can't be read: {error}", hint="check its permissions") from None
    if done == 0:
        raise ModelError(f"{file} is empty", hint="download it again")
    return digest.hexdigest()


def _refuse(file: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{file} can't be converted: {first_line(error)}",
        hint="the file is damaged, or transformers can't read this architecture from GGUF; "
        "give the model in Hugging Face layout",
    )
