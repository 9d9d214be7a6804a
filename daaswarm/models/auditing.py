"""Checks what a host says it computed of a gated FFN, without its weights: Freivalds' check with a sound error bound.

For each matrix W of an expert or slice the requester keeps a secret Gaussian sketch S, the product R = S W, and norms
(:mod:`daaswarm.models.secrets` makes them). A host *opens* a row: it says its gate, up and hidden activations. Each
stage z = W a is then judged against its own forward-error bound, never against ‖z‖ alone, or inputs whose output nearly
cancels would make an honest host look like a liar:

    T = U ‖z‖ + c 2⁻²⁴ Σₖ |aₖ| ‖W₌ₖ‖,  c = √n,  U: the unit roundoff of the dtype;
    z passes if it is finite and ‖S z - R a‖² ≤ χ²ₛ(1 - 1e-9) T².

The hidden activations are compared elementwise with act(g) u. NaN never passes, since only a comparison that is true
does. What can't be judged, as an overflow that may be honest, abstains: somebody has to compute it again. Sources:
Freivalds (1977); Higham, "Accuracy and Stability of Numerical Algorithms", for the bound; measured error rates and
blind spots: ``docs/explanation/security.md``.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from daaswarm.models.dense import ACTIVATIONS

PASS, FAIL, ABSTAIN = 0, 1, 2  # a row's verdict
SCREEN_MARGIN = 0.8  # of the limit, for the screening in f32
FALSE_ALARM = 1e-9  # of one stage of an honest row, if its rounding errors were as large as the bound

U32 = 2.0**-24
EXACT = ("silu", "relu", "identity")  # whose relative error is a few units in the last place everywhere
# Measured: two honest answers, of other threads, batches and machines, differ by less (relative to a row's length, L2)
TOLERANCES: dict[torch.dtype, float] = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


class Rounding(NamedTuple):
    """A dtype's errors. ``unit``: unit roundoff. ``tiny``: absolute, of a product near underflow. ``steps``: roundings
    in act(g) u. ``floor``: absolute, of that product near underflow.
    """

    unit: float
    tiny: float
    steps: float
    floor: float


ROUNDINGS: dict[torch.dtype, Rounding] = {
    torch.float32: Rounding(2.0**-24, 2.0**-126, 8.0, 1e-36),
    torch.bfloat16: Rounding(2.0**-8, 2.0**-126, 2.02, 1e-36),
    torch.float16: Rounding(2.0**-11, 2.0**-25, 2.02, 2.0**-25),
}


class Stage:
    """The requester's secret side of one matrix W, (outputs, inputs) in the dtype that hosts use.

    Args:
        sketch: (s, outputs) f32.
        product: (s, inputs) f32, ``sketch @ W``.
        columns: (inputs,) f32, the length of each column of W, or a little more.
        row: the length of the longest row, or a little more.
    """

    def __init__(self, sketch: Tensor, product: Tensor, columns: Tensor, row: float) -> None:
        self.sketch32, self.product32, self.columns32, self.row = sketch, product, columns, row
        self._turned = sketch.t().contiguous(), product.t().contiguous()

    @functools.cached_property
    def sketch(self) -> Tensor:
        return self.sketch32.double()

    @functools.cached_property
    def product(self) -> Tensor:
        return self.product32.double()

    @functools.cached_property
    def columns(self) -> Tensor:
        return self.columns32.double()

    @property
    def inputs(self) -> int:
        return self.product32.shape[1]

    def screen(self, a: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
        """(rows,) whether z = W a surely passes, in f32: a margin of a fifth is more than its own errors. What
        isn't sure, and what isn't finite, is for :meth:`check`.
        """
        bound = ROUNDINGS[dtype].unit * z.norm(dim=1) + math.sqrt(self.inputs) * U32 * (a.abs() @ self.columns32)
        residual = torch.addmm(z @ self._turned[0], a, self._turned[1], alpha=-1).norm(dim=1)
        return residual <= SCREEN_MARGIN * math.sqrt(get_quantile(len(self.sketch32))) * bound

    def get_reach(self, a: Tensor) -> Tensor:
        """(rows,): Σₖ |aₖ| ‖W₌ₖ‖, at least the length of |W||a|."""
        return a.abs() @ self.columns

    def check(self, a: Tensor, z: Tensor, dtype: torch.dtype, inputs: int | None = None) -> Tensor:
        """Verdicts on z = W a.

        Args:
            a, z: (rows, inputs) and (rows, outputs), f64.
            dtype: that z was rounded to.
            inputs: terms in a sum; all of W's if that isn't said.
        """
        rounding = ROUNDINGS[dtype]
        c = math.sqrt(inputs or self.inputs)
        tiny = math.sqrt(z.shape[1]) * rounding.tiny * (self.inputs if rounding.tiny < 1e-30 else 1)
        bound = rounding.unit * z.norm(dim=1) + c * U32 * self.get_reach(a) + tiny
        residual = (z @ self.sketch.T - a @ self.product.T).norm(dim=1)
        finite = z.isfinite().all(1)
        verdict = torch.where(finite & (residual <= math.sqrt(get_quantile(len(self.sketch))) * bound), PASS, FAIL)
        overflow = self.row * a.norm(dim=1) * (1 + 1e-3) >= torch.finfo(dtype).max
        verdict = torch.where(~finite & overflow, ABSTAIN, verdict)
        return torch.where(a.isfinite().all(1), verdict, ABSTAIN)  # a bad input convicts nobody


class FfnSecrets(NamedTuple):
    """Of one expert, or of a run of slices."""

    gate: Stage
    up: Stage
    down: Stage
    activation: str


class Opened(NamedTuple):
    """What a host says of some rows, in the dtype that it computes in.

    Attributes:
        gate, up, hidden: (rows, width).
        out: (rows, hidden size), before it is weighted and summed.
    """

    gate: Tensor
    up: Tensor
    hidden: Tensor
    out: Tensor


def check_ffn(secrets: FfnSecrets, x: Tensor, opened: Opened) -> Tensor:
    """(rows,) verdicts on one expert's computation. x: (rows, hidden size) in the dtype.

    Rows that surely pass are found in f32; the rest is judged in f64.
    """
    sure = screen_ffn(secrets, x, opened)
    verdicts = torch.full((len(x),), PASS)
    if not bool(sure.all()):
        rest = ~sure
        verdicts[rest] = judge_ffn(secrets, x[rest], Opened(*(each[rest] for each in opened)))
    return verdicts


def screen_ffn(secrets: FfnSecrets, x: Tensor, opened: Opened) -> Tensor:
    """(rows,) whether a row surely passes. NaN makes every comparison false."""
    dtype, rounding = x.dtype, ROUNDINGS[x.dtype]
    x = x.float()
    gate, up, hidden, out = (each.float() for each in opened)
    exact = ACTIVATIONS[secrets.activation](gate) * up
    size = exact.abs() if secrets.activation in EXACT else torch.maximum(exact.abs(), (gate * up).abs())
    steps = rounding.steps * 0.99 if dtype != torch.float32 else rounding.steps - 2  # f32's own two are in it
    sure = ((hidden - exact).abs() <= steps * rounding.unit * size).all(1)
    for stage, a, z in ((secrets.gate, x, gate), (secrets.up, x, up), (secrets.down, hidden, out)):
        sure &= stage.screen(a, z, dtype)
    return sure


def judge_ffn(secrets: FfnSecrets, x: Tensor, opened: Opened) -> Tensor:
    """(rows,) verdicts, all in f64."""
    dtype = x.dtype
    x = x.double()
    gate, up, hidden, out = (each.double() for each in opened)
    verdicts = torch.stack(
        [
            secrets.gate.check(x, gate, dtype),
            secrets.up.check(x, up, dtype),
            check_product(gate, up, hidden, secrets.activation, dtype),
            secrets.down.check(hidden, out, dtype),
        ]
    )
    return judge(verdicts)


def judge(verdicts: Tensor) -> Tensor:
    """(stages, rows) → (rows,). Each stage is judged by what the host itself said before, so any failure stands alone;
    otherwise any abstention does.
    """
    return torch.where((verdicts == FAIL).any(0), FAIL, verdicts.amax(0))


def check_product(gate: Tensor, up: Tensor, hidden: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    """Verdicts on hidden = act(gate) up, all f64: any way to compute it with two roundings passes."""
    rounding = ROUNDINGS[dtype]
    exact = ACTIVATIONS[activation](gate) * up
    size = exact.abs() if activation in EXACT else torch.maximum(exact.abs(), (gate * up).abs())
    limit = rounding.steps * rounding.unit * (1 + rounding.unit) * size + rounding.floor * (1 + up.abs()) * 1.01
    same = ((hidden - exact).abs() <= limit).all(1)
    bad = ~(gate.isfinite().all(1) & up.isfinite().all(1))
    most = torch.finfo(dtype).max
    overflow = (exact.abs() * (1 + 3 * rounding.unit) >= most).any(1) & ~hidden.isfinite().all(1)
    return torch.where(bad | overflow, ABSTAIN, torch.where(same, PASS, FAIL))


def check_sum(sums: Tensor, parts: Tensor, sizes: Tensor, terms: int) -> Tensor:
    """Verdicts on f32 sums of products of f32 numbers.

    Args:
        sums: (rows, hidden size), as delivered.
        parts: (rows, hidden size) f64, the same with less rounding.
        sizes: (rows, hidden size) f64, the sum of the terms' absolute values.
        terms: in the longest sum.
    """
    same = ((sums.double() - parts).abs() <= (terms + 2) * U32 * sizes + (terms + 2) * 2.0**-126).all(1)
    overflow = (sizes * (1 + terms * U32) >= torch.finfo(torch.float32).max).any(1) & ~sums.isfinite().all(1)
    return torch.where(overflow | ~parts.isfinite().all(1), ABSTAIN, torch.where(same, PASS, FAIL))


def check_again(sums: Tensor, again: Tensor, reach: Tensor, dtype: torch.dtype) -> Tensor:
    """Verdicts on sums that were delivered, beside the same computed again, which has passed.

    Args:
        sums, again: (rows, hidden size).
        reach: (rows,), √Σₖ hₖ² ‖W₌ₖ‖²: how long a row would be if nothing cancelled.
    """
    away = (sums.double() - again.double()).norm(dim=1)
    limit = TOLERANCES[dtype] * torch.maximum(again.double().norm(dim=1), reach)
    finite = again.isfinite().all(1)
    return torch.where(finite, torch.where(away <= limit, PASS, FAIL), ABSTAIN)


def get_spread(secrets: FfnSecrets, hidden: Tensor) -> Tensor:
    """(rows,): ``reach`` of :func:`check_again` for one expert."""
    return (hidden.double().square() @ secrets.down.columns.square()).sqrt()


def join_slices(parts: list[FfnSecrets]) -> FfnSecrets:
    """The secrets of several slices together, which are one FFN of their widths' sum. Their down projections must have
    been made with one sketch, and the others with sketches of their own: errors of two slices could cancel otherwise.
    """
    first = parts[0]
    if len(parts) == 1:
        return first

    def stack(stages: list[Stage]) -> Stage:  # outputs one below the other
        return Stage(
            torch.cat([stage.sketch32 for stage in stages], 1),
            torch.stack([stage.product for stage in stages]).sum(0).float(),
            round_up(torch.stack([stage.columns for stage in stages]).square().sum(0).sqrt()),
            max(stage.row for stage in stages),
        )

    down = Stage(
        first.down.sketch32,
        torch.cat([part.down.product32 for part in parts], 1),
        torch.cat([part.down.columns32 for part in parts]),
        math.sqrt(sum(part.down.row**2 for part in parts)),
    )
    return FfnSecrets(stack([part.gate for part in parts]), stack([part.up for part in parts]), down, first.activation)


def round_up(value: Tensor) -> Tensor:
    """A norm in f32, not below what it is."""
    return torch.nextafter(value.float(), torch.tensor(math.inf))


@functools.cache
def get_quantile(freedom: int, tail: float = FALSE_ALARM) -> float:
    """What a χ² variable with so many degrees of freedom exceeds with probability ``tail``, by bisection."""
    low, high = 0.0, 1e4
    half = torch.tensor(freedom / 2, dtype=torch.float64)
    for _ in range(200):
        middle = (low + high) / 2
        left = float(torch.special.gammaincc(half, torch.tensor(middle / 2, dtype=torch.float64)))
        low, high = (middle, high) if left > tail else (low, middle)
    return high
