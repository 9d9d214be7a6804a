"""Calls that a busy peer would refuse aren't sent: refusing costs the peer as much as reading them."""

from __future__ import annotations

from typing import NamedTuple

from daaswarm.errors import Busy
from daaswarm.messages import Failure, Request

HOLD_S = 0.25  # at most: what the peer said may be long out of date, as when its owner ended a pause


class _Hold(NamedTuple):
    until: float
    nbytes: int
    deadline_s: float
    said: str


class Holding:
    """What one peer refused a moment ago. Until the time that it gave as a hint, calls of the kind that are as large or
    larger, and can't wait longer, are refused here. Calls without a body are cheap to refuse, and sent. Time is passed
    in, in seconds.
    """

    def __init__(self) -> None:
        self._holds: dict[type[Request], _Hold] = {}

    def check(self, kind: type[Request], nbytes: int, deadline_s: float, now: float) -> None:
        """Raises:
        Busy: the peer would refuse this call.
        """
        if self._holds and (hold := self._holds.get(kind)) is not None:
            if now >= hold.until:
                del self._holds[kind]
            elif nbytes >= hold.nbytes and deadline_s <= hold.deadline_s:
                raise Busy(f"not sent, since a moment ago: {hold.said}", retry_after_s=hold.until - now)

    def note(self, kind: type[Request], nbytes: int, deadline_s: float, failure: Failure, now: float) -> None:
        """The peer answered such a call so."""
        if failure.code == Busy.code and failure.retry_after_s > 0 and nbytes:
            until = now + min(failure.retry_after_s, HOLD_S)
            self._holds[kind] = _Hold(until, nbytes, deadline_s, failure.message)
