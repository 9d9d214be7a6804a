"""Notices that the wall clock was set, or that the machine slept, by comparing two clocks."""

from __future__ import annotations

import msgspec

JUMP_S = 5.0  # a difference of the clocks since the last look; slewing (NTP) makes milliseconds
GAP_S = 15.0  # between two looks that should be a few seconds apart; a busy machine delays by less


class ClockJump(msgspec.Struct, frozen=True):
    """The wall clock moved by ``by_s`` more than time passed. A suspended machine looks so too where its monotonic
    clock stands still meanwhile (Linux, macOS)."""

    by_s: float


class Gap(msgspec.Struct, frozen=True):
    """Nothing ran here for ``seconds``: others may have given this node up, and its connections may be dead."""

    seconds: float


class ClockWatch:
    """Call :meth:`look` every few seconds."""

    def __init__(self) -> None:
        self._wall = 0.0
        self._monotonic: float | None = None

    def look(self, wall: float, monotonic: float) -> list[ClockJump | Gap]:
        """What happened since the last look (nothing, at the first).

        Args:
            wall: Unix time, s.
            monotonic: s.
        """
        if self._monotonic is None:
            self._wall, self._monotonic = wall, monotonic
            return []
        passed, moved = monotonic - self._monotonic, wall - self._wall
        self._wall, self._monotonic = wall, monotonic
        found: list[ClockJump | Gap] = []
        if abs(moved - passed) > JUMP_S:
            found.append(ClockJump(moved - passed))
        if max(passed, moved) > GAP_S:  # a clock set forward looks the same: then the check of connections costs a ping
            found.append(Gap(max(passed, moved)))
        return found
