"""A node that people operate: real processes, experts deployed into a running node, a restart, a verdict."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.e2e.processes import run, run_json, running

pytestmark = pytest.mark.e2e


def test_deployed_experts_outlive_the_node_and_pass_verification(dense: Path, tmp_path: Path) -> None:
    home = ["--data-dir", str(tmp_path / "home")]
    environment = {"DAASWARM_CACHE": str(tmp_path / "cache")}
    options = ["--threads", "1", "--nice", "1", "--memory", "100MB", "--upload", "50MB", "--pause-when-busy", "1"]
    with running("join", *home, *options, **environment) as node:
        node.wait_for("ready")
        deployed = run_json("expert", "deploy", str(dense), "--layers", "0-1", *home, **environment)
        assert sorted(deployed["added"]) == ["0", "1"]
        assert node.stop(signal.SIGTERM) == 0
    listed = run_json("expert", "list", *home, **environment)
    assert listed["running"] is False and sorted(listed["hosted"][0]["held"]) == ["0", "1"]
    with running("join", *home, *options, **environment) as node:
        ready = node.wait_for("ready")  # what is deployed is served by then
        bootstrap = ["--bootstrap", ready["addrs"][0], "--data-dir", str(tmp_path / "other")]
        listed = run_json("expert", "list", "--available", *bootstrap, **environment)
        assert [host["peer_id"] for host in listed["hosts"]] == [ready["peer_id"]]
        verified = run_json("expert", "verify", str(dense), "--samples", "3", *bootstrap, **environment)
        assert [host["verdict"] for host in verified["hosts"]] == ["ok"]
        shown = run("expert", "list", *home, **environment)
        assert shown.returncode == 0 and dense.name in shown.stdout
        removed = run_json("expert", "remove", dense.name, *home, **environment)
        assert removed["held"] == {}
        failed = run_json("expert", "verify", str(dense), *bootstrap, code=3, **environment)
        assert failed["error"]["code"] == "no_peer"
        assert node.stop(signal.SIGINT) == 130
