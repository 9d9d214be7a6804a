"""A GGUF file, written here, becomes the model that it was written from."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daaswarm.errors import ModelError
from daaswarm.models import gguf_header
from daaswarm.models.files import has_tokenizer
from daaswarm.models.gguf_header import check_header
from daaswarm.models.sources import find_model, list_models
from daaswarm.models.trunk import load_reference

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: Any, path: Path, *, vocabulary: bool = False, good: bool = True) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if vocabulary:
        merge = "\u0100 \u0101" if good else "not there"
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([*(chr(0x100 + i) for i in range(config.vocab_size - 1)), "\u0100\u0101"])
        writer.add_token_types([1] * config.vocab_size)
        writer.add_token_merges([merge])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, value in model.state_dict().items():
        base = name.removesuffix(".weight")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(base.split(".")[-1])
        if heads:  # rotary pairs lie side by side in GGUF
            value = value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        if base in top:
            target = top[base]
        else:
            _, _, layer, rest = base.split(".", 3)
            target = f"blk.{layer}.{NAMES[rest]}"
        writer.add_tensor(target + ".weight", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_converted_once(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = load_reference(find_model(str(tiny("llama")), tmp_path), "f32")
    write_gguf(source, tmp_path / "Tiny.gguf")
    model = find_model(str(tmp_path / "Tiny.gguf"), tmp_path / "cache")
    assert model.name == "Tiny"
    assert model.layers == {0: 8, 1: 8, 2: 8, 3: 8}
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        got = load_reference(model, "f32")(input_ids=ids).logits
        torch.testing.assert_close(got, source(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    said: list[str] = []
    (tmp_path / "Tiny.gguf").rename(tmp_path / "renamed.gguf")
    again = find_model(str(tmp_path / "renamed.gguf"), tmp_path / "cache", lambda what, *_: said.append(what))
    assert again.folder == model.folder
    assert set(said) == {"hashing the GGUF file"}
    assert [known.root for known in list_models(tmp_path / "cache")] == [model.root]


def test_a_truncated_gguf_file(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = load_reference(find_model(str(tiny("llama")), tmp_path), "f32")
    write_gguf(source, tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    for size in (200, len(data) // 2):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        with pytest.raises(ModelError, match="can't be converted"):
            find_model(str(tmp_path / "cut.gguf"), tmp_path / "cache")


# -- hostile headers ----------------------------------------------------------------------------------------------


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def header(keys: bytes = b"", tensors: bytes = b"", *, counts: tuple[int, int], version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + keys + tensors + bytes(64)


def tensor(shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(b"t") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def number(name: bytes, value: int) -> bytes:
    return text(name) + struct.pack("<IQ", 10, value)


HUGE = 1 << 60


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (header(counts=(HUGE, 0)), "1152921504606846976 tensors"),
        (header(counts=(0, HUGE)), "and 1152921504606846976 keys"),
        (header(counts=(0, 0), version=99), "version 99"),
        (header(text(b"k", HUGE), counts=(0, 1)), "a text of 1152921504606846976 bytes"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 0, HUGE), counts=(0, 1)), "an array of 1152921504606846976 values"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 20), counts=(0, 1)), "the file ends"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 0, 1 << 20), counts=(0, 1)), "the file ends"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 9, 1), counts=(0, 1)), "an array of values of type 9"),
        (header(text(b"k") + struct.pack("<I", 77), counts=(0, 1)), "no value of type 77"),
        (header(text(b"\xff\xfe") + bytes(8), counts=(0, 1)), "utf-8"),
        (header(number(b"llama.block_count", 1 << 20), counts=(0, 1)), "block_count' is 1048576; 4096 is the limit"),
        (header(number(b"llama.embedding_length", HUGE), counts=(0, 1)), "embedding_length' is 1152921504606846976"),
        (header(tensors=tensor([1 << 31, 1 << 31]), counts=(1, 0)), "past the end"),
        (header(tensors=tensor([4], offset=HUGE), counts=(1, 0)), "past the end"),
        (header(tensors=tensor([4]) * 2, counts=(2, 0)), "overlaps"),
        (header(tensors=tensor([1] * 9), counts=(1, 0)), "9 dimensions"),
        (header(tensors=tensor([4], kind=99), counts=(1, 0)), "unknown type 99"),
        (header(tensors=tensor([4], kind=2), counts=(1, 0)), "whole blocks of 32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_hostile_header(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=reason) as raised:
        find_model(str(tmp_path / "bad.gguf"), tmp_path / "cache")
    assert str(raised.value).isprintable()
    assert not list((tmp_path / "cache" / "models").glob("gguf-*"))


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_as_a_header(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2, 2) + data)
    with contextlib.suppress(ModelError):
        check_header(path)


def test_the_block_sizes_are_those_of_the_gguf_package() -> None:
    assert {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()} == gguf_header._BLOCKS


def test_a_gguf_file_that_changes_meanwhile(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "growing.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    monkeypatch.setattr("daaswarm.models.gguf.check_header", lambda path: None)
    monkeypatch.setattr("daaswarm.models.gguf.convert_gguf", lambda path, *_: path.write_bytes(b"GGUF" + bytes(200)))
    with pytest.raises(ModelError, match="was changed while it was converted"):
        find_model(str(file), tmp_path / "cache")
    assert not list((tmp_path / "cache" / "models").glob("gguf-*"))


def test_the_root_does_not_depend_on_where_the_file_lies(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = load_reference(find_model(str(tiny("llama")), tmp_path), "f32")
    roots: list[str] = []
    for place in ("here", "over there"):
        (tmp_path / place).mkdir()
        write_gguf(source, tmp_path / place / f"{len(place)}.gguf", vocabulary=True)
        model = find_model(str(tmp_path / place / f"{len(place)}.gguf"), tmp_path / place / "cache")
        roots.append(model.root)
        assert "tokenizer.json" in model.manifest.files
    assert roots[0] == roots[1]


def test_a_tokenizer_that_cant_be_read_is_left_out(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = load_reference(find_model(str(tiny("llama")), tmp_path), "f32")
    write_gguf(source, tmp_path / "bad.gguf", vocabulary=True, good=False)
    said: list[str] = []
    model = find_model(str(tmp_path / "bad.gguf"), tmp_path / "cache", lambda what, *_: said.append(what))
    assert "the GGUF file has no tokenizer that transformers can read" in said
    assert not has_tokenizer(model.folder)
