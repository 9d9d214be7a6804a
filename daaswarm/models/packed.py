"""Matrices laid out once as oneDNN's products want them (torch's compiler does the same to models that it freezes).

Measured on two cores with AVX-512: a gated FFN, 576 → 2 x 1536 → 576, f32, one thread; milliseconds for 1, 4, 16, 128
rows: 0.73, 0.70, 1.17, 6.9. ``functional.linear``: 1.00, 1.26, 1.91, 8.3; input-major: 0.74, 1.77, 2.25, 8.7. In bf16
0.39, 0.37, 0.64, 3.5 against 0.68, 0.75, 1.05, 4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LEAST_ROWS = 4  # fewer are filled up with zeros: oneDNN's kernels for so few are slower than those for four
PACKED_FOR = 16  # rows that the layout is asked for; those for 2 to 512 were measured to be the same


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch has packed products of this dtype on this processor."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


class PackedMatrix:
    """``rows @ weight.T`` without autograd.

    Args:
        weight: (outputs, inputs) on the CPU, of a dtype that :func:`can_pack`. It isn't kept.
    """

    def __init__(self, weight: Tensor) -> None:
        self.outputs, self.inputs = weight.shape
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR)

    def __call__(self, rows: Tensor) -> Tensor:
        """rows: (n, inputs) of the weight's dtype; returns (n, outputs). Fewer than :data:`LEAST_ROWS` rows would
        take longer: :func:`fill` them up.
        """
        return torch.ops.mkldnn._linear_pointwise(rows, self._packed, None, "none", [], "")

    def unpack(self) -> Tensor:
        """The weight, (outputs, inputs): a new tensor."""
        return self._packed.to_dense()


def fill(rows: Tensor) -> Tensor:
    """Rows, with zeros behind them where they are few."""
    if 0 < len(rows) < LEAST_ROWS:
        return functional.pad(rows, (0, 0, 0, LEAST_ROWS - len(rows)))
    return rows
