"""The gated FFN of a dense model: the formula that makes its slices sum to the whole. No transformers.

``down(act(gate(x)) * up(x))`` is a sum over the intermediate dimension, so any cut of that dimension gives
slices whose outputs add up to the layer's. That holds for this formula only, which is why it is checked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from daaswarm.models.kernels import Matrix, fill, lay_out

FORMULA_TOLERANCE = 1e-8  # relative, in f64: rounding is 1e-15, constants written with ten digits differ by 1e-10
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
    "relu6": functional.relu6,
    "leaky_relu": functional.leaky_relu,
    "hardswish": functional.hardswish,
    "softplus": functional.softplus,
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

    The weights are laid out as they are the fastest here (:mod:`daaswarm.models.kernels`), gate and up as one matrix,
    until a call can't be computed so: one for a part of what is held, or one with autograd. From then on they are kept
    input-major, since more such calls will come: a part of such a matrix needs no copy.

    Args:
        ids: the slices held, ascending.
        gate, up: (held * width, hidden), on the CPU.
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
        self.activation = activation
        self.act = ACTIVATIONS[activation]
        self.held = gate.shape[0]
        self._whole: tuple[Matrix, Matrix] | None = lay_out(torch.cat((gate, up)), down)
        self.gate_bias, self.up_bias, self.down_bias = gate_bias, up_bias, down_bias
        self.width = self.held // len(ids)
        self.place = {number: i for i, number in enumerate(ids)}

    def unpack(self) -> None:
        """Lay the weights out for any call, and any device."""
        whole = self._whole
        if whole is not None:
            first, second = whole
            self.gate_up = first.unpack().t().contiguous()  # (hidden, 2 * held * width)
            self.down = second.unpack().t().contiguous()  # (held * width, hidden)
            self._whole = None  # last: other threads may compute meanwhile

    def compute(self, rows: Tensor, slices: list[int]) -> Tensor:
        """The sum of some held slices. rows: (n, hidden) in the weights' dtype; returns (n, hidden) f32.

        Slices that lie next to each other are one matrix; all held slices, the usual case, always are.
        """
        is_whole = slices == self.ids
        if not is_whole or torch.is_grad_enabled():
            self.unpack()
        if is_whole:
            return self._compute_whole(rows)
        total: Tensor | None = None
        for run in _find_runs(sorted(self.place[number] for number in set(slices))):
            part = self._compute_run(rows, run[0] * self.width, (run[-1] + 1) * self.width)
            total = part if total is None else total.add_(part)
        if total is None:
            return torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        return total if self.down_bias is None or 0 not in slices else total.add_(self.down_bias)

    @property
    def has_bias(self) -> bool:
        return not (self.gate_bias is None and self.up_bias is None and self.down_bias is None)

    def open(self, rows: Tensor, slices: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gate, up and hidden activations, (n, slices * width) in the weights' dtype, slices in ascending order;
        and what :meth:`compute` gives.
        """
        gates, ups, hiddens = [], [], []
        total = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        whole = self._whole if slices == self.ids else None
        for places in [None] if whole is not None else _find_runs(sorted(self.place[number] for number in set(slices))):
            if whole is not None:
                first, second = whole
                gate, up = first(fill(rows, first.least_rows)).split(self.held, 1)
                hidden = self.act(gate) * up
                out = second(hidden)[: len(rows)]
            else:
                self.unpack()
                assert places is not None
                start, end = places[0] * self.width, (places[-1] + 1) * self.width
                gate = rows @ self.gate_up[:, start:end]
                up = rows @ self.gate_up[:, self.held + start : self.held + end]
                hidden = self.act(gate) * up
                out = hidden @ self.down[start:end]
            total += out
            for kept, value in zip((gates, ups, hiddens), (gate, up, hidden), strict=True):
                kept.append(value[: len(rows)])
        return torch.cat(gates, 1), torch.cat(ups, 1), torch.cat(hiddens, 1), total

    def get_matrices(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Gate, up (width, hidden) and down (hidden, width) of each slice held."""
        whole = self._whole
        if whole is not None:
            first, down = (matrix.unpack() for matrix in whole)
        else:
            first, down = self.gate_up.t(), self.down.t()
        w = self.width
        return [
            (
                first[i * w : (i + 1) * w],
                first[self.held + i * w : self.held + (i + 1) * w],
                down[:, i * w : (i + 1) * w],
            )
            for i in range(len(self.ids))
        ]

    def _compute_whole(self, rows: Tensor) -> Tensor:
        whole = self._whole
        if whole is not None:
            first, second = whole
            gate, up = first(fill(rows, first.least_rows)).split(self.held, 1)
            sums = second(self._activate(gate, up, slice(None)))[: len(rows)].float()
        else:
            gate, up = (rows @ self.gate_up).split(self.held, 1)
            sums = (self._activate(gate, up, slice(None)) @ self.down).float()
        return sums if self.down_bias is None else sums.add_(self.down_bias)

    def _compute_run(self, rows: Tensor, first: int, last: int) -> Tensor:
        """Columns ``first`` to ``last`` of the held part of the intermediate dimension, without the last bias."""
        gate = rows @ self.gate_up[:, first:last]
        up = rows @ self.gate_up[:, self.held + first : self.held + last]
        return (self._activate(gate, up, slice(first, last)) @ self.down[first:last]).float()

    def _activate(self, gate: Tensor, up: Tensor, part: slice) -> Tensor:
        if self.gate_bias is not None:
            gate = gate + self.gate_bias[part]
        if self.up_bias is not None:
            up = up + self.up_bias[part]
        if torch.is_grad_enabled():  # some activations' gradients need their own result as it was
            return self.act(gate) * up
        return self.act(gate).mul_(up)


def _find_runs(places: list[int]) -> list[list[int]]:
    """Ascending numbers, cut where one is missing: ``[0, 1, 3]`` is ``[[0, 1], [3]]``."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def find_formula(
    ffn: Callable[[Tensor], Tensor], linears: dict[str, Tensor], inputs: list[Tensor]
) -> tuple[str, str, str, str] | None:
    """Which of three matrices are gate, up and down, and which activation, so that ``ffn`` is the formula.

    Args:
        linears: ``{name: weight}``; two are (intermediate, hidden), one is (hidden, intermediate).
        inputs: each (n, hidden), f64; small values tell activations apart, large ones reveal clamps.

    Returns:
        (gate, up, down, activation), or None if no assignment gives what ``ffn`` computes.
    """
    wanted = [ffn(x) for x in inputs]
    for gate, up, down in itertools.permutations(linears):
        first, second, last = linears[gate], linears[up], linears[down]
        if not first.shape == second.shape == last.shape[::-1] or first.shape[1] != inputs[0].shape[-1]:
            continue
        for name, act in ACTIVATIONS.items():
            got = [(act(x @ first.T) * (x @ second.T)) @ last.T for x in inputs]
            if all(_is_same(a, b) for a, b in zip(got, wanted, strict=True)):
                return gate, up, down, name
    return None


def _is_same(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and bool((want - got).abs().max() <= FORMULA_TOLERANCE * got.abs().max())
