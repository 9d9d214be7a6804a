"""The gated FFN of a dense model: the formula that makes its slices sum to the whole. No transformers.

``down(act(gate(x)) * up(x))`` is a sum over the intermediate dimension, so any cut of that dimension gives
slices whose outputs add up to the layer's. That holds for this formula only, which is why it is checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

SLICES = 8  # of one dense FFN: enough for eight hosts, few enough that a slice is worth a round trip


def get_slices(intermediate: int) -> int:
    """The number of slices of an FFN with this intermediate size: the largest divisor that is at most ``SLICES``."""
    return next(n for n in range(min(SLICES, intermediate), 0, -1) if intermediate % n == 0)


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu_squared(x: Tensor) -> Tensor:
    return functional.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": functional.relu,
    "relu_squared": _relu_squared,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": functional.elu,
    "mish": functional.mish,
    "identity": lambda x: x,
}
"""Elementwise activations that a gated FFN may use, by the name that the manifest keeps."""


class DenseSlices:
    """Some slices of one dense FFN.

    Args:
        ids: the slices held, ascending.
        gate, up: (held * width, hidden).
        down: (hidden, held * width).
        gate_bias, up_bias: (held * width,); ``down_bias``: (hidden,), only where slice 0 is held.
    """

    def __init__(
        self,
        ids: list[int],
        activation: str,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        self.ids = ids
        self.act = ACTIVATIONS[activation]
        self.gate, self.up, self.down = gate, up, down
        self.gate_bias, self.up_bias, self.down_bias = gate_bias, up_bias, down_bias
        self.width = gate.shape[0] // len(ids)
        self.place = {number: i for i, number in enumerate(ids)}

    def compute(self, rows: Tensor, slices: list[int]) -> Tensor:
        """The sum of some held slices. rows: (n, hidden) in the weights' dtype; returns (n, hidden) f32.

        Slices that lie next to each other are one matrix; all held slices, the usual case, always are.
        """
        if slices == self.ids:
            return self._compute_run(rows, 0, len(slices), bias=True)
        places = sorted(self.place[number] for number in set(slices))
        total: Tensor | None = None
        start = 0
        for i in range(1, len(places) + 1):
            if i == len(places) or places[i] != places[i - 1] + 1:
                part = self._compute_run(rows, places[start], places[i - 1] + 1, bias=0 in slices and start == 0)
                total = part if total is None else total.add_(part)
                start = i
        if total is None:
            return torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        return total

    def _compute_run(self, rows: Tensor, first: int, last: int, *, bias: bool) -> Tensor:
        a, b = first * self.width, last * self.width
        gate, up, down = self.gate, self.up, self.down
        gate_bias, up_bias = self.gate_bias, self.up_bias
        if last - first < len(self.ids):
            gate, up, down = gate[a:b], up[a:b], down[:, a:b]
            gate_bias = None if gate_bias is None else gate_bias[a:b]
            up_bias = None if up_bias is None else up_bias[a:b]
        h = self.act(functional.linear(rows, gate, gate_bias)).mul_(functional.linear(rows, up, up_bias))
        return functional.linear(h, down, self.down_bias if bias else None).float()


def find_formula(ffn: Callable[[Tensor], Tensor], linears: dict[str, Tensor], x: Tensor) -> tuple[str, ...] | None:
    """Which of three matrices are gate, up and down, and which activation, so that ``ffn(x)`` is the formula.

    Args:
        linears: ``{name: weight}``; two are (intermediate, hidden), one is (hidden, intermediate).
        x: (n, hidden), f64, spread widely enough to tell activations apart.

    Returns:
        (gate, up, down, activation), or None if no assignment gives what ``ffn`` computes.
    """
    hidden = x.shape[-1]
    down = [name for name, w in linears.items() if w.shape[0] == hidden]
    first = [name for name, w in linears.items() if w.shape[1] == hidden]
    if len(down) != 1 or len(first) != 2 or down[0] in first:
        return None
    want = ffn(x)
    for gate, up in (first, first[::-1]):
        g, u = x @ linears[gate].T, x @ linears[up].T
        for name, act in ACTIVATIONS.items():
            got = (act(g) * u) @ linears[down[0]].T
            if want.shape == got.shape and (want - got).abs().max() <= 1e-9 * math.sqrt(got.numel()) * got.abs().max():
                return gate, up, down[0], name
    return None
