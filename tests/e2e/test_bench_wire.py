"""``bench generate`` and ``bench net`` over real processes and sockets, small."""

from __future__ import annotations

from pathlib import Path

import pytest

from daaswarm.models.sources import find_model
from tests.e2e.processes import run, run_json

pytestmark = pytest.mark.e2e


def test_generate(moe: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAASWARM_CACHE", str(cache))
    find_model(str(moe), cache)
    options = ("--hosts", "1", "--answers", "2", "--tokens", "4", "--verify", "every")
    done = run_json("bench", "generate", "--model", str(moe), *options)
    assert (done["answers"], done["tokens"], done["hosts"]) == (2, 4, 1)
    for name in ("tokens_per_s", "first_token_s", "together_tokens_per_s", "together_first_token_s", "together_ratio"):
        assert 0 < done[name]["min"] <= done[name]["median"] <= done[name]["max"]
    assert done["call_p50_ms"] > 0 and done["verify"]["mode"] == "every" and done["verify"]["unchecked"] > 0


def test_net() -> None:
    done = run_json("bench", "net", "--seconds", "0.2", "--body", "100kB")
    assert done["body_bytes"] == 98_304  # whole rows
    for name in ("connect_p50_ms", "ping_p50_ms", "echo_p50_ms", "tcp_echo_p50_ms", "transfer_mb_per_s"):
        assert done[name] > 0
    assert done["ping_p50_ms"] <= done["ping_p99_ms"] and done["echo_over_tcp"] > 0


@pytest.mark.parametrize("body", ["0", "9GB", "many"])
def test_a_body_that_no_call_takes(body: str) -> None:
    done = run("bench", "net", "--body", body)
    assert done.returncode == 2 and "--body" in done.stderr
