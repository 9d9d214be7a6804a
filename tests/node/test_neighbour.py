"""The good neighbour: what the owner does has the first word."""

from __future__ import annotations

import os
import time

import pytest
import trio

from daaswarm.config import HostConfig
from daaswarm.core.courtesy import CpuSample, Pause
from daaswarm.errors import Busy, ConfigError
from daaswarm.node.neighbour import SAMPLE_S, GoodNeighbour, measure_cpu


async def test_a_busy_machine_and_quiet_hours(autojump_clock: trio.testing.MockClock) -> None:
    load = [0.0]
    changes: list[Pause | None] = []
    began = trio.current_time()
    busy_s = 0.0

    class Measured(GoodNeighbour):
        """Without the thread: virtual time would run on while it works."""

        async def _sample(self) -> CpuSample:
            nonlocal busy_s
            busy_s += load[0] * SAMPLE_S * (os.cpu_count() or 1)
            return CpuSample(trio.current_time(), busy_s, 0.0)

    neighbour = Measured(
        HostConfig(pause_when_busy=0.5, quiet_hours=["08:00-18:00"]),
        changes.append,
        tell_time=lambda: (trio.current_time() - began, 1e9 + trio.current_time() - began),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(neighbour.keep_watching)
        await trio.sleep(60)
        assert neighbour.describe() is None and changes == []
        load[0] = 0.9
        await trio.sleep(30)
        assert neighbour.describe() == {
            "reason": "other programs use more than 50% of this machine's cores",
            "until": None,
        }
        load[0] = 0.1
        await trio.sleep(30)
        assert neighbour.pause is None
        await trio.sleep(8 * 3600)
        assert neighbour.pause is not None and neighbour.pause.reason == "quiet hours until 18:00"
        neighbour.leave()
        assert neighbour.pause.reason == "this node is leaving"


async def test_answers_wait_for_the_upload_limit(autojump_clock: trio.testing.MockClock) -> None:
    neighbour = GoodNeighbour(HostConfig(upload="1kB"), lambda pause: None)
    began = trio.current_time()
    assert neighbour.may_send_now(1000)
    for _ in range(3):
        async with neighbour.uploading(1000, 30.0):
            pass
    assert trio.current_time() - began == pytest.approx(2.0)  # a second's worth goes at once
    assert not neighbour.may_send_now(1)
    with pytest.raises(Busy, match=r"upload limit \(1.0 kB/s\)") as info:
        async with neighbour.uploading(5000, 4.0):
            raise AssertionError("refused before it is computed")
    assert info.value.retry_after_s == pytest.approx(3.0)
    with pytest.raises(ConfigError):
        async with neighbour.uploading(1000, 30.0):
            raise ConfigError("failed")
    await trio.sleep(1)
    assert neighbour.may_send_now(1000)  # what failed was not sent


def test_processor_time_is_measured() -> None:
    before = measure_cpu()
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    after = measure_cpu()
    assert after.at > before.at and after.own_s >= before.own_s + 0.03 and after.busy_s >= before.busy_s
