"""The work of one layer, cut into what one host can do in one call."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from daaswarm.types import PeerId


@dataclass
class Share:
    """A part of one layer's work that one host can do in one call.

    ``pair_rows`` number rows within ``rows``; for slices of a dense FFN there are no pairs.
    """

    experts: list[int]
    rows: torch.Tensor  # (n, hidden)
    into: torch.Tensor | None  # (n,) the rows of the layer they are; None: all, in order
    pair_rows: torch.Tensor | None = None  # (pairs,)
    pair_experts: torch.Tensor | None = None
    pair_weights: torch.Tensor | None = None
    failed: set[PeerId] = field(default_factory=set)
    busy: set[PeerId] = field(default_factory=set)  # refused it just now
    waits: int = 0  # for busy hosts
    waited_s: float = 0.0  # in these waits
    refreshed: bool = False  # the swarm was asked again for it, once

    def restrict(self, experts: list[int]) -> Share:
        """The part of this share that only these experts do."""
        if self.pair_experts is None:
            part = Share(experts, self.rows, self.into)
        else:
            assert self.pair_rows is not None and self.pair_weights is not None
            mine = torch.isin(self.pair_experts, torch.tensor(experts))
            part = make_pair_share(
                experts, self.rows, self.into, self.pair_rows[mine], self.pair_experts[mine], self.pair_weights[mine]
            )
        part.failed, part.busy = set(self.failed), set(self.busy)
        part.waits, part.waited_s, part.refreshed = self.waits, self.waited_s, self.refreshed
        return part

    @property
    def work(self) -> int:
        """Rows through an expert each."""
        return len(self.rows) * len(self.experts) if self.pair_rows is None else len(self.pair_rows)

    def get_demand(self) -> dict[int, int]:
        """Rows of work per expert."""
        if self.pair_experts is None:
            return dict.fromkeys(self.experts, len(self.rows))
        numbers, counts = self.pair_experts.unique(return_counts=True)
        return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


def make_pair_share(
    experts: list[int],
    rows: torch.Tensor,
    into: torch.Tensor | None,
    pair_rows: torch.Tensor,
    pair_experts: torch.Tensor,
    pair_weights: torch.Tensor,
) -> Share:
    """A share that carries only the rows its pairs need."""
    needed, local = pair_rows.unique(return_inverse=True)
    if len(needed) < len(rows):
        rows = rows[needed]
        into = needed if into is None else into[needed]
        pair_rows = local
    return Share(experts, rows, into, pair_rows, pair_experts, pair_weights)
