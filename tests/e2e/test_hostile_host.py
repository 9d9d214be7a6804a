"""A running host, with libp2p beside it, and a thousand strangers."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from daaswarm.core.signing import get_swarm_id
from daaswarm.net.handshake import Identity
from daaswarm.testing.attacker import KINDS, Attacker
from tests.e2e.processes import running

pytestmark = pytest.mark.e2e

ROUNDS = 1000 // KINDS + 1
GROWTH_BYTES = 20_000_000


def test_a_running_node_survives_a_thousand_strangers(tmp_path: Path) -> None:
    with running("join", "--data-dir", str(tmp_path)) as node:
        ready = node.wait_for("ready")
        port = int(ready["addrs"][0].split("/")[4])
        attacker = Attacker(Identity.from_seed(bytes(range(32)), get_swarm_id("main")), port, ready["peer_id"])
        attacker.attack(2)
        process = psutil.Process(node.process.pid)
        before, files = process.memory_info().rss, process.num_fds()
        attacker.attack(ROUNDS)
        assert process.memory_info().rss - before < GROWTH_BYTES
        assert process.num_fds() < files + 64  # none leaks for good; the last may still be closing
        assert b"welcome" in attacker.send_tls(None, {})  # an honest handshake is still answered
        assert node.stop() == 0
        assert "Traceback" not in "".join(node.errors)
