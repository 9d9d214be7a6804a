"""A private swarm in real processes: who gets in, who doesn't and is told why, and who is put out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.processes import run, run_json, running

pytestmark = pytest.mark.e2e


def test_a_private_swarm(tmp_path: Path) -> None:
    homes = {name: str(tmp_path / name) for name in ("first", "second", "stranger")}
    made = run_json("swarm", "create", "home", "--data-dir", homes["first"])
    swarm = made["swarm_id"]
    key = run("swarm", "show", swarm, "--key", "--data-dir", homes["first"]).stdout
    assert run_json("swarm", "add", "-", "--data-dir", homes["second"], input=key)["swarm_id"] == swarm
    other = run_json("swarm", "create", "home", "--data-dir", homes["stranger"])["swarm_id"]
    with running("join", "--swarm-id", swarm, "--data-dir", homes["first"]) as first:
        ready = first.wait_for("ready")
        meet = ("--bootstrap", ready["addrs"][0])
        # Who has the key of a swarm called alike, who knows the name only, who knows the id only.
        for named, code in ((other, "another key"), ("home", "no key"), (swarm, "its key is not here")):
            home = homes["stranger"] if named == other else str(tmp_path / f"nobody-{code[0]}")
            error = run_json("join", "--swarm-id", named, *meet, "--data-dir", home, code=2)["error"]
            assert code in error["message"], error
        with running("join", "--swarm-id", swarm, *meet, "--data-dir", homes["second"]) as second:
            peer = second.wait_for("ready")["peer_id"]
            assert run_json("status", "--data-dir", homes["second"])["swarm"] == {"id": swarm, "private": True}
            allow = run_json("swarm", "allow", ready["peer_id"], "--data-dir", homes["first"])
            assert allow["running"] and allow["closed"] == [peer]
        error = run_json("join", "--swarm-id", swarm, *meet, "--data-dir", homes["second"], code=2)["error"]
        assert "allow-list" in error["message"] and peer in error["message"]
