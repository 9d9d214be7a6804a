"""What the soak run counts as a problem; the run itself is ``make soak``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from benchmarks.soak import LEAKS, Expected, Run, Tally, find_leaks, get_medians, judge, report
from benchmarks.swarm import Log, Node, Sample, ask

EXPECTED = Expected("Paris is the capital.", 6)
RIGHT = {"text": EXPECTED.text, "completion_tokens": 6, "retries": 2}
SAMPLE = Sample(100_000_000, 20, 7, 50)


@pytest.mark.parametrize(
    ("code", "result", "what"),
    [
        (0, RIGHT, "right"),
        (0, RIGHT | {"text": "Paris is the Capital."}, "wrong"),
        (0, RIGHT | {"completion_tokens": 5}, "wrong"),
        (0, {}, "wrong"),
        (3, {"error": {"code": "no_peer", "message": "layers 0-14"}, "text": "Paris is"}, "refused"),
        (3, {"error": {"code": "no_peer", "message": "layers 0-14"}, "text": "Lyon"}, "wrong"),
        (1, {"error": {"code": "error", "message": "?"}}, "broken"),
        (1, {"error": {"code": "connection_lost", "message": "internal error; the log has the details"}}, "broken"),
        (1, {}, "broken"),
        (-1, {}, "broken"),
    ],
)
def test_each_answer_is_judged(code: int, result: dict[str, Any], what: str) -> None:
    tally = Tally(1)
    judge(tally, 0, 3, code, result, EXPECTED, 1.0)
    assert (tally.right[0], bool(tally.wrong), bool(tally.broken)) == (
        what == "right",
        what == "wrong",
        what == "broken",
    )
    assert bool(tally.refused) == (code != 0)


def test_growth_from_the_middle_to_the_end_is_a_leak() -> None:
    steady = [(at / 10, SAMPLE) for at in range(11)]
    assert find_leaks("join", get_medians(steady)) == []
    for what, (share, amount) in LEAKS.items():
        grown = SAMPLE._replace(**{what: int(getattr(SAMPLE, what) * (1 + share) + amount + 2)})
        samples = [(at, grown if at > 0.7 else sample) for at, sample in steady]
        [leak] = find_leaks("join", get_medians(samples))
        assert what in leak
    assert get_medians(steady[:3]) == {}


def test_log_lines_above_warning_and_strays_are_unexpected() -> None:
    log = Log("host")
    for line in [
        "2026-05-01T12:00:00.123Z WARNING daaswarm.net: so what\n",
        "    a line of that record\n",
        "2026-05-01T12:00:00.123Z INFO daaswarm.net: well\n",
    ]:
        log.add(line)
    assert (log.warnings, log.unexpected) == (1, [])
    log.add("2026-05-01T12:00:00.123Z ERROR daaswarm.net: oh\n")
    log.add("    KeyError: 'x'\n")
    assert len(log.unexpected) == 2
    stray = Log("infer")
    stray.add("Traceback (most recent call last):\n")
    assert len(stray.unexpected) == 1


def test_a_node_that_ends_by_itself_is_a_problem(tmp_path: Path) -> None:
    node = Node("join", tmp_path, "no-such-command")
    node.start()
    with pytest.raises(RuntimeError, match="ended before it was ready"):
        node.wait_ready()
    node.stop()
    run = Run(0, 1.0, 20.0, False, Event(), Tally(1), Log("infer"))
    problems = report(run, [node], {"join": []}, Counter(), [])["problems"]
    assert any("ended by itself with code 2" in problem for problem in problems)
    assert any("too few samples" in problem for problem in problems)
    assert any("got no answer" in problem for problem in problems)


def test_a_command_that_hangs_is_ended() -> None:
    done = ask("status", timeout_s=0.001)
    assert (done.code, done.result) == (-1, {})
