"""A GGUF file, written here, becomes the model that it was written from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from daaswarm.errors import ModelError
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


def write_gguf(model: Any, path: Path) -> None:
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
