"""Damaged and hostile files: each gives one line that names the file, and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from daaswarm.errors import EXIT_BAD_INPUT, DaaswarmError, ModelError, get_exit_code
from daaswarm.models.checkpoint import Checkpoint, Tensor, find_shards, read_header
from daaswarm.models.manifest_file import MANIFEST_NAME
from daaswarm.models.sources import find_model
from daaswarm.models.trunk import load_tokenizer, load_trunk
from tests.byte_tokenizer import add_tokenizer

Tiny = Callable[[str], Path]
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    made = tmp_path / "copy"
    shutil.copytree(tiny("llama"), made)
    (made / MANIFEST_NAME).unlink(missing_ok=True)
    return made


def write_header(path: Path, header: bytes, data: bytes = bytes(16)) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def shard(folder: Path) -> dict[str, str]:
    """Cut the checkpoint into a.safetensors and b.safetensors; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[::2]}, folder / "a.safetensors", metadata={"format": "pt"})
    save_file({n: tensors[n] for n in names[1::2]}, folder / "b.safetensors", metadata={"format": "pt"})
    index = {n: "ab"[i % 2] + ".safetensors" for i, n in enumerate(names)}
    write_index(folder, index)
    return index


def write_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def refuse(*args: Any) -> torch.Tensor:
    raise AssertionError("no experts here")


# -- safetensors headers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": {**F32, "dtype": ["F32"]}}, r"tensor a has the impossible dtype \['F32'\]"),
        ({"a": {**F32, "dtype": {"x": 1}}}, "tensor a has the impossible dtype"),
        ({"a": {**F32, "dtype": None}}, "tensor a has the impossible dtype None"),
        ({"a": {**F32, "shape": {"2": 1}}}, "tensor a has the impossible shape"),
        ({"a": {**F32, "shape": "12"}}, "tensor a has the impossible shape"),
        ({"a": {**F32, "data_offsets": "08"}}, "tensor a has the impossible shape"),
        ({"a": {**F32, "data_offsets": [0, 8.0]}}, "tensor a has the impossible shape"),
        ({"a\n\x1b[2J": F32}, r"'a\\n\\x1b\[2J' is no name of a tensor"),
        ({"\ud800": F32}, r"'\\ud800' is no name of a tensor"),
        ({"a" * 1_025: F32}, "is no name of a tensor"),
        ([[1, F32]], "header can't be read: it is no JSON object"),
    ],
)
def test_a_forged_header(tmp_path: Path, header: Any, reason: str) -> None:
    path = write_header(tmp_path / "model.safetensors", json.dumps(header).encode())
    with pytest.raises(ModelError, match=reason) as raised:
        read_header(path)
    assert str(raised.value).isprintable()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "BOOL"]) | JSON,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 80), min_size=2, max_size=2) | JSON,
    }
)


def read_only_ours(path: Path) -> None:
    try:
        tensors = read_header(path)
    except DaaswarmError as error:
        assert get_exit_code(error) == EXIT_BAD_INPUT
        assert "\n" not in str(error)
        return
    size = path.stat().st_size
    assert all(isinstance(t, Tensor) and 8 <= t.start <= t.start + t.nbytes <= size for t in tensors.values())


@settings(deadline=None)
@given(JSON | st.dictionaries(st.text(max_size=5), ENTRY | JSON, max_size=4))
def test_any_json_as_a_header(tmp_path_factory: pytest.TempPathFactory, header: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    read_only_ours(write_header(path, json.dumps(header).encode(), bytes(64)))


@settings(deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_as_a_header(tmp_path_factory: pytest.TempPathFactory, data: bytes, framed: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(data)
    read_only_ours(write_header(path, data) if framed else path)


def test_a_deeply_nested_header(tmp_path: Path) -> None:
    path = write_header(tmp_path / "model.safetensors", b'{"a":' * 50_000)
    with pytest.raises(ModelError, match="header can't be read"):
        read_header(path)


# -- shards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    [
        "../../etc/passwd", "../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors",
        "C:x.safetensors", "", ".", "a\nb.safetensors", "\ud800.safetensors", 5, None, ["a.safetensors"],
        "../" * 10_000 + ".safetensors",
    ],
)  # fmt: skip
def test_an_index_that_points_elsewhere(tmp_path: Path, file: Any) -> None:
    write_index(tmp_path, {"a": file})
    with pytest.raises(ModelError, match="no file of this folder") as raised:
        find_shards(tmp_path)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": 5}',
        "[" * 100_000,
        '{"weight_map": {"a": "x", "a": "y"}}',
        "\0",
    ],
)
def test_what_is_no_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="not a shard index"):
        find_shards(tmp_path)


def test_a_tensor_in_two_shards(folder: Path, tmp_path: Path) -> None:
    index = shard(folder)
    find_model(str(folder), tmp_path)
    name = next(name for name, file in index.items() if file == "b.safetensors")
    tensors = load_file(folder / "a.safetensors")
    save_file({**tensors, name: torch.zeros(3)}, folder / "a.safetensors")
    with pytest.raises(ModelError, match=rf"tensor {name} is both in a\.safetensors and in b\.safetensors"):
        find_model(str(folder), tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="symbolic links")
def test_links_are_followed_to_files_only(folder: Path, tmp_path: Path) -> None:
    """The cache of Hugging Face's hub is made of links out of the folder."""
    root = find_model(str(folder), tmp_path).root
    (folder / MANIFEST_NAME).unlink()
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in ("model.safetensors", "config.json"):
        (folder / name).rename(blobs / name)
        (folder / name).symlink_to(Path("..") / "blobs" / name)
    assert find_model(str(folder), tmp_path).root == root
    for target in ("/dev/zero", str(blobs), "model.safetensors"):  # a device, a folder, itself
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(target)
        with pytest.raises(ModelError, match=r"neither model\.safetensors"):
            find_model(str(folder), tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="named pipes")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_pipe_is_not_waited_for(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=f"{name} is no file"):
        find_model(str(folder), tmp_path)


def test_a_file_that_changes_while_it_is_open(folder: Path, tmp_path: Path) -> None:
    find_model(str(folder), tmp_path)
    path = folder / "model.safetensors"
    last = max(read_header(path).items(), key=lambda item: item[1].start)[0]
    with Checkpoint(folder) as checkpoint:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(ModelError, match=f"ends inside tensor {last}"):
            checkpoint.read_into(last, 0, memoryview(bytearray(checkpoint.tensors[last].nbytes)))


# -- config.json and its like -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]", '"llama"', "5", "null", "", "{", "[" * 100_000, '{"a":' * 100_000, "\xff\xfe",
        '{"model_type": ["llama"]}', '{"model_type": "llama", "text_config": [1]}', '{"model_type": "../llama"}',
        '{"model_type": "llama", "x": ' + '{"x": ' * 100 + "1" + "}" * 101,
        '{"model_type": "llama", "x": ' + "[" * 100 + "1" + "]" * 100 + "}",
        '{"model_type": "llama", "x": [{"num_hidden_layers": 1000000000}]}',
        '{"model_type": "llama", "hidden_size": 0}', '{"model_type": "llama", "num_attention_heads": 0}',
        '{"model_type": "llama", "hidden_size": -64}', '{"model_type": "llama", "hidden_size": "wide"}',
        '{"model_type": "llama", "hidden_size": 1e400}', '{"model_type": "llama", "vocab_size": 4611686018427387904}',
        '{"model_type": "llama", "num_hidden_layers": null}', '{"model_type": "llama", "rope_parameters": 5}',
        '{"model_type": "llama", "architectures": 5}', '{"model_type": "llama", "hidden_act": "\\u001b[2J"}',
        '{"model_type": "llama", "architectures": [{}]}', '{"model_type": "llama", "num_key_value_heads": 0}',
    ],
)  # fmt: skip
def test_a_bad_configuration(folder: Path, tmp_path: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError) as raised:
        find_model(str(folder), tmp_path)
    assert str(raised.value).isprintable()
    assert get_exit_code(raised.value) == EXIT_BAD_INPUT


@pytest.mark.parametrize("text", ["", "[1]", "{}", "[" * 10_000, '{"model": {"type": "BPE", "vocab": 5}}'])
def test_a_bad_tokenizer(folder: Path, tmp_path: Path, text: str) -> None:
    add_tokenizer(folder)
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match="its tokenizer can't be loaded") as raised:
        load_tokenizer(find_model(str(folder), tmp_path))
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("text", ["", "[1]", "[" * 100_000, '{"max_new_tokens": -1}'])
def test_a_bad_generation_configuration(folder: Path, tmp_path: Path, text: str) -> None:
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"generation_config\.json can't be used"):
        load_trunk(find_model(str(folder), tmp_path), "f32", refuse)
