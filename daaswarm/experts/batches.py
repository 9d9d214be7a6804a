"""Calls of several callers computed as one, and split again. What waits while one batch computes is the next batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import trio
from torch import Tensor

from daaswarm.core.admission import Ticket
from daaswarm.messages import ExpertCall, ExpertReply

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined]

    from daaswarm.experts.service import HostedModel, Layer

Answer = tuple[ExpertReply, Sequence["Buffer"]]
Pairs = tuple[Tensor, Tensor, Tensor]
"""(pairs,) rows int64, (pairs,) experts int64, (pairs,) weights f32."""


@dataclass(eq=False)
class Waiting:
    """A call in the queue.

    Attributes:
        turn: set when it leads its batch, or when its answer is there.
        batch: what it leads; empty for one that rides along.
        answer: its own, or what went wrong with it.
        service_s: its part of the time of its batch.
    """

    hosted: HostedModel
    layer: Layer
    call: ExpertCall
    body: memoryview
    ticket: Ticket
    turn: trio.Event = field(default_factory=trio.Event)
    batch: list[Waiting] = field(default_factory=list)
    answer: Answer | Exception | None = None
    service_s: float | None = None


def get_group(layer: Layer, call: ExpertCall) -> Hashable:
    """Calls with the same group may be computed together; ``None`` for one that is computed alone."""
    if call.grad or call.opened:
        return None
    return id(layer), None if call.pairs else tuple(call.experts)  # the queue keeps the layer, so its id is its own


def join(rows: Sequence[Tensor], pairs: Sequence[Pairs | None]) -> tuple[Tensor, Pairs | None]:
    """Several calls' rows and pairs as those of one call."""
    together = torch.cat(list(rows))
    known = [each for each in pairs if each is not None]
    if not known:
        return together, None
    shifted, start = [], 0
    for part, each in zip(rows, known, strict=True):
        shifted.append(each[0] + start)
        start += len(part)
    return together, (torch.cat(shifted), torch.cat([p[1] for p in known]), torch.cat([p[2] for p in known]))


def settle(
    batch: Sequence[Waiting], together: Callable[[Sequence[Waiting]], list[Answer]], alone: Callable[[Waiting], Answer]
) -> None:
    """Fill in every answer. Where the batch fails, each call is computed alone, so that a bad one harms no other."""
    try:
        for waiting, answer in zip(batch, together(batch), strict=True):
            waiting.answer = answer
        return
    except Exception:  # noqa: BLE001 - found again, and told to its caller, below
        pass
    for waiting in batch:
        try:
            waiting.answer = alone(waiting)
        except Exception as error:  # noqa: BLE001 - raised again where the caller waits
            waiting.answer = error
