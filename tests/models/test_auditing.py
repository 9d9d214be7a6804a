"""Honest computing passes the audit however it is done; what isn't is caught, up to the blind spots that are stated."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from daaswarm.errors import ModelError, StorageError
from daaswarm.models import secrets as secrets_module
from daaswarm.models.auditing import (
    ABSTAIN,
    FAIL,
    PASS,
    FfnSecrets,
    Opened,
    check_again,
    check_ffn,
    check_sum,
    get_quantile,
    get_spread,
)
from daaswarm.models.experts import load_experts
from daaswarm.models.secrets import Form, Secrets, make_secrets
from daaswarm.models.sources import LocalModel, find_model
from daaswarm.models.tensors import COMPUTE_DTYPES
from daaswarm.types import DTYPES, Dtype

HIDDEN, WIDTH = 96, 160
Weights = tuple[Tensor, Tensor, Tensor]

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def make_weights(dtype: torch.dtype, seed: int = 0, hidden: int = HIDDEN, width: int = WIDTH) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(width, hidden, generator=generator) / hidden**0.5 for _ in range(2))
    down = torch.randn(hidden, width, generator=generator) / width**0.5
    return gate.to(dtype), up.to(dtype), down.to(dtype)


def sketch(weights: Weights, activation: str = "silu") -> FfnSecrets:
    kept = secrets_module._sketch(Form(activation, [weights]), torch.Generator().manual_seed(7))
    stages = []
    for name in ("gate", "up", "down"):
        sketch_rows = kept["down.sketch"] if name == "down" else kept[f"{name}.sketch"][0]
        product, columns, row = (kept[f"{name}.{part}"][0] for part in ("product", "columns", "row"))
        stages.append(secrets_module.Stage(sketch_rows, product, columns, float(row)))
    return FfnSecrets(stages[0], stages[1], stages[2], activation)


def compute(x: Tensor, weights: Weights, act: Callable[[Tensor], Tensor] = functional.silu) -> Opened:
    gate, up = functional.linear(x, weights[0]), functional.linear(x, weights[1])
    hidden = act(gate) * up
    return Opened(gate, up, hidden, functional.linear(hidden, weights[2]))


def make_rows(count: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, HIDDEN, generator=generator)
    x[:, :4] *= 20  # as trained models have it
    return (x * torch.exp(0.5 * torch.randn(count, 1, generator=generator))).to(dtype)


@every_dtype
@pytest.mark.parametrize("threads", [1, 2])
def test_honest_rows_pass(dtype: torch.dtype, threads: int) -> None:
    weights, before = make_weights(dtype), torch.get_num_threads()
    secrets, x = sketch(weights), make_rows(600, dtype)
    torch.set_num_threads(threads)
    try:
        for batch in (1, 3, 64, 256):
            for rows in x.split(batch):
                assert bool((check_ffn(secrets, rows, compute(rows, weights)) == PASS).all())
    finally:
        torch.set_num_threads(before)


@every_dtype
def test_inputs_made_to_frame_an_honest_host(dtype: torch.dtype) -> None:
    """Rows whose output nearly cancels, found by gradients: a check relative to the output would call it a lie."""
    weights = make_weights(dtype)
    secrets, wide = sketch(weights), [each.double() for each in weights]
    x = make_rows(8, torch.float32).double().requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        hidden = functional.silu(x @ wide[0].T) * (x @ wide[1].T)
        loss = ((hidden @ wide[2].T).norm(dim=1) / hidden.norm(dim=1)).log().sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    rows = x.detach().to(dtype)
    opened = compute(rows, weights)
    shrunk = (opened.hidden.double() @ wide[2].T).norm(dim=1) / opened.hidden.double().norm(dim=1)
    assert float(shrunk.min()) < 0.2  # it was 0.8: much of it cancels
    assert bool((check_ffn(secrets, rows, opened) == PASS).all())


@every_dtype
def test_strange_rows(dtype: torch.dtype) -> None:
    """Zeros and denormals pass; what isn't finite on its way in, or may overflow, convicts nobody."""
    weights = make_weights(dtype)
    secrets, x = sketch(weights), make_rows(6, dtype)
    x[0] = 0
    x[1] *= torch.finfo(dtype).smallest_normal
    x[2, 3] = float("nan")
    x[3, 3] = float("inf")
    x[4] *= torch.finfo(dtype).max / 100
    verdicts = check_ffn(secrets, x, compute(x, weights))
    assert verdicts[[0, 1, 5]].tolist() == [PASS] * 3 and FAIL not in verdicts.tolist()
    assert verdicts[[2, 3]].tolist() == [ABSTAIN] * 2


def tamper(name: str, x: Tensor, weights: Weights) -> Opened:
    """What a dishonest host opens."""
    gate, up, down = weights
    honest = compute(x, weights)
    dtype = x.dtype
    if name == "another expert":
        return compute(x, make_weights(dtype, seed=99))
    if name == "stale":
        return compute(x.roll(1, 0), weights)
    if name == "int4":
        scale = gate.abs().amax(1, keepdim=True) / 7
        return compute(x, ((gate / scale).round() * scale, up, down))
    if name == "1 % pruned":
        kept = torch.rand(down.shape, generator=torch.Generator().manual_seed(3)) >= 0.01
        return compute(x, (gate, up, down * kept.to(dtype)))
    outs: dict[str, Tensor] = {
        "zeros": torch.zeros_like(honest.out),
        "nan": honest.out * float("nan"),
        "infinite": torch.full_like(honest.out, float("inf")),
        "noise": honest.out + 0.1 * torch.randn(honest.out.shape).to(dtype) * honest.out.std(),
        "times 1.1": (honest.out.float() * 1.1).to(dtype),
        "times 1.001": (honest.out.float() * 1.001).to(dtype),
    }
    if name in outs:
        return honest._replace(out=outs[name])
    if name == "another activation":
        hidden = functional.gelu(honest.gate) * honest.up
        return honest._replace(hidden=hidden, out=functional.linear(hidden, down))
    assert name == "consistent lie in gate"  # all that follows fits it
    bad = honest.gate * 1.1
    hidden = functional.silu(bad) * honest.up
    return Opened(bad, honest.up, hidden, functional.linear(hidden, down))


@every_dtype
@pytest.mark.parametrize(
    "name",
    [
        *("another expert", "stale", "int4", "1 % pruned", "zeros", "nan", "infinite", "noise", "times 1.1"),
        *("another activation", "consistent lie in gate"),
    ],
)
def test_tampering_is_caught(name: str, dtype: torch.dtype) -> None:
    weights, x = make_weights(dtype), make_rows(200, dtype)
    verdicts = check_ffn(sketch(weights), x, tamper(name, x, weights))
    assert int((verdicts == FAIL).sum()) >= 198


def test_a_blind_spot_of_bf16() -> None:
    """Stated in the security model: what is smaller than rounding can't be told from it."""
    for dtype, caught in ((torch.float32, 200), (torch.bfloat16, 0)):
        weights, x = make_weights(dtype), make_rows(200, dtype)
        verdicts = check_ffn(sketch(weights), x, tamper("times 1.001", x, weights))
        assert int((verdicts == FAIL).sum()) == caught


def test_errors_of_two_slices_do_not_cancel() -> None:
    """They would if slices shared a sketch: each lies by the same amount, one up and one down."""
    weights = [make_weights(torch.float32, seed=n, width=40) for n in (1, 2)]
    kept = secrets_module._sketch(Form("silu", weights), torch.Generator().manual_seed(7))
    parts = []
    for n in range(2):
        stages = [
            secrets_module.Stage(
                kept["down.sketch"] if name == "down" else kept[f"{name}.sketch"][n],
                kept[f"{name}.product"][n],
                kept[f"{name}.columns"][n],
                float(kept[f"{name}.row"][n]),
            )
            for name in ("gate", "up", "down")
        ]
        parts.append(FfnSecrets(stages[0], stages[1], stages[2], "silu"))
    from daaswarm.models.auditing import join_slices

    joined, x = join_slices(parts), make_rows(50, torch.float32)
    each = [compute(x, w) for w in weights]
    opened = Opened(
        torch.cat([e.gate for e in each], 1),
        torch.cat([e.up for e in each], 1),
        torch.cat([e.hidden for e in each], 1),
        each[0].out + each[1].out,
    )
    assert bool((check_ffn(joined, x, opened) == PASS).all())
    gate = opened.gate.clone()
    gate[:, 3] += 1
    gate[:, 43] -= 1
    hidden = functional.silu(gate) * opened.up
    out = functional.linear(hidden, torch.cat([w[2] for w in weights], 1))
    assert bool((check_ffn(joined, x, Opened(gate, opened.up, hidden, out)) == FAIL).all())


@every_dtype
def test_the_same_computed_again(dtype: torch.dtype) -> None:
    weights, x = make_weights(dtype), make_rows(300, dtype)
    secrets, opened = sketch(weights), compute(x, weights)
    one_by_one = torch.cat([compute(row, weights).out for row in x.split(1)]).float()
    reach = get_spread(secrets, opened.hidden)
    assert bool((check_again(one_by_one, opened.out.float(), reach, dtype) == PASS).all())
    lie = one_by_one + 0.05 * one_by_one.norm(dim=1, keepdim=True) * torch.eye(HIDDEN)[5]
    assert bool((check_again(lie, opened.out.float(), reach, dtype) == FAIL).all())
    assert bool((check_again(one_by_one * float("nan"), opened.out.float(), reach, dtype) == FAIL).all())


def test_sums() -> None:
    terms = torch.randn(20, 8, 5)
    parts, sizes = terms.double().sum(1), terms.double().abs().sum(1)
    assert bool((check_sum(terms.sum(1), parts, sizes, 8) == PASS).all())
    for wrong in (terms[:, 1:].sum(1), terms.sum(1) * 1.0001, terms.sum(1) * float("nan")):
        assert bool((check_sum(wrong, parts, sizes, 8) == FAIL).all())


def test_the_quantile() -> None:
    assert get_quantile(1, 0.05) == pytest.approx(3.8415, abs=1e-3)
    assert get_quantile(16, 1e-9) == pytest.approx(78.4, rel=0.05)


# -- secrets on the disk ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["moe", "dense"])
def model(request: pytest.FixtureRequest, cache: Path) -> LocalModel:
    return find_model(str(request.getfixturevalue(request.param)), cache)


@pytest.fixture(params=DTYPES)
def made(request: pytest.FixtureRequest, model: LocalModel, tmp_path: Path) -> Iterator[tuple[LocalModel, Dtype, Path]]:
    path = tmp_path / "audit" / "secrets.safetensors"
    assert make_secrets(model, request.param, path) == path.stat().st_size
    yield model, request.param, path


def test_a_models_own_experts_pass(made: tuple[LocalModel, Dtype, Path]) -> None:
    model, dtype, path = made
    secrets = Secrets(path, model.root, dtype)
    for layer, count in model.layers.items():
        assert secrets.fits(layer)
        held = load_experts(model, {layer: list(range(count))}, dtype)[layer]
        x = torch.randn(20, model.hidden).to(COMPUTE_DTYPES[dtype])
        if model.kind == "dense":
            for slices in ([*range(count)], [0], [*range(0, count, 2)]):
                sums, opened = held.open_slices(x, slices)
                verdicts = check_ffn(secrets.join(layer, tuple(slices)), x, Opened(*opened, sums))
                assert bool((verdicts == PASS).all())
                assert torch.allclose(sums, held.compute_slices(x, slices), atol=2e-2)
        else:
            at, experts = torch.arange(20).repeat_interleave(2), torch.randint(0, count, (40,))
            weights = torch.rand(40)
            sums, opened = held.open_pairs(x, at, experts, weights)
            assert torch.allclose(sums, held.compute_pairs(x, at, experts, weights), atol=2e-2)
            for expert in experts.unique().tolist():
                mine = experts == expert
                verdicts = check_ffn(secrets.get(layer, expert), x[at[mine]], Opened(*(e[mine] for e in opened)))
                assert bool((verdicts == PASS).all())


def test_only_the_owner_reads_them(made: tuple[LocalModel, Dtype, Path]) -> None:
    model, dtype, path = made
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    with pytest.raises(StorageError, match="others"):
        Secrets(path, model.root, dtype)


def test_secrets_of_something_else_or_broken(made: tuple[LocalModel, Dtype, Path]) -> None:
    model, dtype, path = made
    with pytest.raises(StorageError, match="not of this model"):
        Secrets(path, "0" * 64, dtype)  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="not of this model"):
        Secrets(path, model.root, "f16" if dtype != "f16" else "f32")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(StorageError, match="can't be read"):
        Secrets(path, model.root, dtype)


def test_no_two_are_alike(model: LocalModel, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_secrets(model, "f32", tmp_path / name)
    layer = min(model.layers)
    a, b = (Secrets(tmp_path / name, model.root, "f32").get(layer, 0) for name in ("a", "b"))
    assert not torch.equal(a.gate.sketch, b.gate.sketch) and torch.equal(a.gate.columns, b.gate.columns)


def test_experts_of_another_form(model: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets_module, "get_form", lambda held: None)
    with pytest.raises(ModelError, match="can't be audited"):
        make_secrets(model, "f32", tmp_path / "secrets")
    assert not (tmp_path / "secrets").exists()
