"""Scenario files: what they say is taken, and what is wrong with them is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from daaswarm.errors import ConfigError
from daaswarm.sim.figures import Figures
from daaswarm.sim.scenario import SCENARIO_BYTES, load_scenario

EXAMPLE = Path(__file__).parents[2] / "examples" / "swarm.toml"


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "scenario.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_example_says_what_the_document_says() -> None:
    scenario = load_scenario(EXAMPLE)
    assert scenario.cuts and scenario.storms and scenario.surges and scenario.hostile
    document = (EXAMPLE.parents[1] / "docs" / "how-to" / "simulate-a-swarm.md").read_text("utf-8")
    for name in scenario.__struct_fields__:
        assert f"`{name}`" in document, f"docs/how-to/simulate-a-swarm.md doesn't explain {name}"


def test_flags_come_before_the_file_and_the_file_before_what_is_built_in(tmp_path: Path) -> None:
    path = write(tmp_path, "nodes = 300\nloss = 0.02\n")
    scenario = load_scenario(path, nodes=None, minutes=2.0, loss=None)
    assert (scenario.nodes, scenario.minutes, scenario.loss) == (300, 2.0, 0.02)
    assert (scenario.experts, scenario.users) == (30, 3_000), "in proportion"
    assert load_scenario(path, nodes=50, experts=7).experts == 7


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("nodes = ", "not TOML"),
        (b"\xff\xfe", "not TOML"),
        ("#" * (SCENARIO_BYTES + 1), "bytes"),
        ("nodes = 1", "nodes"),
        ("nodes = 'ten'", "nodes"),
        ("nodes = true", "nodes"),
        ("minutes = 0", "minutes"),
        ("minutes = nan", "minutes"),
        ("loss = 1.0", "loss"),
        ("loss = nan", "loss"),
        ("hostile = 2", "hostile"),
        ("lies = ['white']", "lies"),
        ("lies = []", "lies"),
        ("colour = 'red'", "colour"),
        ("[[cuts]]\nfor_s = 3", "at_s"),
        ("[[cuts]]\nat_s = 1\nfor_s = 3\nshare = 7", "share"),
        ("[[regions]]\nname = 'a'\nshare = 1.0\nrtt_ms = [1, 2]", "region a: 2 round trips for 1 regions"),
        ("[[regions]]\nname = 'a'\nshare = 0.5\nrtt_ms = [1]", "add up to 1"),
        ("nodes = 10\nexperts = 11", "11 experts on 10 honest nodes"),
    ],
)
def test_what_is_wrong_is_told_with_the_next_step(tmp_path: Path, text: str | bytes, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted) as told:
        load_scenario(write(tmp_path, text))
    assert told.value.hint


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match="can't be read"):
            load_scenario(path)


def test_a_device_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="bytes"):
        load_scenario(Path("/dev/zero"))


def test_of_nothing_nothing_is_stale() -> None:
    figures = Figures().summarise()
    assert figures["stale_answers"] == figures["stale_offers"] == 0.0 and figures["lookup_success"] == 1.0
