"""The backward pass of an expert call. Nothing is kept from the forward one: it is computed again here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from daaswarm.messages import ExpertCall

GRADIENT_COST = 3  # forwards: forward again, then at most two products for each of its own
# Computed, with what autograd keeps of it, between two looks whether anybody still waits. Autograd keeps about five
# values per row and unit of an expert: 256 x 57,344 x 5 x f32 is 300 MB.
GRADIENT_ROWS = 256
GRADIENT_PAIRS = 512
VALUE_BYTES = 4  # of gradients: f32

Pairs = tuple[Tensor, Tensor, Tensor]
"""(pairs,) rows int64, (pairs,) experts int64, (pairs,) weights f32."""


@runtime_checkable
class Differentiable(Protocol):
    """A layer that autograd can follow (``models.experts.LayerExperts``); others' gradients are refused."""

    def compute_pairs_with_graph(
        self, rows: Tensor, row_index: Tensor, expert_index: Tensor, weights: Tensor
    ) -> Tensor: ...

    def compute_slices_with_graph(self, rows: Tensor, slices: list[int]) -> Tensor: ...


def get_cost(call: ExpertCall) -> int:
    """How many forward calls it is worth in the queue."""
    return GRADIENT_COST if call.grad else 1


def get_gradient_bytes(call: ExpertCall) -> int:
    """The gradient of the sums at the end of a call's body; nothing for a forward call."""
    return VALUE_BYTES * call.rows * call.hidden if call.grad else 0


def compute_gradients(
    layer: Differentiable,
    call: ExpertCall,
    rows: Tensor,
    pairs: Pairs | None,
    body: memoryview,
    check_cancelled: Callable[[], object] | None,
) -> list[Tensor]:
    """Gradients of ``rows``, and with pairs of their weights, given that of the sums.

    Args:
        rows: (n, hidden) of the call's dtype.
        pairs: checked; ``None`` for slices.
        body: ends with the gradient of the sums, (n, hidden) f32.

    Returns:
        (n, hidden) f32 and, with pairs, (pairs,) f32.
    """
    count = call.rows * call.hidden
    upstream = torch.frombuffer(body, dtype=torch.float32, offset=len(body) - VALUE_BYTES * count, count=count)
    upstream = upstream.view(call.rows, call.hidden)
    with torch.inference_mode(False), torch.enable_grad():
        if pairs is None:
            return [_compute_slices(layer, rows, call.experts, upstream, check_cancelled)]
        return _compute_pairs(layer, rows, pairs, upstream, check_cancelled)


def _compute_slices(
    layer: Differentiable,
    rows: Tensor,
    slices: list[int],
    upstream: Tensor,
    check_cancelled: Callable[[], object] | None,
) -> Tensor:
    gradient = torch.empty(rows.shape, dtype=torch.float32)
    for start in range(0, len(rows), GRADIENT_ROWS):
        if check_cancelled is not None:
            check_cancelled()
        part = slice(start, start + GRADIENT_ROWS)
        x = rows[part].clone().requires_grad_()
        (gradient[part],) = torch.autograd.grad(layer.compute_slices_with_graph(x, slices), x, upstream[part])
    return gradient


def _compute_pairs(
    layer: Differentiable,
    rows: Tensor,
    pairs: Pairs,
    upstream: Tensor,
    check_cancelled: Callable[[], object] | None,
) -> list[Tensor]:
    """The sums are linear in the pairs, so a pair's gradients need no other pair."""
    row_index, expert_index, weights = pairs
    gradient, of_weights = torch.zeros(rows.shape, dtype=torch.float32), torch.zeros(len(weights))
    for chosen in expert_index.argsort(stable=True).split(GRADIENT_PAIRS):  # few experts a block
        if check_cancelled is not None:
            check_cancelled()
        used, place = row_index[chosen].unique(return_inverse=True)
        x, w = rows[used].requires_grad_(), weights[chosen].requires_grad_()
        sums = layer.compute_pairs_with_graph(x, place, expert_index[chosen], w)
        of_rows, of_weights[chosen] = torch.autograd.grad(sums, (x, w), upstream[used])
        gradient.index_add_(0, used, of_rows.float())
    return [gradient, of_weights]
