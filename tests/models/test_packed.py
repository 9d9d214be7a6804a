"""Packed matrices give what ``functional.linear`` gives, for any number of rows."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from daaswarm.models.packed import LEAST_ROWS, PackedMatrix, can_pack, fill

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="this build of torch has no packed products")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 2, LEAST_ROWS, 5, 33, 200])
def test_any_number_of_rows(rows: int, dtype: torch.dtype) -> None:
    if not can_pack(dtype):
        pytest.skip("not on this processor")
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(48, 40, generator=generator).to(dtype)
    x = torch.randn(rows, 40, generator=generator).to(dtype)
    with torch.inference_mode():
        got, want = PackedMatrix(weight)(fill(x))[:rows], functional.linear(x, weight)
    assert got.shape == want.shape and got.dtype == dtype
    assert torch.allclose(got.float(), want.float(), rtol=0, atol=1e-4 if dtype == torch.float32 else 0.2)


def test_a_row_does_not_depend_on_the_zeros_beside_it() -> None:
    matrix = PackedMatrix(torch.randn(64, 32))
    rows = torch.randn(LEAST_ROWS, 32)
    with torch.inference_mode():
        assert torch.allclose(matrix(rows)[:1], matrix(fill(rows[:1]))[:1], atol=1e-5)
        assert torch.allclose(matrix(rows)[:1], matrix(rows[:1]), atol=1e-5)


def test_a_transposed_weight_and_back() -> None:
    weight = torch.randn(32, 64).t()
    matrix = PackedMatrix(weight)
    assert torch.equal(matrix.unpack(), weight) and (matrix.outputs, matrix.inputs) == (64, 32)


def test_what_cant_be_packed() -> None:
    assert not can_pack(torch.float16) and not can_pack(torch.float64)
