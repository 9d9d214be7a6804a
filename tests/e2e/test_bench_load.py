"""``bench load`` over real processes and sockets, small; and its arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

from daaswarm.bench.load import GREEDY_SHARE, LOADS, compute_fair_shares, describe, split
from daaswarm.bench.load_caller import GROWTH, Outcome, Times, merge
from tests.e2e.processes import run_json


def test_every_call_is_answered_or_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "load.png"
    small = ["--dim", "64", "--callers", "2", "--seconds", "0.2", "--deadline", "0.2"]
    done = run_json("bench", "load", *small, "--plot", str(picture))
    assert [step["load"] for step in done["steps"]] == list(LOADS)
    assert done["capacity_per_s"] > 0 and done["rss_mib"]
    for step in done["steps"]:
        assert len(step["served_by_caller"]) == 2 and step["rss_mib"] > 0
        assert set(step["errors"]) <= {"deadline_exceeded"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_fair_shares() -> None:
    assert compute_fair_shares([10, 10, 10], 15) == [5, 5, 5]
    assert compute_fair_shares([100, 1, 4], 15) == [10, 1, 4]
    assert compute_fair_shares([1, 2], 15) == [1, 2]
    assert compute_fair_shares([0, 6], 3) == [0, 3]


def test_the_first_caller_is_greedy() -> None:
    assert split(12, 1) == [12]
    assert split(12, 4) == [12 * GREEDY_SHARE, 2, 2, 2]


def test_times_are_kept_to_two_percent() -> None:
    times = Times()
    assert times.get_ms(0.5) is None
    for i in range(1, 1001):
        times.add(i / 1000)
    for share in (0.01, 0.5, 0.99, 1.0):
        got = times.get_ms(share)
        assert got is not None and 1000 * share <= got <= 1000 * share * GROWTH + 0.01
    again = merge([dict(times.counts), dict(times.counts)])
    assert again.counts.total() == 2000 and again.get_ms(0.5) == times.get_ms(0.5)


def test_a_step_says_who_was_treated_worst() -> None:
    greedy = Outcome(asked=100, served=30, busy=70, busy_s={0: 70})
    starved = Outcome(asked=50, served=10, busy=39, errors={"deadline_exceeded": 1})
    step = describe([greedy, starved], 2.0)
    assert step["least_share"] == 0.5 and step["served_per_s"] == 20 and step["asked_per_s"] == 75
    assert step["busy_p99_ms"] == 0.01 and step["answer_p50_ms"] is None
    assert step["errors"] == {"deadline_exceeded": 1}
    assert describe([Outcome(asked=1)], 1.0)["least_share"] == 1.0  # nobody got anything
