"""Examining this node itself, peers by their PeerIds, and the short form of a failed answer."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from daaswarm.errors import ConfigError, NoPeerCouldServe
from daaswarm.messages import Contact
from tests.node.node_helpers import deploy, node
from tests.node.test_reaching import get_circuits, look
from tests.node.test_reaching import node as reaching_node

ASK: dict[str, Any] = {
    "prompt": "Hello", "max_tokens": 2, "temperature": 0.0, "top_p": 1.0, "seed": None, "system": None, "history": [],
    "stop": [], "raw": True, "dtype": None, "embedded": None, "force": True, "bootstrap": [],
}  # fmt: skip


class Told:
    """Hears what a command says."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    async def __call__(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    @property
    def texts(self) -> list[str]:
        return [event["text"] for event in self.events if event["event"] == "message"]


async def test_this_node_and_its_bootstrap_addresses(tmp_path: Path) -> None:
    told = Told()
    async with node(tmp_path / "a") as first, node(tmp_path / "b", bootstrap=first) as second:
        said = await second.control("diagnose", {"peer": None, "bootstrap": first.addrs, "timeout_s": None}, told)
        assert [step["name"] for step in said["own"]["steps"]] == ["listen", "clock", "reachable", "peers"]
        assert [event["addr"] for event in told.events if event["event"] == "target"] == ["this node", *first.addrs]
        steps = [event for event in told.events if event["event"] == "step"]
        assert len(steps) == 4 + len(said["targets"][0]["steps"])
        assert (said["verdict"], said["step"]) == ("warning", "listen")  # of this machine only


async def test_a_peer_by_its_id(tmp_path: Path) -> None:
    async with node(tmp_path / "a") as first, node(tmp_path / "b", bootstrap=first) as second:
        said = await second.control("diagnose", {"peer": first.peer_id, "bootstrap": [], "timeout_s": 1.0}, Told())
        assert said["verdict"] == "ok" and said["targets"][0]["peer_id"] == first.peer_id
        with pytest.raises(ConfigError, match="this node itself"):
            await second.control("diagnose", {"peer": second.peer_id, "bootstrap": [], "timeout_s": 1.0}, Told())


async def test_another_peer_at_its_address_does_not_count(tmp_path: Path) -> None:
    told = Told()
    async with node(tmp_path / "a") as first, node(tmp_path / "b") as second, node(tmp_path / "c") as third:
        bare = first.addrs[0].partition("/p2p/")[0]
        met = [Contact(peer_id=third.peer_id, addrs=["rubbish\x1b[2J", *first.addrs, bare])]
        said = await second.diagnosing.diagnose(third.peer_id, [], 1.0, known=met, emit=told)
        assert [target["step"] for target in said["targets"]] == ["name", "peer id", "peer id"]
        assert said["verdict"] == "failed" and [event["event"] for event in told.events].count("target") == 3
        met[0].addrs.append(third.addrs[0].partition("/p2p/")[0])
        said = await second.diagnosing.diagnose(third.peer_id, [], 1.0, known=met, emit=told)
        assert said["verdict"] == "ok" and said["targets"][-1]["peer_id"] == third.peer_id


async def test_one_address_that_works_is_enough(tmp_path: Path) -> None:
    async with node(tmp_path / "a") as first, node(tmp_path / "b") as second:
        dead = f"/ip4/127.0.0.1/tcp/{get_free_port()}"
        met = [Contact(peer_id=first.peer_id, addrs=[dead, *first.addrs])]
        said = await second.diagnosing.diagnose(first.peer_id, [], 1.0, known=met, emit=Told())
        assert [target["verdict"] for target in said["targets"]] == ["failed", "ok"]
        assert said["verdict"] == "ok"


async def test_a_failed_answer_says_which_host_fails_where(tmp_path: Path, moe: Path) -> None:
    """The swarm still points to a host that nobody can dial."""
    told = Told()
    async with node(tmp_path / "a") as first, node(tmp_path / "c", bootstrap=first) as asker:
        async with node(tmp_path / "b", bootstrap=first) as host:
            await deploy(host, moe)
            peer = host.peer_id
            host.discovery.leave = nothing  # type: ignore[method-assign]
        with pytest.raises(NoPeerCouldServe):
            await asker.control("infer", {**ASK, "model": str(moe)}, told)
    (text,) = [text for text in told.texts if "fails at" in text]
    assert text.startswith(f"host …{peer[-6:]} fails at tcp: nothing listens there")
    assert "daaswarm network diagnose /ip4/127.0.0.1/tcp/" in text


async def test_a_peer_behind_a_nat(tmp_path: Path) -> None:
    async with (
        reaching_node(tmp_path / "a") as relay,
        reaching_node(tmp_path / "b", relay, refuses=True) as hidden,
        reaching_node(tmp_path / "c", relay, refuses=True) as asker,
    ):
        await look(relay, hidden)
        (circuit,) = get_circuits(hidden)
        asker.network.circuits.is_dialable = False
        said = await asker.control("diagnose", {"peer": circuit, "bootstrap": [], "timeout_s": 1.0}, Told())
        steps = {step["name"]: step for step in said["targets"][0]["steps"]}
        assert said["verdict"] == "ok", said
        assert steps["relay"]["seen"] == "through the relay" and "through 1 relay only" in steps["data"]["seen"]
        assert steps["peer id"]["verdict"] == steps["swarm key"]["verdict"] == steps["clock"]["verdict"] == "ok"
        nobody = f"{relay.addrs[0]}/p2p-circuit/p2p/{asker.peer_id}"
        said = await relay.control("diagnose", {"peer": nobody, "bootstrap": [], "timeout_s": 1.0}, Told())
        assert (said["verdict"], said["step"]) == ("failed", "relay") and said["next"]


async def nothing() -> None:
    """A host that is killed says no goodbye."""


def get_free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
