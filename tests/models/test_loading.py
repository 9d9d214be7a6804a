"""What is read, what is checked, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from daaswarm.errors import ExpertError, ModelError
from daaswarm.models.checkpoint import Checkpoint, read_header
from daaswarm.models.experts import load_experts, read_experts
from daaswarm.models.manifest_file import MANIFEST_NAME, load_manifest
from daaswarm.models.sources import find_model, list_models
from daaswarm.models.trunk import load_tokenizer, load_trunk
from daaswarm.testing.checkpoints import make_tiny_checkpoint

Tiny = Callable[[str], Path]


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Callable[[str], Path]:
    def make(architecture: str) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(tiny(architecture), folder)
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        return folder

    return make


def refuse(*args: Any) -> torch.Tensor:
    raise AssertionError("no experts here")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop(tensors: dict[str, torch.Tensor], *names: str) -> None:
    for name in names:
        del tensors[name]


def flip(folder: Path, name: str, at: int = 0) -> None:
    """Change one byte of one tensor in place."""
    tensor = read_header(folder / "model.safetensors")[name]
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(tensor.start + at)
        old = file.read(1)
        file.seek(tensor.start + at)
        file.write(bytes([old[0] ^ 1]))


# -- only its own bytes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "ids"), [("mixtral", [1, 3]), ("olmoe", [0, 5]), ("gpt_oss", [2]), ("llama", [0, 1, 6])]
)
def test_a_host_reads_its_own_bytes_and_no_others(
    tiny: Tiny, tmp_path: Path, architecture: str, ids: list[int]
) -> None:
    model = find_model(str(tiny(architecture)), tmp_path)
    seen: list[tuple[str, int, int]] = []
    with Checkpoint(model.folder) as checkpoint:
        held = read_experts(checkpoint, model, {0: ids, 1: ids}, "f32", lambda *a: seen.append(a))
        assert checkpoint.bytes_read == sum(layer.nbytes for layer in held.values())
        assert checkpoint.bytes_read == 2 * len(ids) * model.expert_bytes(0, "f32")
        assert checkpoint.bytes_read < sum(t.nbytes for t in checkpoint.tensors.values()) / 2
    assert seen[-1][1] == seen[-1][2]


def test_the_trunk_reads_no_expert(tiny: Tiny, tmp_path: Path) -> None:
    model = find_model(str(tiny("olmoe")), tmp_path)
    trunk = load_trunk(model, "f32", refuse)
    assert not any(p.is_meta for p in trunk.parameters())
    assert sum(p.nbytes for p in trunk.parameters()) == model.get_trunk_bytes("f32")


def test_the_head_is_read_in_order_and_shared_with_the_embedding(tiny: Tiny, tmp_path: Path) -> None:
    model = find_model(str(tiny("llama")), tmp_path)
    trunk: Any = load_trunk(model, "f32", refuse)
    head, embedding = trunk.get_output_embeddings().weight, trunk.get_input_embeddings().weight
    assert head.stride() == (1, head.shape[0])
    assert trunk.config.tie_word_embeddings is (head.data_ptr() == embedding.data_ptr())
    assert load_trunk(model, "bf16", refuse).get_output_embeddings().weight.is_contiguous()


def test_an_expert_that_is_not_held(tiny: Tiny, tmp_path: Path) -> None:
    model = find_model(str(tiny("olmoe")), tmp_path)
    held = load_experts(model, {0: [1, 2]}, "f32")[0]
    one = torch.tensor([0])
    with pytest.raises(ExpertError, match=r"experts 5 are not held"):
        held.compute_pairs(torch.zeros(1, model.hidden), one, torch.tensor([5]), torch.ones(1))
    with pytest.raises(ExpertError, match="row 1"):
        held.compute_pairs(torch.zeros(1, model.hidden), torch.tensor([1]), torch.tensor([1]), torch.ones(1))
    with pytest.raises(ExpertError, match="not slices"):
        held.compute_slices(torch.zeros(1, model.hidden), [0])
    with pytest.raises(ModelError, match="no split layer 9"):
        load_experts(model, {9: [0]}, "f32")
    with pytest.raises(ModelError, match="experts 0 to 7"):
        load_experts(model, {0: [8]}, "f32")


# -- the manifest -------------------------------------------------------------------------------------------------


def test_the_root_is_that_of_the_content(tiny: Tiny, copy: Callable[[str], Path], tmp_path: Path) -> None:
    original = find_model(str(tiny("olmoe")), tmp_path)
    folder = copy("olmoe")
    assert find_model(str(folder), tmp_path).root == original.root
    (folder / MANIFEST_NAME).unlink()
    flip(folder, "lm_head.weight")
    assert find_model(str(folder), tmp_path).root != original.root
    (folder / MANIFEST_NAME).unlink()
    flip(folder, "lm_head.weight")
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert find_model(str(folder), tmp_path).root != original.root


def test_sharding_does_not_change_the_leaves(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("olmoe")
    before = find_model(str(folder), tmp_path)
    (folder / MANIFEST_NAME).unlink()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[::2]}, folder / "a.safetensors")
    save_file({n: tensors[n] for n in names[1::2]} | {"stray": torch.ones(3)}, folder / "b.safetensors")
    save_file({"other": torch.ones(3)}, folder / "not-in-the-index.safetensors")
    index = {n: "ab"[i % 2] + ".safetensors" for i, n in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert find_model(str(folder), tmp_path).root == before.root
    (folder / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=f"b.safetensors, which holds tensor {names[1]}, is missing"):
        find_model(str(folder), tmp_path)


@pytest.mark.parametrize("architecture", ["olmoe", "llama"])
def test_an_altered_tensor_is_named_when_it_is_read(
    copy: Callable[[str], Path], tmp_path: Path, architecture: str
) -> None:
    folder = copy(architecture)
    model = find_model(str(folder), tmp_path)
    name = next(e.name for e in model.manifest.of_layer(1) if "down" in e.param)
    flip(folder, name)
    owner = next(e for e in model.manifest.of_layer(1) if e.name == name).owner
    mine = [max(owner, 0)]
    with pytest.raises(ModelError, match=name) as raised:
        load_experts(model, {1: mine}, "f32")
    assert MANIFEST_NAME in raised.value.hint
    load_experts(model, {1: [7]}, "f32")  # another host's part is not altered
    flip(folder, "model.embed_tokens.weight")
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight"):
        load_trunk(model, "f32", refuse)


def test_other_shape_dtype_or_presence(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("llama")
    find_model(str(folder), tmp_path)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].bfloat16()}))
    with pytest.raises(ModelError, match=r"lm_head\.weight is BF16 \[512, 64\], the manifest says F32"):
        find_model(str(folder), tmp_path)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].float(), "new": torch.ones(1)}))
    with pytest.raises(ModelError, match="tensor new is not in the manifest"):
        find_model(str(folder), tmp_path)
    rewrite(folder, lambda t: drop(t, "new", "model.norm.weight"))
    with pytest.raises(ModelError, match=r"tensor model\.norm\.weight is missing"):
        find_model(str(folder), tmp_path)


def test_a_damaged_manifest_is_refused(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("llama")
    model = find_model(str(folder), tmp_path)
    path = folder / MANIFEST_NAME
    data = path.read_bytes()
    assert load_manifest(path) == model.manifest
    leaf = model.manifest.entries[0].hashes[0]
    for bad in (data[:-5], b"", b"\xc1" * 20, data.replace(leaf, bytes(32))):
        path.write_bytes(bad)
        with pytest.raises(ModelError, match=MANIFEST_NAME):
            find_model(str(folder), tmp_path)


def test_a_read_only_folder_keeps_its_manifest_in_the_cache(
    copy: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import daaswarm.models.sources as sources

    folder, save = copy("llama"), sources.save_manifest

    def save_elsewhere(manifest: Any, path: Path) -> None:
        if path.parent == folder:
            raise PermissionError("read-only")
        save(manifest, path)

    monkeypatch.setattr(sources, "save_manifest", save_elsewhere)
    first = find_model(str(folder), tmp_path / "cache")
    assert first.manifest_path.parent == tmp_path / "cache" / "manifests"
    monkeypatch.setattr(sources, "build_manifest", refuse)
    assert find_model(str(folder), tmp_path / "cache") == first


# -- refused ------------------------------------------------------------------------------------------------------


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a known model") as raised:
        find_model("gpt-17", tmp_path)
    assert "smollm2-135m-instruct" in raised.value.hint
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match=r"neither a folder nor a \.gguf"):
        find_model(str(tmp_path / "notes.txt"), tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match=r"neither model\.safetensors"):
        find_model(str(empty), tmp_path)
    (empty / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelError, match="pickle"):
        find_model(str(empty), tmp_path)
    save_file({"x": torch.ones(1)}, empty / "model.safetensors")
    with pytest.raises(ModelError, match=r"no config\.json"):
        find_model(str(empty), tmp_path)
    (empty / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(ModelError, match="no-such-thing"):
        find_model(str(empty), tmp_path)
    (empty / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1000000000}')
    with pytest.raises(ModelError, match="4096 is the limit"):
        find_model(str(empty), tmp_path)
    (tmp_path / "fake.gguf").write_bytes(b"not gguf at all")
    with pytest.raises(ModelError, match="not a GGUF file"):
        find_model(str(tmp_path / "fake.gguf"), tmp_path)
    (tmp_path / "fake.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match="can't be converted"):
        find_model(str(tmp_path / "fake.gguf"), tmp_path)
    assert list_models(tmp_path) == []


def test_quantised(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelError, match=r"quantised \(fp8\)"):
        find_model(str(folder), tmp_path)
    (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}))
    with pytest.raises(ModelError, match=r"lm_head\.weight is F8_E4M3: a quantised checkpoint"):
        find_model(str(folder), tmp_path)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("gpt2", "neither experts"), ("arcee", "neither experts"), ("llama4", "does not route Llama4TextExperts")],
)
def test_architectures_that_cant_be_split(tmp_path: Path, architecture: str, reason: str) -> None:
    folder = make_tiny_checkpoint(architecture, tmp_path / "m")
    with pytest.raises(ModelError, match=reason):
        find_model(str(folder), tmp_path)


def test_incomplete_or_of_another_model(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("llama")
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(65)}))
    with pytest.raises(ModelError, match=r"tensor model\.norm\.weight is \[65\], config\.json makes it \[64\]"):
        find_model(str(folder), tmp_path)
    rewrite(folder, lambda t: drop(t, "model.norm.weight"))
    with pytest.raises(ModelError, match=r"becomes model\.norm\.weight"):
        find_model(str(folder), tmp_path)


def test_a_truncated_file_names_the_tensor(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("llama")
    path = folder / "model.safetensors"
    last = max(read_header(path).items(), key=lambda item: item[1].start)[0]
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with pytest.raises(ModelError, match=f"cut off: tensor {last}"):
        find_model(str(folder), tmp_path)
    for size in (0, 4, 100):
        path.write_bytes(data[:size])
        with pytest.raises(ModelError, match="header"):
            find_model(str(folder), tmp_path)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, "tensor b overlaps"),
        ({"a": {**F32, "data_offsets": [8, 16], "shape": [3]}}, "tensor a .* is 12 bytes, its offsets say 8"),
        ({"a": {**F32, "data_offsets": [64, 72]}}, "cut off: tensor a"),
        ({"a": {**F32, "dtype": "Q9"}}, "tensor a has the unknown dtype 'Q9'"),
        ({"a": {**F32, "shape": [-1, -2]}}, "tensor a has the impossible shape"),
        ({"a": {**F32, "shape": [1 << 40]}}, "tensor a has the impossible shape"),
        ({"a": {**F32, "shape": [1] * 9 + [2]}}, "tensor a has the impossible shape"),
        ({"a": {**F32, "shape": [True, 2]}}, "tensor a has the impossible shape"),
        ({"a": {**F32, "data_offsets": [8, 0]}}, "tensor a .* its offsets say -8"),
        ({"a": {"dtype": "F32"}}, "tensor a has no dtype, shape or offsets"),
        ({"a": 5}, "tensor a has no dtype, shape or offsets"),
        ([1, 2], "header can't be read"),
    ],
)
def test_a_forged_header(tmp_path: Path, header: Any, reason: str) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(ModelError, match=reason):
        read_header(path)


def test_a_header_that_repeats_itself_or_claims_to_be_huge(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    text = b'{"a":' + json.dumps(F32).encode() + b',"a":' + json.dumps(F32).encode() + b"}"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ModelError, match="twice"):
        read_header(path)
    path.write_bytes((1 << 60).to_bytes(8, "little") + text)
    with pytest.raises(ModelError, match="cut off inside its header"):
        read_header(path)


def test_an_index_that_points_outside(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("llama")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(ModelError, match="no file of this folder"):
        find_model(str(folder), tmp_path)


def test_no_tokenizer(tiny: Tiny, tmp_path: Path) -> None:
    assert load_tokenizer(find_model(str(tiny("llama")), tmp_path)) is None


def test_a_known_model_is_found_without_torch_and_transformers(tiny: Tiny, tmp_path: Path) -> None:
    find_model(str(tiny("llama")), tmp_path)
    code = (
        "import sys; from pathlib import Path; from daaswarm.models.sources import find_model, list_models\n"
        f"find_model({str(tiny('llama'))!r}, Path({str(tmp_path)!r}))\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_dense_host_needs_no_transformers(tiny: Tiny, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from daaswarm.models.sources import find_model\n"
        "from daaswarm.models.experts import load_experts\n"
        f"m = find_model({str(tiny('llama'))!r}, Path({str(tmp_path)!r})); load_experts(m, {{0: [0]}}, 'f32')\n"
        "sys.exit('transformers' in sys.modules)"
    )
    find_model(str(tiny("llama")), tmp_path)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
