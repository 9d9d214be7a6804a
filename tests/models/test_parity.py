"""A requester's trunk and three hosts give what transformers gives.

The tolerance: logits of these checkpoints are of order 2, sums are f32, and a different order of summation over a few
hundred terms moves them by some 1e-6; 1e-4 leaves two orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from daaswarm.models.experts import LayerExperts, load_experts
from daaswarm.models.sources import LocalModel, find_model
from daaswarm.models.trunk import load_reference, load_trunk
from daaswarm.testing.checkpoints import make_tiny_checkpoint

HOSTS = 3
TOKENS = 32


def make_hosts(model: LocalModel) -> list[dict[int, LayerExperts]]:
    wanted = [{layer: list(range(h, n, HOSTS)) for layer, n in model.layers.items() if h < n} for h in range(HOSTS)]
    return [load_experts(model, w, "f32") for w in wanted]


def sum_hosts(hosts: list[dict[int, LayerExperts]], layer: int, rows: Tensor, index: Tensor | None, w: Tensor | None):
    total = torch.zeros(rows.shape)
    for held in hosts:
        if layer not in held:
            continue
        if index is None or w is None:
            total += held[layer].compute_slices(rows, held[layer].ids)
            continue
        row, slot = torch.isin(index, torch.tensor(held[layer].ids)).nonzero(as_tuple=True)
        if len(row):
            total += held[layer].compute_pairs(rows, row, index[row, slot], w[row, slot])
    return total.to(rows.dtype)


@pytest.mark.parametrize(
    "architecture",
    [
        "llama",  # dense
        "gemma2",  # dense, GELU, extra norms
        "olmoe",
        "mixtral",  # saved one tensor an expert
        "qwen2_moe",  # a shared expert
        "gpt_oss",  # transposed, interleaved, biased, clamped
        "deepseek_v3",  # dense first layer, group routing
        "nemotron_h",  # no gate; hybrid with Mamba
        "muse_spark",  # a norm inside the experts, narrower than the model
        "qwen3_vl_moe",  # a multimodal wrapper
        "ernie4_5_vl_moe",  # two towers of experts in a layer
    ],
)
def test_three_hosts_match_the_reference(tiny: Callable[[str], Path], tmp_path: Path, architecture: str) -> None:
    model = find_model(str(tiny(architecture)), tmp_path)
    hosts = make_hosts(model)
    calls: list[int] = []

    def experts(layer: int, rows: Tensor, index: Tensor | None, weights: Tensor | None) -> Tensor:
        calls.append(layer)
        return sum_hosts(hosts, layer, rows, index, weights)

    trunk, reference = load_trunk(model, "f32", experts), load_reference(model, "f32")
    assert sum(p.numel() for p in trunk.parameters()) < sum(p.numel() for p in reference.parameters())
    ids = torch.randint(3, 500, (1, 17), generator=torch.Generator().manual_seed(1))
    length: Any = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    with torch.inference_mode():
        want, got = reference(input_ids=ids).logits, trunk(input_ids=ids).logits
        assert set(calls) == set(model.layers)
        assert (want - got).abs().max() <= 1e-4
        assert torch.equal(reference.generate(ids, **length), trunk.generate(ids, **length))


def test_two_trunks_ask_their_own_hosts(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = find_model(str(tiny("olmoe")), tmp_path)
    asked: list[str] = []

    def make(name: str) -> Callable[..., Tensor]:
        def experts(layer: int, rows: Tensor, index: Tensor | None, weights: Tensor | None) -> Tensor:
            asked.append(name)
            return torch.zeros_like(rows)

        return experts

    first, second = load_trunk(model, "f32", make("first")), load_trunk(model, "f32", make("second"))
    ids = torch.tensor([[5]])
    with torch.inference_mode():
        first(input_ids=ids)
        second(input_ids=ids)
    assert asked == ["first"] * len(model.layers) + ["second"] * len(model.layers)


def test_biases_of_a_dense_ffn_are_added_once(tmp_path: Path) -> None:
    model = find_model(str(make_tiny_checkpoint("llama", tmp_path / "m", mlp_bias=True)), tmp_path)
    hosts, reference = make_hosts(model), load_reference(model, "f32")
    rows = torch.randn(5, model.hidden, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want = reference.get_submodule("model.layers.1.mlp")(rows)
    torch.testing.assert_close(sum_hosts(hosts, 1, rows, None, None), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "slices"),
    [
        ({"intermediate_size": 97}, 1),
        ({"intermediate_size": 100}, 5),
        ({"intermediate_size": 64, "hidden_act": "gelu"}, 8),
    ],
)
def test_sizes_that_do_not_divide(tmp_path: Path, changes: dict[str, Any], slices: int) -> None:
    model = find_model(str(make_tiny_checkpoint("llama", tmp_path / "m", **changes)), tmp_path)
    assert set(model.layers.values()) == {slices}
    rows = torch.randn(2, model.hidden, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want = load_reference(model, "f32").get_submodule("model.layers.2.mlp")(rows)
    torch.testing.assert_close(sum_hosts(make_hosts(model), 2, rows, None, None), want, atol=1e-5, rtol=1e-5)


def test_any_subset_of_the_held_slices(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = find_model(str(tiny("llama")), tmp_path)
    rows = torch.randn(3, model.hidden, generator=torch.Generator().manual_seed(0))
    held = load_experts(model, {1: [0, 1, 2, 4, 7]}, "f32")[1]
    single = {i: load_experts(model, {1: [i]}, "f32")[1].compute_slices(rows, [i]) for i in held.ids}
    for slices in ([0, 1, 2, 4, 7], [1], [0, 2], [4, 7], [0, 1, 4], [7, 0]):
        want = torch.stack([single[i] for i in slices]).sum(0)
        torch.testing.assert_close(held.compute_slices(rows, slices), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 6])
def test_pairs_are_weighted_and_summed_in_f32(tiny: Callable[[str], Path], tmp_path: Path, rows: int) -> None:
    model = find_model(str(tiny("mixtral")), tmp_path)
    held = load_experts(model, {0: [1, 3]}, "bf16")[0]
    x = torch.randn(rows, model.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    row = torch.tensor([0, rows - 1, 0], dtype=torch.int32)
    expert = torch.tensor([3, 1, 1])
    weight = torch.tensor([0.5, 0.25, 2.0])
    got = held.compute_pairs(x, row, expert, weight)
    want = torch.zeros(rows, model.hidden)
    for r, e, w in zip(row.tolist(), expert.tolist(), weight.tolist(), strict=True):
        one = held.compute_pairs(x[r : r + 1], torch.tensor([0]), torch.tensor([e]), torch.tensor([1.0]))
        want[r] += w * one[0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
