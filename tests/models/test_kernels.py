"""Each way of multiplying gives what ``functional.linear`` gives, and the registry uses none that doesn't."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from daaswarm.models import kernels
from daaswarm.models.kernels import KERNELS, KernelRegistry, Matrix, can_pack, fill

for_each_kernel = pytest.mark.parametrize("name", KERNELS)


def make(name: str, weight: Tensor) -> Matrix:
    can, lay_out = KERNELS[name]
    if not can(weight):
        pytest.skip("not on this processor")
    return lay_out(weight)


@for_each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 2, 4, 5, 33, 200])
def test_any_number_of_rows(rows: int, dtype: torch.dtype, name: str) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(48, 40, generator=generator).to(dtype)
    x = torch.randn(rows, 40, generator=generator).to(dtype)
    matrix = make(name, weight)
    with torch.inference_mode():
        got, want = matrix(fill(x, matrix.least_rows))[:rows], functional.linear(x, weight)
    assert got.shape == want.shape and got.dtype == dtype
    assert torch.allclose(got.float(), want.float(), rtol=0, atol=1e-4 if dtype == torch.float32 else 0.2)


@for_each_kernel
def test_a_row_does_not_depend_on_the_zeros_beside_it(name: str) -> None:
    matrix = make(name, torch.randn(64, 32))
    rows = torch.randn(4, 32)
    with torch.inference_mode():
        assert torch.allclose(matrix(rows)[:1], matrix(fill(rows[:1], 4))[:1], atol=1e-5)
        assert torch.allclose(matrix(rows)[:1], matrix(rows[:1]), atol=1e-5)


@for_each_kernel
def test_a_transposed_weight_and_back(name: str) -> None:
    weight = torch.randn(32, 64).t()
    assert torch.equal(make(name, weight).unpack(), weight)


def test_what_cant_be_packed() -> None:
    assert not can_pack(torch.ones(2, 2).half()) and not can_pack(torch.ones(2, 2).double())
    assert not can_pack(torch.ones(2, 2, device="meta"))


class Doubling(kernels.EagerMatrix):
    """Fast, and wrong."""

    def __call__(self, rows: Tensor) -> Tensor:
        return super().__call__(rows) * 2


class Missing(kernels.EagerMatrix):
    """An operator that this build has in name only."""

    def __init__(self, weight: Tensor) -> None:
        raise RuntimeError("not built in")


class Swift(kernels.EagerMatrix):
    """Right."""


@pytest.fixture
def shapes() -> tuple[Tensor, Tensor]:
    return torch.randn(1024, 256), torch.randn(256, 512)


USUAL = "packed" if can_pack(torch.ones(2, 2)) else "eager"


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> dict[type, float]:
    """What each kernel is said to take, so that no clock decides a test; others take 1 ms."""
    said: dict[type, float] = {}

    def measure(products: list[kernels.Product], n: int) -> float:
        return said.get(type(products[0].matrix), 1.0)

    monkeypatch.setattr(kernels, "_measure", measure)
    return said


def add(monkeypatch: pytest.MonkeyPatch, name: str, kernel: Callable[[Tensor], Matrix]) -> None:
    monkeypatch.setitem(KERNELS, name, (lambda weight: True, kernel))


def test_the_fastest_is_chosen_once(
    monkeypatch: pytest.MonkeyPatch, costs: dict[type, float], shapes: tuple[Tensor, Tensor]
) -> None:
    add(monkeypatch, "swift", Swift)
    costs[Swift] = 0.5
    registry = KernelRegistry()
    choice = registry.choose(*shapes)
    assert choice.kernel == "swift" and choice.times_ms["swift"] == dict.fromkeys(kernels.TRIED_ROWS, 0.5)
    costs[Swift] = 2.0
    assert registry.choose(*shapes) is choice and registry.choices == [choice]
    costs[Swift] = 0.9
    assert registry.choose(shapes[0][:, :240], shapes[1]).kernel == USUAL
    assert len(registry.choices) == 2


def test_a_little_faster_is_not_enough(
    monkeypatch: pytest.MonkeyPatch, costs: dict[type, float], shapes: tuple[Tensor, Tensor]
) -> None:
    add(monkeypatch, "swift", Swift)
    costs[Swift] = 0.85
    assert KernelRegistry().choose(*shapes).kernel == USUAL


def test_small_experts_are_not_tried(
    monkeypatch: pytest.MonkeyPatch, costs: dict[type, float], shapes: tuple[Tensor, Tensor]
) -> None:
    """Their times are noise, and two hosts of one machine would differ in rounding."""
    add(monkeypatch, "swift", Swift)
    costs[Swift] = 0.1
    choice = KernelRegistry().choose(*(weight[:48, :48] for weight in shapes))
    assert choice.kernel == USUAL and not choice.times_ms


@pytest.mark.parametrize("kernel", [Doubling, Missing])
def test_a_wrong_one_is_not_used(
    kernel: type, monkeypatch: pytest.MonkeyPatch, costs: dict[type, float], shapes: tuple[Tensor, Tensor]
) -> None:
    add(monkeypatch, "bad", kernel)
    costs[kernel] = 0.001
    choice = KernelRegistry().choose(*shapes)
    assert choice.kernel == USUAL and choice.wrong == ["bad"] and "bad" not in choice.times_ms


def test_an_expert_is_laid_out_as_was_chosen(
    monkeypatch: pytest.MonkeyPatch, costs: dict[type, float], shapes: tuple[Tensor, Tensor]
) -> None:
    add(monkeypatch, "swift", Swift)
    costs[Swift] = 0.5
    monkeypatch.setattr(kernels, "REGISTRY", KernelRegistry())
    assert [type(matrix) for matrix in kernels.lay_out(*shapes)] == [Swift, Swift]
