"""Ways to multiply rows with a matrix that stays, and which of them is the fastest on this machine for a shape.

Which one wins differs between processors, dtypes and builds of torch, so each is tried on an expert's own weights when
the first of a shape is loaded (:class:`KernelRegistry`), after its result was compared with the plain one's. What was
measured, and what isn't tried and why (compiled, grouped): ``docs/explanation/performance.md``.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

TRIED_ROWS = (1, 4, 16, 128)  # from one answer's token to a prefill
TRIES = 3  # of each way and number of rows; the median counts
TRY_S = 0.05  # no further try of one way and number of rows after this
GAIN = 0.8  # of the usual way's time that another has to stay below: hosts should differ in rounding only where it pays
TRIED_BYTES = 1 << 20  # smaller experts take the usual way: what a try shows of them is noise
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}  # relative to the largest; others: never


class Matrix(Protocol):
    """``rows @ weight.T``: a weight, (outputs, inputs), laid out in some way.

    Attributes:
        least_rows: fewer are filled up with zeros by who calls (:func:`fill`): it is faster so.
    """

    least_rows: int

    def __call__(self, rows: Tensor) -> Tensor:
        """rows: (n, inputs) of the weight's dtype; returns (n, outputs)."""
        ...

    def unpack(self) -> Tensor:
        """The weight, (outputs, inputs)."""
        ...


class EagerMatrix:
    """As a checkpoint has it, by ``functional.linear``. Autograd may follow; any device."""

    least_rows = 1

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, rows: Tensor) -> Tensor:
        return functional.linear(rows, self._weight)

    def unpack(self) -> Tensor:
        return self._weight


class InputMajorMatrix:
    """Laid out (inputs, outputs), so that one row reads memory in order. Autograd may follow; any device."""

    least_rows = 1

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.t().contiguous()

    def __call__(self, rows: Tensor) -> Tensor:
        return rows @ self._weight

    def unpack(self) -> Tensor:
        return self._weight.t()


class PackedMatrix:
    """Laid out as oneDNN's products want it (torch's compiler does the same to models that it freezes). No autograd, on
    the processor only, for a dtype that :func:`can_pack`.
    """

    least_rows = 4  # oneDNN's kernels for fewer are slower than those for four
    _PACKED_FOR = 16  # rows that the layout is asked for; those for 2 to 512 were measured to be the same

    def __init__(self, weight: Tensor) -> None:
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), self._PACKED_FOR)

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, self._packed, None, "none", [], "")

    def unpack(self) -> Tensor:
        return self._packed.to_dense()


def can_pack(weight: Tensor) -> bool:
    """Whether this build of torch has packed products for such a weight on this processor."""
    if weight.device.type != "cpu":
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def fill(rows: Tensor, least: int) -> Tensor:
    """Rows, with zeros behind them where they are fewer than ``least``."""
    if 0 < len(rows) < least:
        return functional.pad(rows, (0, 0, 0, least - len(rows)))
    return rows


KERNELS: dict[str, tuple[Callable[[Tensor], bool], Callable[[Tensor], Matrix]]] = {
    "packed": (can_pack, PackedMatrix),
    "eager": (lambda weight: True, EagerMatrix),
    "input-major": (lambda weight: True, InputMajorMatrix),
}
"""``{name: (whether a weight can be laid out so, how)}``; the first that can be is the usual one."""


@dataclass(frozen=True)
class Choice:
    """What was tried for one shape.

    Attributes:
        first, down: shapes of the two matrices of an FFN, (outputs, inputs).
        kernel: the fastest that was right; a key of :data:`KERNELS`.
        times_ms: ``{kernel: {rows: median time of both products}}``; empty for small experts, of which none is tried.
        wrong: kernels whose result was not the plain one's.
    """

    first: tuple[int, ...]
    down: tuple[int, ...]
    dtype: torch.dtype
    kernel: str
    times_ms: dict[str, dict[int, float]]
    wrong: list[str] = field(default_factory=list)


class KernelRegistry:
    """The fastest way for each pair of shapes that was asked for; tried once. Threads may share it."""

    def __init__(self) -> None:
        self._choices: dict[tuple[object, ...], Choice] = {}
        self._lock = threading.Lock()

    @property
    def choices(self) -> list[Choice]:
        return list(self._choices.values())

    def choose(self, first: Tensor, down: Tensor) -> Choice:
        """Try what this machine can, unless it was tried for this shape. Blocks for a second at most.

        Args:
            first: (outputs, hidden), where an FFN begins: gate and up, or up alone.
            down: (hidden, intermediate).
        """
        key = (first.shape, down.shape, first.dtype, first.device.type)
        with self._lock:  # two at once would slow each other down, by different amounts
            known = self._choices.get(key)
            if known is None:
                known = self._choices[key] = _try(first, down)
            return known


REGISTRY = KernelRegistry()
"""This process's."""


def lay_out(first: Tensor, down: Tensor) -> tuple[Matrix, Matrix]:
    """An FFN's two matrices as they are the fastest here."""
    _, make = KERNELS[REGISTRY.choose(first, down).kernel]
    return make(first), make(down)


@torch.inference_mode()
def _try(first: Tensor, down: Tensor) -> Choice:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(max(TRIED_ROWS), weight.shape[1], generator=generator).to(weight) for weight in (first, down)]
    wanted = [functional.linear(rows, weight) for rows, weight in zip(inputs, (first, down), strict=True)]
    times: dict[str, dict[int, float]] = {}
    wrong: list[str] = []
    possible = {name: make for name, (can, make) in KERNELS.items() if can(first) and can(down)}
    if first.nbytes + down.nbytes < TRIED_BYTES:
        return Choice(tuple(first.shape), tuple(down.shape), first.dtype, next(iter(possible)), {})
    for name, make in possible.items():
        try:
            products = [Product(make(weight), rows) for weight, rows in zip((first, down), inputs, strict=True)]
            right = all(
                _is_same(product(n), want[:n])
                for product, want in zip(products, wanted, strict=True)
                for n in TRIED_ROWS
            )
        except RuntimeError:  # an operator that this build has in name only
            right = False
        if right:
            times[name] = {n: _measure(products, n) for n in TRIED_ROWS}
        else:
            wrong.append(name)
    return Choice(tuple(first.shape), tuple(down.shape), first.dtype, _pick(times), times, wrong)


class Product(NamedTuple):
    matrix: Matrix
    rows: Tensor

    def __call__(self, n: int) -> Tensor:
        """Of the first n rows, as an expert computes it."""
        return self.matrix(fill(self.rows[:n], self.matrix.least_rows))[:n]


def _pick(times: dict[str, dict[int, float]]) -> str:
    """The way with the least mean of its times over the usual one's, each number of rows counting the same."""
    usual = next(iter(times))
    ratios = {
        name: statistics.geometric_mean([ms / times[usual][n] for n, ms in mine.items()])
        for name, mine in times.items()
        if name != usual
    }
    best = min(ratios, key=ratios.__getitem__, default=usual)
    return best if ratios.get(best, 1.0) < GAIN else usual


def _measure(products: list[Product], n: int) -> float:
    """Milliseconds for n rows."""
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < TRIES and (not taken or time.perf_counter() - began < TRY_S):
        started = time.perf_counter()
        for product in products:
            product(n)
        taken.append((time.perf_counter() - started) * 1e3)
    return statistics.median(taken)


def _is_same(got: Tensor, want: Tensor) -> bool:
    difference = (got.float() - want.float()).abs().max()
    return bool(difference <= TOLERANCE.get(want.dtype, 0.0) * want.float().abs().max())
