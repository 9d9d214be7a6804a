"""Opened calls: with the sums, the activations between, so that who asked can check them without the weights.

A host keeps nothing for it: a call that is asked for again, opened, is computed again.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from daaswarm.errors import ExpertError, RemoteProtocolError, TooLarge
from daaswarm.limits import CALL_BODY_BYTES
from daaswarm.messages import ExpertCall

OPENED_ROWS = 512  # of one call, as many as a requester sends
OPENED_PAIRS = 4_096

Pairs = tuple[Tensor, Tensor, Tensor]


@runtime_checkable
class Openable(Protocol):
    """A layer that can say what stands between (``models.experts.LayerExperts``)."""

    can_open: bool

    def open_pairs(
        self, rows: Tensor, row_index: Tensor, expert_index: Tensor, weights: Tensor
    ) -> tuple[Tensor, list[Tensor]]: ...

    def open_slices(self, rows: Tensor, slices: list[int]) -> tuple[Tensor, list[Tensor]]: ...


def check_opening(call: ExpertCall, layer: object) -> None:
    """Raises:
    ExpertError: the layer's experts can't be opened.
    TooLarge: the answer would be.
    RemoteProtocolError: the call contradicts itself.
    """
    if call.grad or call.codec or call.reply_codec:
        raise RemoteProtocolError("expert call: opened without gradients and codecs only", reject=False)
    if not isinstance(layer, Openable) or not layer.can_open:
        raise ExpertError("these experts can't be opened", hint="compare two hosts instead")
    if call.rows > OPENED_ROWS or call.pairs > OPENED_PAIRS:
        raise TooLarge(
            f"opened call: {call.rows} rows and {call.pairs} pairs; {OPENED_ROWS} and {OPENED_PAIRS} are allowed",
            hint="split the call",
        )


def compute_opened(layer: Openable, call: ExpertCall, rows: Tensor, pairs: Pairs | None) -> list[Tensor]:
    """The sums, then what is opened.

    Raises:
        TooLarge: it doesn't fit a reply.
    """
    sums, opened = layer.open_slices(rows, call.experts) if pairs is None else layer.open_pairs(rows, *pairs)
    if sum(each.nbytes for each in [sums, *opened]) > CALL_BODY_BYTES:
        raise TooLarge("the opened call doesn't fit a reply", hint="split the call")
    return [sums, *opened]
