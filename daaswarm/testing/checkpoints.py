"""Tiny random checkpoints of real architectures, for tests and parity checks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from daaswarm.models.architecture import get_class

VOCABULARY = 512
LAYERS = 4
_SCALE = 0.08  # standard deviation of the weights: large enough that experts differ, small enough not to saturate

# What a configuration's number becomes, by its key; the first that matches. Numbers that are smaller stay.
_SMALL: list[tuple[str, int]] = [
    (r"^(vocab_size|unpadded_vocab_size|vocab_size_per_layer_input)$", VOCABULARY),
    (r"^ngram_vocab_size_base$", 64),
    (r"^(max_position_embeddings|model_max_length|num_position_embeddings|original_max_position_embeddings)$", 256),
    (r"^(num_hidden_layers|n_layers|depth|num_layers|encoder_layers|decoder_layers)$", LAYERS),
    (r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts)$", 8),
    (r"^(num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts|top_k)$", 2),
    (r"^(first_k_dense_replace|num_dense_layers|topk_group|moe_layer_start_index)$", 1),
    (r"^(n_group|num_expert_group|o_groups|hc_lowrank)$", 2),
    (r"moe_intermediate_size$", 48),
    (r"(intermediate_size|ffn_dim|intermediate_dim)$", 96),
    (r"^(mamba_n_heads|mamba_num_heads)$", 8),
    (r"^(num_key_value_heads|swa_num_key_value_heads|num_global_key_value_heads|linear_num_key_heads)$", 2),
    (r"(num_heads|n_heads|num_attention_heads|num_value_heads|attention_heads)$", 4),
    (r"^(qk_rope_head_dim|qk_nope_head_dim)$", 8),
    (r"(head_dim|d_head|d_state|ssm_state_size|_rank|dt_rank|rotary_dim)$", 16),
    (r"^(index_topk|index_topk_blocks|index_kpool)$", 8),
    (r"^(sliding_window|sliding_window_size|attention_chunk_size|index_block_size)$", 16),
    (r"^(chunk_size|mamba_chunk_size|block_size)$", 16),
    (r"^image_size$", 56),
    (r"(hidden_size|embed_dim|d_model|per_layer_input|projection_dim|hidden_dim|adapter_in_dim)$", 64),
]  # fmt: skip
_DROPPED = {"transformers_version", "dtype", "torch_dtype", "qk_head_dim", "architectures", "num_nextn_predict_layers"}
_SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# What shrinking by key can't know.
_CHANGES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_key_value_heads": 4, "num_hidden_layers": 3},
    "gpt_oss": {"num_local_experts": 4},
    "mixtral": {"num_local_experts": 4, "head_dim": 16},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_ocr2": {
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 8, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]},
    "gemma4": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 48,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "diffusion_gemma": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 48},
    "qwen4_exp": {
        "index_topk": 8,
        "indexer_compress_ratio": 4,
        "indexer_budget": 16,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
    },
    "ernie4_5_vl_moe": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [2, 2, 4]}},
    "glm4v_moe": {
        "rope_parameters": {
            "rope_theta": 10000.0,
            "rope_type": "default",
            "mrope_section": [1, 1, 2],
            "partial_rotary_factor": 0.5,
        }
    },
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "olmoe", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


def make_tiny_checkpoint(architecture: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny random checkpoint, in the layout of ``save_pretrained``. Same seed, same bytes.

    Args:
        architecture: a ``model_type`` of transformers. Those in ``ARCHITECTURES`` are known to work, most others do.
        changes: of the text configuration.
    """
    model = make_model(make_config(architecture, **changes), seed)
    model.save_pretrained(folder)
    return folder


def make_config(architecture: str, **changes: Any) -> PretrainedConfig:
    """A small configuration of an architecture: its default one, every size made small by its name."""
    small = _shrink(CONFIG_MAPPING[architecture]().to_dict(), LAYERS)
    changes = {**_CHANGES.get(architecture, {}), **changes}
    nested = next((k for k in ("text_config", "thinker_config") if isinstance(small.get(k), dict)), None)
    if nested is not None:
        small[nested].update(changes)
    else:
        small.update(changes)
    small.pop("model_type", None)
    return CONFIG_MAPPING[architecture](**small)


def make_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model with normally distributed matrices and biases; norms stay as the architecture initialises them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cls, config = get_class(config)
        model = cls(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if (parameter.dim() > 1 or name.endswith("bias")) and parameter.is_floating_point():
                    parameter.normal_(0, _SCALE)
    return model.eval()


def _shrink(config: dict[str, Any], layers: int) -> dict[str, Any]:
    small: dict[str, Any] = {}
    before = config.get("num_hidden_layers")
    for key, value in config.items():
        key = str(key)
        if key in _DROPPED:
            continue
        if key == "per_layer_config":
            small[key] = {n: _shrink(v, layers) for n, v in value.items() if int(n) < layers} if value else value
        elif isinstance(value, dict):
            small[key] = _shrink(value, layers)
        elif isinstance(value, list):
            small[key] = _shrink_list(key, value, before, layers)
        elif isinstance(value, int) and not isinstance(value, bool):
            small[key] = _shrink_number(key, value)
        else:
            small[key] = value
    heads, groups = small.get("num_attention_heads"), small.get("num_key_value_heads")
    if heads and groups and config["num_attention_heads"] == config["num_key_value_heads"]:
        small["num_key_value_heads"] = heads
    if "qk_rope_head_dim" in small and "head_dim" in small and config["head_dim"] == config["qk_rope_head_dim"]:
        small["head_dim"] = small["qk_rope_head_dim"]
    return small


def _shrink_number(key: str, value: int) -> int:
    if key.endswith(("_token_id", "_token_index", "_token")):
        if key in _SPECIAL_IDS:
            return _SPECIAL_IDS[key]
        return value if value < VOCABULARY else 500 + sum(key.encode()) % 12
    for pattern, small in _SMALL:
        if re.search(pattern, key):
            return min(value, small)
    return value


def _shrink_list(key: str, value: list[Any], before: int | None, layers: int) -> list[Any]:
    if key == "mrope_section" and sum(value) > 16:
        return [4, 2, 2]  # of half a head
    if before is not None and len(value) == before and len(value) > layers:  # one for each layer: keep every kind
        first = sorted({value.index(item) for item in value})[:layers]
        rest = [i for i in range(len(value)) if i not in first]
        return [value[i] for i in sorted(first + rest[: layers - len(first)])]
    if value and all(type(item) is int for item in value):
        if key.endswith(("indexes", "indices", "layer_ids")):
            return list(range(min(len(value), 2)))
        return [_shrink_number(key, item) for item in value]
    return value
