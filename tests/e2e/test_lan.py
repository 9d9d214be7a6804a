"""Two nodes on one local network that were told nothing of each other."""

from __future__ import annotations

import socket
import time
import uuid
from pathlib import Path

import pytest

from tests.e2e.processes import Running, run_json, running

FIND_S = 30


def get_peers(node: Path) -> list[str]:
    return run_json("status", "--data-dir", str(node))["known_peers"]


def can_multicast() -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("224.0.0.251", 5353))
            sock.setsockopt(
                socket.IPPROTO_IP,
                socket.IP_ADD_MEMBERSHIP,
                socket.inet_aton("224.0.0.251") + socket.inet_aton(sock.getsockname()[0]),
            )
        except OSError:
            return False
        return not sock.getsockname()[0].startswith("127.")


@pytest.mark.skipif(not can_multicast(), reason="no network interface takes multicast here")
def test_nodes_find_each_other_and_leave_in_time(tmp_path: Path) -> None:
    name = f"test-{uuid.uuid4()}"  # whoever else runs daaswarm on this network is left alone

    def start(folder: str, *options: str) -> Running:
        data_dir = str(tmp_path / folder)
        return Running(
            "join", "--listen", "/ip4/0.0.0.0/tcp/0", "--data-dir", data_dir, *options, DAASWARM_NETWORK_SWARM=name
        )

    nodes = [start("a"), start("b"), start("silent", "--no-lan")]
    try:
        ids = [node.wait_for("ready")["peer_id"] for node in nodes]
        deadline = time.monotonic() + FIND_S
        while get_peers(tmp_path / "a") != [ids[1]] or get_peers(tmp_path / "b") != [ids[0]]:
            assert time.monotonic() < deadline, "they have not met"
            time.sleep(0.3)
        assert get_peers(tmp_path / "silent") == []
    finally:
        codes = [node.stop() for node in nodes]
    assert codes == [0, 0, 0]


def test_a_node_on_loopback_says_nothing(tmp_path: Path) -> None:
    with running("join", "--data-dir", str(tmp_path)) as node:
        node.wait_for("ready")
        node.stop()  # the log is written in a thread
    assert "local network" not in (tmp_path / "logs" / "node.log").read_text()
