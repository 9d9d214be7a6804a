"""A share that one host was asked for, and others too once that took long: whoever has all of it first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic

import torch

from daaswarm.errors import DaaswarmError
from daaswarm.inference.shares import Share
from daaswarm.messages import ExpertCall, ExpertReply
from daaswarm.net.pending import PendingCall
from daaswarm.net.racing import look, wait_any
from daaswarm.types import PeerId

HEDGE_PAUSE_S = 0.01  # before looking again for somebody to hedge with, then twice as long each time

Part = tuple["torch.Tensor | None", torch.Tensor]
"""Sums, and the rows of the layer that they are for; ``None``: all, in order."""


@dataclass
class Computed:
    """A call that was answered here: a ``PendingCall`` with nothing to wait for."""

    reply: ExpertReply
    body: memoryview
    latency_s: float

    def wait(self) -> tuple[ExpertReply, memoryview]:
        return self.reply, self.body


@dataclass
class Sent:
    """A share, who was asked for it, and what came of asking."""

    peer: PeerId
    share: Share
    call: PendingCall | Computed | DaaswarmError
    sent_bytes: int
    request: ExpertCall
    codec: str = ""  # that the sums may come in
    has_coded_rows: bool = False

    def is_over(self, now: float) -> bool:
        """There is an answer or an error, or will be none in time: waiting for it doesn't block."""
        return not isinstance(self.call, PendingCall) or self.call.is_done() or now >= self.call.due

    def cancel(self) -> None:
        if isinstance(self.call, PendingCall):
            self.call.cancel()


@dataclass
class Race:
    """Attributes:

    first: ``None`` once it failed.
    others: do the same share between them.
    asked: all who ever were.
    hedge_at: when others, or yet others, shall be asked (monotonic, s).
    pause_s: until that is tried again if nobody could be.
    parts: the others' results so far; of whoever won, at the end.
    is_over: ``parts`` is the result, or ``error`` says why there is none.
    """

    share: Share
    first: Sent | None
    hedge_at: float = math.inf
    pause_s: float = HEDGE_PAUSE_S
    others: list[Sent] = field(default_factory=list)
    waiting: list[Sent] = field(default_factory=list)  # of the others
    asked: set[PeerId] = field(default_factory=set)
    parts: list[Part] = field(default_factory=list)
    is_over: bool = False
    has_failed: bool = False

    def get_calls(self) -> list[PendingCall]:
        """That it waits for."""
        sent = [self.first, *self.waiting] if self.first is not None else self.waiting
        return [item.call for item in sent if isinstance(item.call, PendingCall)]


def wait_for_races(races: Sequence[Race]) -> None:
    """Block this thread until something may have happened: an answer, a deadline, or the time for a hedge.

    Without a hedge under way, the calls are waited for one after the other: that wakes this thread least often.
    """
    calls = [call for race in races for call in race.get_calls()]
    hedge_at = min(race.hedge_at for race in races)
    until = min(hedge_at, *(call.due for call in calls))
    if any(race.waiting for race in races):
        wait_any(calls, until)
    else:
        calls[0].wait_until(until)
    if monotonic() >= hedge_at:
        look(calls)
