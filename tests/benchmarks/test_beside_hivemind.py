"""How figures beside hivemind's become ratios and verdicts; the runs themselves are ``make bench-hivemind``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.beside import calls, mixture
from benchmarks.beside.figures import (
    FLOOR,
    OURS,
    THEIRS,
    Figure,
    Figures,
    Spread,
    Target,
    format_figures,
    format_verdicts,
)
from benchmarks.beside.floor import measure_echo, measure_torch, write
from benchmarks.beside.mixture import METRICS
from benchmarks.beside.plot import draw
from benchmarks.beside.running import Failed, Options, run_json
from benchmarks.beside_hivemind import SCENARIOS, measure_round

OURS_P50 = Figure(OURS, "a call", "p50_ms")
THEIR_P50 = Figure(THEIRS, "a call", "p50_ms")


def make_figures() -> Figures:
    figures = Figures(("p50_ms",))
    for ours, theirs in ((1.0, 4.0), (2.0, 10.0), (9.0, 9.0)):
        figures.rounds.append({})
        figures.add(OURS, "a call", {"p50_ms": ours, "expert": "nop", "failed": False})
        figures.add(THEIRS, "a call", {"p50_ms": theirs})
    return figures


def test_ratios_are_of_one_round_and_their_median_counts() -> None:
    figures = make_figures()
    assert figures.get_spread(OURS_P50) == Spread(1, 2, 9)
    assert figures.get_spread(OURS_P50, THEIR_P50) == Spread(0.2, 0.25, 1)
    assert figures.get_all() == [OURS_P50, THEIR_P50]


def test_targets_are_judged_by_the_median() -> None:
    figures = make_figures()
    most, least, unknown = (
        Target("at most a third", OURS_P50, 1 / 3, THEIR_P50),
        Target("at least 3", OURS_P50, 3, at_least=True),
        Target("over a floor that wasn't measured", OURS_P50, 3, Figure(FLOOR, "a call", "p50_ms")),
    )
    assert [verdict.met for verdict in figures.judge((most, least, unknown))] == [True, False, None]
    text = format_verdicts(figures.judge((most, least, unknown)))
    assert [line.split()[-1] for line in text.splitlines()[2:]] == ["met", "MISSED", "–"]
    assert "<= 0.333  0.2 / 0.25 / 1" in text and ">= 3" in text


def test_a_library_that_failed_in_a_round_leaves_the_others() -> None:
    figures = make_figures()
    del figures.rounds[0][THEIR_P50]
    assert figures.get_spread(OURS_P50, THEIR_P50) == Spread(0.2, 0.6, 1)
    result = figures.to_json(())
    assert result["figures"][1]["rounds"] == [None, 10.0, 9.0]
    assert json.loads(json.dumps(result)) == result
    assert "1 / 2 / 9" in format_figures(figures)


def test_each_target_is_of_something_that_its_scenario_shows() -> None:
    for scenario in SCENARIOS.values():
        assert scenario.targets
        for target in scenario.targets:
            assert target.figure.metric in scenario.metrics


def test_a_picture_is_drawn_of_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures = make_figures()
    verdicts = figures.judge([Target("at most a third", OURS_P50, 1 / 3, THEIR_P50)])
    draw(tmp_path / "a.png", {"one": figures, "nothing measured": Figures(())}, verdicts, "a title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_floor_measures_an_echo_and_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    write("echo", 1, measure_echo(64, 0.01))
    write("ffn", 3, measure_torch(8, 3, 0.01))
    echo, ffn = map(json.loads, capsys.readouterr().out.splitlines())
    assert echo["what"] == "echo" and echo["calls_per_s"] > 0
    assert ffn["batch"] == 3 and ffn["p99_ms"] >= ffn["p50_ms"] > 0


def test_a_command_that_fails_says_so(tmp_path: Path) -> None:
    options = Options(tmp_path)
    assert run_json(options, ["-c", "print('noise'); print('{\"a\": 1}')"]) == [{"a": 1}]
    with pytest.raises(Failed, match="code 3: why"):
        run_json(options, ["-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"])


@pytest.mark.parametrize("name", ["identity", "ffn", "mixture"])
def test_what_is_measured_is_what_targets_ask_for(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    phase = dict.fromkeys(METRICS, 2.0) | {"failed": 0}
    found = {"p50_ms": 2.0, "p99_ms": 3.0, "calls_per_s": 4.0, "rows_per_s": 5.0, "healthy": phase, "after": phase}

    def theirs(options: Options, script: str, *arguments: str, handlers: int | None = None) -> list[dict[str, Any]]:
        if "--cells" not in arguments:
            return [found]
        cells = arguments[arguments.index("--cells") + 1].split(",")
        return [found | {"batch": int(c.split("x")[0]), "callers": int(c.split("x")[1])} for c in cells]

    def floor(options: Options, command: list[str]) -> list[dict[str, Any]]:
        return [found | {"what": "echo", "batch": 1}, *(found | {"what": "ffn", "batch": n} for n in (1, 128))]

    for module in (calls, mixture):
        monkeypatch.setattr(module, "run_ours", lambda options, *arguments: found)
        monkeypatch.setattr(module, "run_hivemind", theirs)
    monkeypatch.setattr(calls, "run_json", floor)
    figures = Figures(SCENARIOS[name].metrics)
    for number in range(3):
        measure_round(name, number, Options(tmp_path), figures)
    verdicts = figures.judge(SCENARIOS[name].targets)
    assert all(verdict.met is not None for verdict in verdicts), verdicts
