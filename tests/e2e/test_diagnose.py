"""``network diagnose`` against real processes and sockets, each broken in its own way."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nacl.signing import SigningKey

from daaswarm.core.signing import get_peer_id
from tests.e2e.processes import get_environment, run, run_json, running

OTHER = get_peer_id(bytes(SigningKey(b"o" * 32).verify_key))
START_S = 60
# A whole node, of which one thing is otherwise: its clock, or its protocol's version.
BROKEN = {
    "clock": "import time; real = time.time; time.time = lambda: real() + 600",
    "version": "import daaswarm.net.handshake as h; real = h.Hello; h.Hello = lambda **k: real(version=0, **k)",
}


@contextlib.contextmanager
def broken_node(how: str, folder: Path) -> Iterator[str]:
    code = f"import sys; {BROKEN[how]}; from daaswarm.__main__ import main; sys.argv[0] = 'daaswarm'; main()"
    command = [sys.executable, "-c", code, "join", "--data-dir", str(folder)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=get_environment()
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"/ip4/\S+", line):
                yield found.group()
                break
        else:
            raise AssertionError("it did not start")
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running("join", "--data-dir", str(tmp_path_factory.mktemp("healthy"))) as node:
        yield node.wait_for("ready")["addrs"][0]


def diagnose(folder: Path, *arguments: str, code: int = 1, **extra: str) -> dict[str, Any]:
    """The only target, with its steps by name."""
    said = run_json("network", "diagnose", "--timeout", "2", *arguments, "--data-dir", str(folder), code=code, **extra)
    (target,) = said["targets"]
    names = [step["name"] for step in target["steps"]]
    assert len(names) == len(set(names)) == 13
    assert (said["verdict"], said["next"]) == (target["verdict"], target["next"])
    return {**target, "steps": {step["name"]: step for step in target["steps"]}}


def get_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_a_healthy_peer(healthy: str, tmp_path: Path) -> None:
    target = diagnose(tmp_path, healthy, code=0)
    assert target["verdict"] == "ok" and target["peer_id"] in healthy
    assert {step["verdict"] for name, step in target["steps"].items() if name != "relay"} == {"ok"}
    assert target["steps"]["relay"]["verdict"] == "skipped"


def test_nothing_listens(tmp_path: Path) -> None:
    target = diagnose(tmp_path, f"/ip4/127.0.0.1/tcp/{get_port()}")
    assert (target["verdict"], target["step"]) == ("failed", "tcp")
    assert "nothing listens there" in target["next"] and "127.0.0.1 is the machine that asks" in target["next"]
    assert target["steps"]["tls"]["verdict"] == target["steps"]["relay"]["verdict"] == "skipped"


def test_a_silent_listener(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = diagnose(tmp_path, f"/ip4/127.0.0.1/tcp/{listener.getsockname()[1]}")
    assert target["step"] == "tls" and "says nothing" in target["next"]
    assert target["steps"]["tcp"]["verdict"] == "ok"


def test_another_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port := get_port())]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                break
        target = diagnose(tmp_path, f"/ip4/127.0.0.1/tcp/{port}")
    finally:
        server.kill()
        server.wait()
    assert target["step"] == "tls" and "another program has this port" in target["next"]


def test_a_wrong_peer_id(healthy: str, tmp_path: Path) -> None:
    target = diagnose(tmp_path, f"{healthy.partition('/p2p/')[0]}/p2p/{OTHER}")
    assert target["step"] == "peer id" and "ask for its current address" in target["next"]
    assert target["steps"]["tls"]["verdict"] == "ok"


def test_another_swarm(healthy: str, tmp_path: Path) -> None:
    target = diagnose(tmp_path, healthy, DAASWARM_NETWORK_SWARM="another")
    assert target["step"] == "swarm" and "daaswarm swarm show" in target["next"]


def test_a_wrong_swarm_key(tmp_path: Path) -> None:
    theirs, ours = (
        run_json("swarm", "create", "home", "--data-dir", str(tmp_path / who))["swarm_id"] for who in ("node", "asker")
    )
    with running("join", "--swarm-id", theirs, "--data-dir", str(tmp_path / "node")) as node:
        addr = node.wait_for("ready")["addrs"][0]
        target = diagnose(tmp_path / "asker", addr, "--swarm-id", ours)
    assert target["step"] == "swarm key" and "one key on both nodes" in target["next"]
    assert target["steps"]["peer id"]["verdict"] == target["steps"]["swarm"]["verdict"] == "ok"


def test_a_clock_ten_minutes_off(tmp_path: Path) -> None:
    with broken_node("clock", tmp_path / "node") as addr:
        target = diagnose(tmp_path, addr)
    assert target["step"] == "clock" and "set the clock" in target["next"]
    assert re.search(r"(599|600|601)\.\d s ahead", target["steps"]["clock"]["seen"])


def test_an_older_protocol(tmp_path: Path) -> None:
    with broken_node("version", tmp_path / "node") as addr:
        target = diagnose(tmp_path, addr)
    assert target["step"] == "version" and "update the older" in target["next"]
    assert "version 0" in target["steps"]["version"]["seen"] and "the peer's daaswarm" in target["next"]


def test_a_blocked_data_port(tmp_path: Path) -> None:
    announced = f"/ip4/127.0.0.1/tcp/{get_port()}"
    with running(
        "join",
        "--announce",
        announced,
        "--data-dir",
        str(tmp_path / "node"),
        "--listen",
        f"/ip4/127.0.0.1/tcp/{(port := get_port())}",
    ) as node:
        node.wait_for("ready")
        target = diagnose(tmp_path, f"/ip4/127.0.0.1/tcp/{port}")
    assert target["step"] == "data" and "--announce" in target["next"]
    assert announced in target["steps"]["data"]["seen"] and target["steps"]["advert"]["verdict"] == "warning"


def test_a_failed_join_says_at_which_step(tmp_path: Path) -> None:
    done = run("join", "--bootstrap", f"/ip4/127.0.0.1/tcp/{get_port()}/p2p/{OTHER}", "--data-dir", str(tmp_path))
    assert done.returncode == 2
    assert "it fails at tcp: nothing listens there" in done.stderr and "daaswarm network diagnose /ip4/" in done.stderr


def test_a_running_node_examines_itself_and_others_by_peer_id(healthy: str, tmp_path: Path) -> None:
    with running("join", "--bootstrap", healthy, "--data-dir", str(tmp_path)) as node:
        node.wait_for("ready")
        said = run_json("network", "diagnose", "--data-dir", str(tmp_path))
        own = {step["name"]: step["verdict"] for step in said["own"]["steps"]}
        assert own == {"listen": "warning", "clock": "ok", "reachable": "skipped", "peers": "ok"}
        assert [target["verdict"] for target in said["targets"]] == ["ok"]  # the one it was started with
        assert said["verdict"] == "warning" and "--listen" in said["next"]
        peer = healthy.rpartition("/")[2]
        target = diagnose(tmp_path, peer, code=0)
        assert target["peer_id"] == peer
        done = run("network", "diagnose", "--data-dir", str(tmp_path))
        assert "reachable" in done.stdout and "1 known" in done.stdout and "nothing fails" in done.stderr
        assert run("network", "diagnose", OTHER, "--data-dir", str(tmp_path)).returncode == 2
        assert node.stop() == 0
    assert diagnose(tmp_path, peer, code=0)["peer_id"] == peer  # an earlier run met it


def test_without_a_node_its_settings_are_examined(tmp_path: Path) -> None:
    said = run_json("network", "diagnose", "--data-dir", str(tmp_path), DAASWARM_NETWORK_LISTEN="/ip4/0.0.0.0/tcp/4001")
    assert [step["name"] for step in said["own"]["steps"]] == ["listen", "clock"]
    assert "no node runs here" in said["own"]["steps"][0]["seen"] and "tcp/4001" in said["own"]["steps"][0]["seen"]
    assert said["targets"] == [] and said["verdict"] == "ok"


def test_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        running(
            "network", "diagnose", f"/ip4/127.0.0.1/tcp/{listener.getsockname()[1]}", "--data-dir", str(tmp_path)
        ) as asking,
    ):
        while asking.wait_for("step")["name"] != "tcp":  # told while TLS is waited for
            pass
        assert asking.stop(signal.SIGINT, timeout=2) == 130
