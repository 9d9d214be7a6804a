"""When a host steps back for its owner: in quiet hours, and while other programs need the machine.

The shell measures and tells the time; what is decided here depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

DAY_MIN = 24 * 60

PAUSE_AFTER_S = 3.0  # above the limit for this long: a program that starts up is no reason to step back
RESUME_AFTER_S = 15.0  # below it for this long: who compiles has pauses between two files
RESUME_SHARE = 0.8  # of the limit; the gap keeps a load that hovers at the limit from switching back and forth
SILENT_S = 10.0  # without a measurement (a suspended laptop) what was measured before says nothing
BUSY_RETRY_S = 10.0  # hint for callers while the machine is busy: nobody knows for how long


class Pause(msgspec.Struct, frozen=True):
    """Why nothing is computed for others now.

    Attributes:
        reason: for people, without a capital letter or a full stop.
        retry_after_s: when it's worth asking again.
        until: Unix time, s; 0 when nobody knows.
    """

    reason: str
    retry_after_s: float
    until: float = 0.0


class CpuSample(msgspec.Struct, frozen=True):
    """Processor time so far, in s.

    Attributes:
        at: monotonic time, s.
        busy_s: of the whole machine, all cores together, without idling and waiting for disks.
        own_s: of this process, its children, and those of its children that have ended.
    """

    at: float
    busy_s: float
    own_s: float


def compute_others_share(before: CpuSample, after: CpuSample, cores: int) -> float:
    """The share (0 to 1) of the machine's cores that other processes used between two samples."""
    elapsed_s = (after.at - before.at) * cores
    if not elapsed_s > 0:
        return 0.0
    own_s = max(after.own_s - before.own_s, 0.0)  # a child that ended unseen takes its time with it
    return min(max((after.busy_s - before.busy_s - own_s) / elapsed_s, 0.0), 1.0)


def get_quiet_min(hours: Sequence[tuple[int, int]], minute: int) -> int:
    """For how many minutes from ``minute`` of the day on (0 to 1439) quiet hours last; 0 outside of them.

    Args:
        hours: ``(begin, end)`` in minutes of the day; one that ends before it begins spans midnight. Windows that
            meet count as one.
    """
    rest = 0
    while rest < DAY_MIN:
        now = (minute + rest) % DAY_MIN
        left = max(((end - now) % DAY_MIN for begin, end in hours if _is_within(now, begin, end)), default=0)
        if not left:
            break
        rest += left
    return min(rest, DAY_MIN)


def _is_within(minute: int, begin: int, end: int) -> bool:
    return begin <= minute < end if begin < end else minute >= begin or minute < end


class LoadGate:
    """Whether others' load is too high, with hysteresis in height and in time.

    Args:
        limit: the share (0 to 1) of all cores that other processes may use.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.is_busy = False
        self.share = 0.0  # as last measured
        self._measured_at = float("-inf")
        self._since: float | None = None  # when the load went to the other side of the limit that counts now

    def note(self, share: float, now: float) -> bool:
        """One measurement (0 to 1) at ``now`` (monotonic, s); whether the machine counts as busy after it."""
        if now - self._measured_at > SILENT_S:
            self.is_busy, self._since = False, None
        self._measured_at, self.share = now, share
        if (share <= RESUME_SHARE * self.limit) if self.is_busy else (share > self.limit):
            self._since = now if self._since is None else self._since
            if now - self._since >= (RESUME_AFTER_S if self.is_busy else PAUSE_AFTER_S):
                self.is_busy, self._since = not self.is_busy, None
        else:
            self._since = None
        return self.is_busy


class Courtesy:
    """One host's decision whether to step back.

    Args:
        quiet_hours: see :func:`get_quiet_min`.
        busy_limit: see :class:`LoadGate`; 0 for never.
    """

    def __init__(self, quiet_hours: Sequence[tuple[int, int]] = (), busy_limit: float = 0.0) -> None:
        self._hours = list(quiet_hours)
        self.gate = LoadGate(busy_limit) if busy_limit else None

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to decide, ever."""
        return bool(self._hours) or self.gate is not None

    def decide(self, second_of_day: float, unix: float, share: float, now: float) -> Pause | None:
        """Whether to compute for others.

        Args:
            second_of_day: local time, 0 to 86,400.
            unix: the same moment as Unix time, s.
            share: of all cores, used by other processes since the last call (0 to 1).
            now: monotonic, s.
        """
        busy = self.gate is not None and self.gate.note(share, now)
        quiet_min = get_quiet_min(self._hours, int(second_of_day // 60) % DAY_MIN)
        if quiet_min:
            left_s = max(quiet_min * 60 - second_of_day % 60, 1.0)
            end = round((second_of_day + left_s) / 60) % DAY_MIN
            return Pause(f"quiet hours until {end // 60:02}:{end % 60:02}", left_s, unix + left_s)
        if busy and self.gate is not None:
            text = f"other programs use more than {self.gate.limit:.0%} of this machine's cores"
            return Pause(text, BUSY_RETRY_S)
        return None
