"""Experts of a layer on other peers, as an ``nn.Module`` that autograd goes through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from daaswarm.errors import LocalProtocolError
from daaswarm.inference.plan import HostPlan
from daaswarm.models.sources import LocalModel
from daaswarm.training.client import TrainingSwarm, Work, to_wire
from daaswarm.types import Dtype, PeerId


class RemoteExpert(nn.Module):
    """Some experts of a mixture-of-experts layer, or some slices of a dense one. Has no parameters of its own: the
    weights are the hosts', and stay as they are.

    Args:
        swarm: see :func:`daaswarm.training.client.open_swarm`.
        model: whose layer it is.
        experts: which of them; ``None``: all that the layer has.
        peer: the one host to ask; ``None``: any, and another one where one fails, also between forward and backward.

    Raises:
        LocalProtocolError: the model has no such layer or experts.
    """

    def __init__(
        self,
        swarm: TrainingSwarm,
        model: LocalModel,
        layer: int,
        experts: Sequence[int] | None = None,
        *,
        dtype: Dtype = "f32",
        peer: str | None = None,
    ) -> None:
        super().__init__()
        count = model.layers.get(layer, 0)
        self.experts = sorted(set(range(count) if experts is None else experts))
        if not self.experts or not 0 <= self.experts[0] <= self.experts[-1] < count:
            raise LocalProtocolError(f"{model.name}, layer {layer}: there are {count} experts, not {self.experts}")
        self.layer = layer
        self.kind = model.kind
        self.hidden = model.hidden
        self._swarm = swarm
        self._plan = _keep(swarm.find_hosts(model, dtype), PeerId(peer) if peer is not None else None)

    def forward(self, rows: Tensor, index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """The weighted sum of the experts' outputs; differentiable in ``rows`` and ``weights``.

        Args:
            rows: (..., hidden).
            index, weights: (..., k), the experts of each row and their weights. Without them every expert counts with
                weight one, and so does every slice of a dense layer always.

        Returns:
            (..., hidden) of the dtype and device of ``rows``.

        Raises:
            LocalProtocolError: shapes that don't fit, or an expert that isn't one of these.
            NoPeerCouldServe, DaaswarmError: nobody answered; also when ``backward`` asks.
        """
        flat = rows.reshape(-1, rows.shape[-1])
        if flat.shape[1] != self.hidden or not len(flat):
            raise LocalProtocolError(f"rows of shape {tuple(rows.shape)}; their last size must be {self.hidden}")
        if self.kind == "dense":
            if index is not None or weights is not None:
                raise LocalProtocolError("the slices of a dense layer are all asked: give no index and no weights")
            work = Work(self.layer, self.experts, to_wire(flat, self._plan.dtype))
            return _Call.apply(flat, None, self._swarm, self._plan, work).view(rows.shape)  # type: ignore[union-attr]
        if index is None or weights is None:
            if index is not None or weights is not None:
                raise LocalProtocolError("index and weights go together")
            index = torch.tensor(self.experts).expand(len(flat), -1)
            weights = torch.ones(index.shape)
        k = index.shape[-1]
        if index.shape != weights.shape or index.numel() != k * len(flat) or not index.numel():
            shapes = f"{tuple(index.shape)} and {tuple(weights.shape)}"
            raise LocalProtocolError(f"index and weights of shapes {shapes} for rows of shape {tuple(rows.shape)}")
        expert_index = index.detach().to("cpu", torch.int64, copy=True).reshape(-1)
        unknown = sorted(set(expert_index.tolist()) - set(self.experts))
        if unknown:
            raise LocalProtocolError(f"index names experts {unknown}; this module has {self.experts}")
        work = Work(
            self.layer,
            self.experts,
            to_wire(flat, self._plan.dtype),
            torch.arange(len(flat)).repeat_interleave(k),
            expert_index,
            weights.detach().to("cpu", torch.float32, copy=True).reshape(-1),
        )
        return _Call.apply(flat, weights.reshape(-1), self._swarm, self._plan, work).view(rows.shape)  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        return f"layer={self.layer}, experts={self.experts}"


class _Call(torch.autograd.Function):
    """The calls are stateless: what backward needs is sent again, so any replica can answer it."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor | None, swarm: TrainingSwarm, plan: HostPlan, work: Work
    ) -> Tensor:
        ctx.swarm, ctx.plan, ctx.work = swarm, plan, work
        ctx.rows_like = rows.device, rows.dtype
        ctx.weights_like = None if weights is None else (weights.device, weights.dtype)
        return swarm.compute(plan, work)[0].to(*ctx.rows_like)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        work = replace(ctx.work, upstream=gradient.detach().to("cpu", torch.float32, copy=True).contiguous())
        of_rows, of_weights = ctx.swarm.compute(ctx.plan, work)
        if of_weights is not None and ctx.weights_like is not None:
            of_weights = of_weights.to(*ctx.weights_like)
        return of_rows.to(*ctx.rows_like), of_weights, None, None, None


def _keep(plan: HostPlan, peer: PeerId | None) -> HostPlan:
    if peer is None:
        return plan
    holders = {expert: [peer] for expert, peers in plan.holders.items() if peer in peers}
    return HostPlan(plan.root, plan.dtype, plan.layers, holders, plan.contacts, kind=plan.kind)
