"""A round that fails costs itself: what a node does again and again goes on, and says once what went wrong."""

from __future__ import annotations

import contextlib
import errno
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from daaswarm.config import Config, HostConfig
from daaswarm.core.courtesy import CpuSample, Pause
from daaswarm.errors import OutputLost, unwrap_groups
from daaswarm.node.deploying import Deploying
from daaswarm.node.life import run_node
from daaswarm.node.neighbour import SAMPLE_S, GoodNeighbour
from daaswarm.node.remembering import SAVE_S, Remembering
from daaswarm.node.rounds import Rounds
from daaswarm.node.vigil import FILES_EVERY, LOOK_S, Vigil
from daaswarm.store.data_dir import DataDir

NO_FILES = OSError(errno.EMFILE, "Too many open files")

logger = logging.getLogger("daaswarm.node.test")


def test_said_once_and_again_when_it_is_another(caplog: pytest.LogCaptureFixture) -> None:
    rounds = Rounds("counting", logger)
    for error in (NO_FILES, NO_FILES, OSError(errno.EIO, "I/O error"), None, None, NO_FILES):
        with rounds.round():
            if error is not None:
                raise error
    said = [(record.message, record.exc_info is not None) for record in caplog.records]
    failed, again = ("counting failed, and is tried again", True), ("counting works again", False)
    assert said == [failed, failed, again, failed]


async def test_being_cancelled_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with trio.move_on_after(0) as scope, Rounds("waiting", logger).round():
        await trio.sleep_forever()
    assert scope.cancelled_caught and not caplog.records


async def run_for(task: Any, seconds: float) -> None:
    with trio.move_on_after(seconds):
        await task()
        raise AssertionError("it ends by being cancelled")


async def test_a_machine_that_can_not_be_measured(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The owner's hours are kept all the same."""
    began, changes = trio.current_time(), list[Pause | None]()

    class Unmeasured(GoodNeighbour):
        async def _sample(self) -> CpuSample:
            raise NO_FILES

    neighbour = Unmeasured(
        HostConfig(pause_when_busy=0.5, quiet_hours=["00:01-00:02"]),
        changes.append,
        tell_time=lambda: (trio.current_time() - began, 1e9 + trio.current_time() - began),
    )
    await run_for(neighbour.keep_watching, 180)
    assert {change.reason for change in changes if change} == {"quiet hours until 00:02"} and changes[-1] is None
    assert caplog.text.count("measuring the machine failed") == 1


async def test_a_pause_that_can_not_be_set(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Pause | None] = []

    def refuse_once(pause: Pause | None) -> None:
        told.append(pause)
        if len(told) == 1:
            raise NO_FILES

    neighbour = GoodNeighbour(HostConfig(quiet_hours=["00:00-23:59"]), refuse_once, tell_time=lambda: (0.0, 1e9))
    await run_for(neighbour.keep_watching, 3.5 * SAMPLE_S)
    assert "deciding whether to pause failed" in caplog.text and "works again" in caplog.text
    assert len(told) == 2 and told[0] == told[1] == neighbour.pause


async def test_leaving_while_the_machine_is_measured(autojump_clock: trio.testing.MockClock) -> None:
    class Slow(GoodNeighbour):
        async def _sample(self) -> CpuSample:
            await trio.sleep(10)
            return CpuSample(trio.current_time(), 0.0, 0.0)

    neighbour = Slow(HostConfig(pause_when_busy=0.5), lambda pause: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(neighbour.keep_watching)
        await trio.sleep(5)
        neighbour.leave()
    assert neighbour.pause is not None and neighbour.pause.reason == "this node is leaving"


async def test_looks_that_fail(autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture) -> None:
    looks: list[str] = []

    async def check_files() -> None:
        looks.append("files")
        raise NO_FILES

    async def check_connections() -> None:
        looks.append("connections")
        raise NO_FILES

    vigil = Vigil(
        SimpleNamespace(check_connections=check_connections),  # type: ignore[arg-type]
        SimpleNamespace(note_jump=lambda by_s: None),  # type: ignore[arg-type]
        SimpleNamespace(check_files=check_files),  # type: ignore[arg-type]
        wall=lambda: 3600.0 * trio.current_time(),  # each look finds that the machine slept
        monotonic=trio.current_time,
    )
    await run_for(vigil.keep, LOOK_S * FILES_EVERY * 2)
    assert looks.count("files") == 2 and looks.count("connections") >= 2 * FILES_EVERY - 1
    assert caplog.text.count("the clocks failed") == 1 and caplog.text.count("the files failed") == 1


async def test_a_save_that_fails(autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture) -> None:
    saved: list[float] = []

    class Failing(Remembering):
        async def save(self) -> bool:
            saved.append(trio.current_time())
            raise ValueError("no such column")  # a bug

    nothing: Any = None
    await run_for(Failing(nothing, nothing, nothing, is_owner=True).keep_saving, 3.5 * SAVE_S)
    assert len(saved) == 3 and caplog.text.count("saving failed") == 1


@pytest.mark.parametrize("failure", [NO_FILES, OutputLost("gone", is_closed=True)], ids=["surprise", "output lost"])
async def test_what_is_deployed_can_not_be_restored(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def restore(self: Deploying, emit: object) -> None:
        raise failure

    ready = False

    async def emit(event: dict[str, Any]) -> None:
        nonlocal ready
        ready = True
        nursery.cancel_scope.cancel()

    monkeypatch.setattr(Deploying, "restore", restore)
    with contextlib.suppress(OutputLost), unwrap_groups():
        async with trio.open_nursery() as nursery:
            await run_node(DataDir(tmp_path), Config(), emit)
    assert ready == (failure is NO_FILES)
    assert ("not all that is deployed here is served" in caplog.text) == ready
