"""``bench byzantine`` over real sockets, small: no wrong row where all is checked, and nobody honest accused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.processes import run_json

pytestmark = pytest.mark.e2e

SMALL = ("--hosts", "8", "--fraction", "0.25", "--requests", "120", "--dim", "48", "--width", "64")


def measure(strategy: str, verify: str) -> dict[str, Any]:
    return run_json("bench", "byzantine", *SMALL, "--strategy", strategy, "--verify", verify)


@pytest.mark.parametrize("strategy", ["independent", "colluding", "quantised"])
def test_where_all_is_checked(strategy: str) -> None:
    done = measure(strategy, "every")
    assert (done["rows"], done["wrong_delivered"], done["failed"]) == (120, 0, 0)
    assert (done["liars"], done["banned"], done["false_accusations"]) == (2, 2, 0)
    assert done["median_calls_to_ban"] == 1 and done["wrong_rate_upper_95"] == pytest.approx(3 / 120)
    assert done["none"]["wrong_delivered"] > 0  # so there was something to catch
    for name in ("compute_ratio", "wall_ratio", "bytes_ratio"):
        assert done[name] > 0


def test_liars_that_evade_the_check_and_a_vote_that_colluders_win() -> None:
    done = measure("evasive", "twin=1")
    assert (done["wrong_delivered"], done["false_accusations"]) == (0, 0) or done["banned"] == 2
    assert measure("colluding", "sample")["majority_of_three"]["wrong_delivered"] > 0


def test_slow_hosts_are_not_accused() -> None:
    done = measure("slow", "every")
    assert (done["liars"], done["false_accusations"], done["wrong_delivered"]) == (0, 0, 0)
