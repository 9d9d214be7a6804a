"""Codecs keep the error that their table states, and refuse what no honest peer sends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from daaswarm.errors import RemoteProtocolError
from daaswarm.models.codecs import BLOCK, decode, encode, get_bytes, is_known
from daaswarm.types import CODECS

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@st.composite
def values(draw: st.DrawFn, largest: float) -> torch.Tensor:
    """Rows of any scale, and blocks of very different scales beside each other."""
    rows, hidden = draw(st.integers(1, 3)), draw(st.sampled_from([1, 7, BLOCK, BLOCK + 1, 3 * BLOCK]))
    seed = draw(st.integers(0, 2**32 - 1))
    made = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed))
    scales = draw(st.lists(st.sampled_from([0.0, 1e-42, 1e-30, 1e-6, 1.0, 1e4, 1e30, 1e38]), min_size=1, max_size=4))
    for i in range(hidden):
        made[:, i] *= min(scales[(i // 16) % len(scales)], largest)
    return made.clamp(-largest, largest)


def round_trip(tensor: torch.Tensor, codec: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    coded = encode(tensor, codec)
    assert coded is not None and coded.nbytes == get_bytes(codec, *tensor.shape)
    rows, hidden = tensor.shape
    return decode(memoryview(bytearray(coded)), codec, rows, hidden, dtype)


@given(values(65_504.0))
def test_f16(tensor: torch.Tensor) -> None:
    error = (round_trip(tensor, "f16").double() - tensor.double()).abs()
    assert (error <= torch.maximum(tensor.double().abs() * 2**-11, torch.tensor(2.0**-25))).all()


@given(values(3e38))
def test_bf16(tensor: torch.Tensor) -> None:
    error = (round_trip(tensor, "bf16").double() - tensor.double()).abs()
    assert (error <= torch.maximum(tensor.double().abs() * 2**-8, torch.tensor(2.0**-134))).all()


@given(values(3e38))
def test_int8(tensor: torch.Tensor) -> None:
    got = round_trip(tensor, "int8").double()
    for start in range(0, tensor.shape[1], BLOCK):
        block = tensor[:, start : start + BLOCK].double()
        largest = block.abs().amax(1, keepdim=True)
        allowed = torch.where(largest < 1.3e-36, largest, largest * 0.004)
        assert ((got[:, start : start + BLOCK] - block).abs() <= allowed).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", TYPES.values())
def test_every_dtype_and_what_is_exact(codec: str, dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0.0, 1.0, -127.0, 2.0, 64.0]], dtype=dtype)
    got = round_trip(tensor, codec, dtype)
    assert got.dtype == dtype and torch.equal(got, tensor)
    columns = torch.randn(70, 3, dtype=dtype).t()  # not contiguous
    assert torch.allclose(round_trip(columns, codec).float(), columns.float(), atol=0.05, rtol=0.01)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_has_no_code(codec: str, bad: float) -> None:
    tensor = torch.zeros(2, 100)
    tensor[1, 99] = bad
    assert encode(tensor, codec) is None


def test_what_is_too_large_has_no_code() -> None:
    assert encode(torch.tensor([[70_000.0]]), "f16") is None
    assert encode(torch.tensor([[3.4e38]]), "bf16") is None
    assert encode(torch.full((1, 64), 3.4e38), "int8") is not None
    large = torch.full((4, 100), 60_000.0)  # whose sum is beyond f16, but not they
    assert torch.allclose(round_trip(large, "f16"), large, rtol=2**-11)


@pytest.mark.parametrize("codec", CODECS)
@given(data=st.data())
def test_hostile_bytes_are_refused_or_finite(codec: str, data: st.DataObject) -> None:
    rows, hidden = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 5, 66]))
    size = get_bytes(codec, rows, hidden)
    body = bytearray(data.draw(st.binary(min_size=max(size - 1, 0), max_size=size + 1)))
    try:
        got = decode(memoryview(body), codec, rows, hidden, torch.float32)
    except RemoteProtocolError:
        return
    assert len(body) == size and got.shape == (rows, hidden) and bool(got.isfinite().all())


@pytest.mark.parametrize("bits", [0x7F80, 0x7FC0, 0xBF80, 0x7F7F])  # infinite, NaN, -1, and so large that sums aren't
def test_scales_that_no_honest_peer_sends(bits: int) -> None:
    body = bytearray(bits.to_bytes(2, "little") + bytes([128]))
    with pytest.raises(RemoteProtocolError, match="scales"):
        decode(memoryview(body), "int8", 1, 1, torch.float32)


def test_names() -> None:
    assert all(map(is_known, CODECS)) and not any(map(is_known, ("", "none", "zstd")))
    sizes: dict[str, Any] = {codec: get_bytes(codec, 1, 576) for codec in CODECS}
    assert sizes == {"f16": 1152, "bf16": 1152, "int8": 612}
