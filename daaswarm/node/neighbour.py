"""The good neighbour: measures what the owner does, and keeps to what the owner allowed. ``core.courtesy`` decides."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from daaswarm.config import HostConfig
from daaswarm.core.courtesy import Courtesy, CpuSample, Pause, compute_others_share
from daaswarm.core.pacing import TokenBucket
from daaswarm.errors import Busy
from daaswarm.node.rounds import Rounds
from daaswarm.types import format_bytes, parse_bytes, parse_quiet_hours

SAMPLE_S = 2.0  # between two looks at the machine; one costs a few milliseconds in a thread
QUEUE_SHARE = 0.5  # of its deadline that an answer may wait for its turn to be sent
IDLE_NICE = 10  # on Windows, which knows classes: from here on the lowest
LEAVING_RETRY_S = 30.0  # a node that is restarted is back by then

logger = logging.getLogger(__name__)


class GoodNeighbour:
    """What one node gives, and when it gives nothing.

    Args:
        on_change: told whenever the pause begins, changes or ends.
        measure: processor time so far; called in a thread.
        tell_time: ``(second of the local day, Unix time)``.

    Attributes:
        pause: why nothing is computed for others now, if so.
        upload: what may be sent to others; None without a limit.
    """

    def __init__(
        self,
        config: HostConfig,
        on_change: Callable[[Pause | None], None],
        *,
        measure: Callable[[], CpuSample] | None = None,
        tell_time: Callable[[], tuple[float, float]] | None = None,
    ) -> None:
        hours = [parse_quiet_hours(text, option="host.quiet_hours") for text in config.quiet_hours]
        self.courtesy = Courtesy(hours, config.pause_when_busy)
        self.pause: Pause | None = None
        self._nice = config.nice
        self.upload = TokenBucket(parse_bytes(config.upload, option="host.upload")) if config.upload else None
        self._on_change = on_change
        self._measure = measure or measure_cpu
        self._tell_time = tell_time or tell_local_time
        self._is_leaving = False

    def step_back(self) -> None:
        """Take the priority that the owner wants this program to have."""
        if self._nice:
            set_nice(self._nice)

    def leave(self) -> None:
        """Admit no calls any more."""
        self._is_leaving = True
        self._set(Pause("this node is leaving", LEAVING_RETRY_S))

    def describe(self) -> dict[str, object] | None:
        """Why this node computes nothing for others now, for ``status``; None when it does."""
        if self.pause is None:
            return None
        return {"reason": self.pause.reason, "until": self.pause.until or None}

    async def keep_watching(self) -> None:
        """Decide now and then whether to pause, until cancelled."""
        if not self.courtesy.is_needed:
            return
        measuring, deciding = Rounds("measuring the machine", logger), Rounds("deciding whether to pause", logger)
        before: CpuSample | None = None
        share = 0.0
        while True:
            with measuring.round():  # on its own: quiet hours are kept whatever happens to it
                after = await self._sample()
                if before is not None:
                    share = compute_others_share(before, after, os.cpu_count() or 1)
                before = after
            if self._is_leaving:
                return
            with deciding.round():
                second, unix = self._tell_time()
                self._set(self.courtesy.decide(second, unix, share, trio.current_time()))
            await trio.sleep(SAMPLE_S)

    async def _sample(self) -> CpuSample:
        if self.courtesy.gate is None:
            return CpuSample(0.0, 0.0, 0.0)
        return await trio.to_thread.run_sync(self._measure, abandon_on_cancel=True)

    def _set(self, pause: Pause | None) -> None:
        before = self.pause
        if before != pause:
            self._on_change(pause)
        self.pause = pause  # only now: what failed to be told is told again in the next round
        if (before and before.reason) != (pause and pause.reason):
            logger.info("%s", f"paused: {pause.reason}" if pause is not None else "not paused any more")

    # -- what is sent -------------------------------------------------------------------------------------------

    def may_send_now(self, size: int) -> bool:
        """Whether ``size`` bytes of an answer may go without waiting."""
        return self.upload is None or self.upload.get_wait_s(size, trio.current_time()) == 0

    def note_sent(self, size: int) -> None:
        """They went at once."""
        if self.upload is not None:
            self.upload.take(size, trio.current_time())

    @asynccontextmanager
    async def uploading(self, size: int, deadline_s: float) -> AsyncIterator[None]:
        """Make an answer of ``size`` bytes in the block; it ends when that may be sent.

        Raises:
            Busy: that would be too late.
        """
        if self.upload is None:
            yield
            return
        now = trio.current_time()
        wait_s = self.upload.get_wait_s(size, now)
        if wait_s > QUEUE_SHARE * deadline_s:
            raise Busy(
                f"this host's upload limit ({format_bytes(self.upload.rate)}/s) is reached",
                hint=f"try again in {wait_s:.1f} s, or another replica",
                retry_after_s=wait_s - QUEUE_SHARE * deadline_s,
            )
        due = now + self.upload.take(size, now)
        try:
            yield
            await trio.sleep_until(due)
        except BaseException:
            self.upload.give_back(size)
            raise


def tell_local_time() -> tuple[float, float]:
    """``(second of the local day, Unix time)``."""
    now = time.time()
    local = time.localtime(now)
    return local.tm_hour * 3600 + local.tm_min * 60 + min(local.tm_sec, 59) + now % 1, now


def measure_cpu() -> CpuSample:
    """Processor time of the machine and of this process with its children. Blocks for some milliseconds."""
    import psutil

    at = time.monotonic()
    machine = psutil.cpu_times()
    busy_s = sum(
        getattr(machine, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "interrupt", "dpc")
    )
    if sys.platform == "win32":  # there system includes interrupts
        busy_s = machine.user + machine.system
    own_s = 0.0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            used = process.cpu_times()
        except psutil.Error:  # it has just ended
            continue
        own_s += used.user + used.system + getattr(used, "children_user", 0.0) + getattr(used, "children_system", 0.0)
    return CpuSample(at, busy_s, own_s)


def set_nice(nice: int) -> None:
    """Let other programs go first, as Unix counts it (1 to 19); Windows has classes. Never raises the priority."""
    import psutil

    me = psutil.Process()
    try:
        if sys.platform == "win32":
            me.nice(psutil.IDLE_PRIORITY_CLASS if nice >= IDLE_NICE else psutil.BELOW_NORMAL_PRIORITY_CLASS)
        elif me.nice() < nice:
            me.nice(nice)
    except (psutil.Error, OSError) as error:
        logger.warning("the priority can't be lowered: %s", error)
