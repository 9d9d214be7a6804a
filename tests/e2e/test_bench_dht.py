"""``bench dht`` over real processes and sockets, small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from daaswarm.bench import dht
from daaswarm.types import ModelRoot


def test_a_small_swarm_keeps_what_it_was_told() -> None:
    command = [sys.executable, "-m", "daaswarm", "bench", "dht", "--peers", "5", "--keys", "6", "--kill", "0", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["before"]["store_success"] == result["before"]["get_success"] == 1.0
    assert result["killed"] == 0 and "after_old_keys" not in result


def test_nobody_offers_a_killed_peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def emit(event: dict[str, object]) -> None:
        pass

    async def run() -> dict[str, object]:
        return await dht.run_dht(peers=5, keys=8, kill=0.4, seed=2, folder=tmp_path, emit=emit)

    monkeypatch.setattr(dht, "GONE_S", 0.0)  # what answers is asked anew each time, so no waiting is needed for that
    result = trio.run(run)
    assert result["killed"] == 2
    old, after = result["after_old_keys"], result["after_60_s"]
    assert isinstance(old, dict) and old["get_success"] == 1.0
    assert isinstance(after, dict) and after["offers_of_dead_peers"] == 0 and after["find_success_of_live_hosts"] == 1.0


async def test_a_late_answer_is_not_taken_for_the_next_one(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    class Slow(dht.Peer):
        """Answers the first question after the asker gave up."""

        async def read(self) -> dict[str, object] | None:
            answer, due = answers[0]
            await trio.sleep_until(due)
            answers.pop(0)
            return answer

    class Process:
        stdin = trio.testing.MemorySendStream()

    answers: list[tuple[dict[str, object], float]] = [
        ({"stored": 1}, trio.current_time() + dht.OPERATION_S + 1),
        ({"peers": ["a"]}, trio.current_time() + dht.OPERATION_S + 2),
    ]
    peer = Slow(Process())  # type: ignore[arg-type]
    assert (await peer.ask("store", ModelRoot("0" * 64)))[0] is None
    assert (await peer.ask("get", ModelRoot("0" * 64)))[0] == {"peers": ["a"]}
