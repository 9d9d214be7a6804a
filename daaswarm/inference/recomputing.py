"""Computes a call here, from the checkpoint on this machine: the judge where two hosts disagree."""

from __future__ import annotations

import torch
from torch import Tensor

from daaswarm.inference.shares import Share
from daaswarm.messages import ExpertCall
from daaswarm.models.experts import LayerExperts, load_experts
from daaswarm.models.sources import LocalModel
from daaswarm.types import Dtype

KEPT = 2  # experts of so many calls stay in memory; disagreements are rare, and this machine may be small


class Recomputer:
    """For one model and dtype; one thread at a time.

    Raises (when called):
        ModelError: the weights aren't here, or were altered.
    """

    def __init__(self, model: LocalModel, dtype: Dtype) -> None:
        self._model = model
        self._dtype: Dtype = dtype
        self._kept: dict[tuple[int, tuple[int, ...]], LayerExperts] = {}

    def __call__(self, call: ExpertCall, share: Share) -> Tensor:
        """(rows, hidden) f32. Reads the experts from the disk, each part checked against the manifest."""
        layer = self._get(call.layer, tuple(sorted(call.experts)))
        with torch.inference_mode():
            if share.pair_rows is None or share.pair_experts is None or share.pair_weights is None:
                return layer.compute_slices(share.rows, sorted(call.experts))
            return layer.compute_pairs(share.rows, share.pair_rows, share.pair_experts, share.pair_weights)

    def _get(self, layer: int, experts: tuple[int, ...]) -> LayerExperts:
        key = layer, experts
        if key not in self._kept:
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = load_experts(self._model, {layer: list(experts)}, self._dtype)[layer]
        return self._kept[key]
