"""Hidden states and sums on the wire in fewer bytes than f32, at the price of a stated error.

| codec | bytes of a value | error of a value |
|---|---|---|
| f16 | 2 | 2^-11 of it; below 6.1e-5, 2^-25. Nothing above 65,504 |
| bf16 | 2 | 2^-8 of it; below 1.2e-38, 2^-134 |
| int8 | 1.06 | 0.4 % of the largest of its block of 32 values in a row; where that is below 1.3e-36, all of it |

All sums are made in f32 before they are encoded, and after they are decoded.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from daaswarm.errors import RemoteProtocolError
from daaswarm.types import CODECS

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined]

BLOCK = 32  # values that share a scale; twice as many save 3 % of the bytes, for 28 % more error (measured)
SCALE_BYTES = 2  # bf16: f32's range, so that no block overflows; rounded up, so that no value exceeds LARGEST
LARGEST = 127
SMALLEST_SCALE = 1e-38  # below it divisions lose their precision; such a block is sent as zeros

_FLOATS: dict[str, torch.dtype] = {"f16": torch.float16, "bf16": torch.bfloat16}


def get_bytes(codec: str, rows: int, hidden: int) -> int:
    """Bytes that ``rows`` x ``hidden`` values take."""
    if codec == "int8":
        return rows * (hidden + SCALE_BYTES * math.ceil(hidden / BLOCK))
    return rows * hidden * _FLOATS[codec].itemsize


def is_known(codec: str) -> bool:
    return codec in CODECS


def encode(values: Tensor, codec: str) -> memoryview | None:
    """The bytes of ``values``, (rows, hidden) of any float dtype; ``None`` if some are infinite, NaN, or beyond what
    the codec can say. Then they have to be sent as they are.
    """
    if codec == "int8":
        return _encode_int8(values)
    coded = values.to(_FLOATS[codec]).contiguous()
    return coded.view(torch.int16).numpy().data.cast("B") if _is_finite(coded) else None


def decode(body: Buffer, codec: str, rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """(rows, hidden) of ``dtype``, from a peer's bytes.

    Raises:
        RemoteProtocolError: of another length, or not finite.
    """
    size = memoryview(body).nbytes
    if size != get_bytes(codec, rows, hidden):
        raise RemoteProtocolError(
            f"{rows} x {hidden} values in {codec} take {get_bytes(codec, rows, hidden)} bytes; {size} came",
            reject=False,
        )
    if codec == "int8":
        return _decode_int8(body, rows, hidden).to(dtype)
    coded = torch.frombuffer(body, dtype=_FLOATS[codec]).view(rows, hidden)
    if not _is_finite(coded):
        raise RemoteProtocolError(f"values in {codec} that are not finite", reject=False)
    return coded.to(dtype)


def _encode_int8(values: Tensor) -> memoryview | None:
    """``rows`` x ``ceil(hidden / BLOCK)`` bf16 scales, then ``rows`` x ``hidden`` signed bytes."""
    rows, hidden = values.shape
    blocks = functional.pad(values.float(), (0, -hidden % BLOCK)).view(rows, -1, BLOCK)
    scales = blocks.abs().amax(2) / LARGEST
    if not math.isfinite(scales.sum().item()) and not bool(scales.isfinite().all()):
        return None
    upper = (scales.view(torch.int32) + 0xFFFF) >> 16  # bf16 is the upper half of f32's bits
    rounded = (upper << 16).view(torch.float32)
    inverse = torch.where(rounded >= SMALLEST_SCALE, 1 / rounded, 0.0)
    steps = (blocks * inverse[:, :, None]).round_().to(torch.int8).view(rows, -1)[:, :hidden]
    coded = bytearray(get_bytes("int8", rows, hidden))
    cut = SCALE_BYTES * upper.numel()
    torch.frombuffer(coded, dtype=torch.int16, count=upper.numel()).copy_(upper.view(-1))
    torch.frombuffer(coded, dtype=torch.int8, offset=cut).view(rows, hidden).copy_(steps)
    return memoryview(coded)


def _decode_int8(body: Buffer, rows: int, hidden: int) -> Tensor:
    width = math.ceil(hidden / BLOCK)
    scales = torch.frombuffer(body, dtype=torch.bfloat16, count=rows * width).float()
    # A block of the largest scale that is sent is still finite; a negative one is never sent.
    if not (float(scales.min()) >= 0 and float(scales.max()) <= torch.finfo(torch.float32).max / 128):
        raise RemoteProtocolError("values in int8 whose scales are negative, infinite or NaN", reject=False)
    steps = torch.frombuffer(body, dtype=torch.int8, offset=SCALE_BYTES * rows * width).view(rows, hidden)
    blocks = functional.pad(steps.float(), (0, -hidden % BLOCK)).view(rows, width, BLOCK)
    return (blocks * scales.view(rows, width, 1)).view(rows, -1)[:, :hidden]


def _is_finite(values: Tensor) -> bool:
    return math.isfinite(values.sum(dtype=torch.float32).item()) or bool(values.isfinite().all())
