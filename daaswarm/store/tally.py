"""Counts expert calls in memory between two writes of the database."""

from __future__ import annotations

from collections.abc import Iterable

from daaswarm.store.records import SECONDS_PER_HOUR, CallSummary, Direction

TALLY_ROWS = 4_096  # peers x models x directions of one interval between writes; the others share one row

Key = tuple[int, Direction, str, str]


class CallTally:
    """Sums per hour, direction, peer and model, which :meth:`take` hands over.

    :meth:`note` is called for every call, also those computed where they arrive: it must cost microseconds.
    """

    def __init__(self, *, limit: int = TALLY_ROWS) -> None:
        self._limit = limit
        self._sums: dict[Key, list[int]] = {}

    def __len__(self) -> int:
        return len(self._sums)

    def note(
        self,
        direction: Direction,
        peer_id: str,
        model_root: str,
        now: float,
        *,
        calls: int = 0,
        rows: int = 0,
        bytes_in: int = 0,
        bytes_out: int = 0,
        failures: int = 0,
    ) -> None:
        """Add to the sums of the hour of ``now`` (Unix time, s)."""
        hour = int(now // SECONDS_PER_HOUR)
        sums = self._sums.get((hour, direction, peer_id, model_root))
        if sums is None:
            if len(self._sums) >= self._limit:
                peer_id, model_root = "", ""
            sums = self._sums.setdefault((hour, direction, peer_id, model_root), [0, 0, 0, 0, 0])
        sums[0] += calls
        sums[1] += rows
        sums[2] += bytes_in
        sums[3] += bytes_out
        sums[4] += failures

    def take(self) -> list[CallSummary]:
        """All sums, which are then forgotten here."""
        taken, self._sums = self._sums, {}
        return [
            CallSummary(
                hour=hour,
                direction=direction,
                peer_id=peer_id,
                model_root=model_root,
                calls=sums[0],
                rows=sums[1],
                bytes_in=sums[2],
                bytes_out=sums[3],
                failures=sums[4],
            )
            for (hour, direction, peer_id, model_root), sums in taken.items()
        ]

    def give_back(self, summaries: Iterable[CallSummary]) -> None:
        """Sums that could not be written: they wait for the next time."""
        for s in summaries:
            self.note(
                s.direction,
                s.peer_id,
                s.model_root,
                s.hour * SECONDS_PER_HOUR,
                calls=s.calls,
                rows=s.rows,
                bytes_in=s.bytes_in,
                bytes_out=s.bytes_out,
                failures=s.failures,
            )
