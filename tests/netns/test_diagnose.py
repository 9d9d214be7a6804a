"""``network diagnose`` where addresses of several networks, and a firewall, are real."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.e2e.processes import run_json, running
from tests.netns.world import call, make_world, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


DIAGNOSE = ("network", "diagnose", "--timeout", "1")


def enter(space: str) -> list[str]:
    return ["ip", "netns", "exec", space]


def test_an_address_that_only_another_interface_reaches(tmp_path: Path) -> None:
    with make_world() as world:
        host, address = world.add_public()
        asker, _ = world.add_public()
        for command in (
            "link add back type veth peer name front",
            "addr add 10.99.0.1/24 dev back",
            "link set back up",
            "link set front up",
        ):
            call(*enter(host), "ip", *command.split())
        options = ["--listen", "/ip4/0.0.0.0/tcp/4001", "--data-dir", str(tmp_path / "host")]
        with running("join", *options, prefix=enter(host)) as node:
            peer = node.wait_for("ready")["peer_id"]
            said = run_json(
                *DIAGNOSE, f"/ip4/10.99.0.1/tcp/4001/p2p/{peer}", "--data-dir", str(tmp_path / "asker"),
                code=1, prefix=enter(asker),
            )  # fmt: skip
            (target,) = said["targets"]
            assert target["step"] == "interface" and "this machine's networks (" in target["next"]
            said = run_json(
                *DIAGNOSE, f"/ip4/{address}/tcp/4001/p2p/{peer}", "--data-dir", str(tmp_path / "asker"),
                code=0, prefix=enter(asker),
            )  # fmt: skip
            (target,) = said["targets"]
            (data,) = [step for step in target["steps"] if step["name"] == "data"]
            assert data["verdict"] == "ok" and "10.99.0.1" in data["seen"]  # of a network that this one isn't on


def test_a_firewall_before_the_data_port(tmp_path: Path) -> None:
    with make_world() as world:
        host, address = world.add_public()
        asker, _ = world.add_public()
        rules = "table ip f { chain i { type filter hook input priority 0; tcp dport 4002 drop; }; }"
        subprocess.run([*enter(host), "nft", "-f", "-"], input=rules, text=True, check=True, timeout=20)
        announced = f"/ip4/{address}/tcp/4002"
        options = ["--listen", "/ip4/0.0.0.0/tcp/4001", "--announce", announced, "--data-dir", str(tmp_path / "host")]
        with running("join", *options, prefix=enter(host)) as node:
            node.wait_for("ready")
            said = run_json(
                *DIAGNOSE, f"/ip4/{address}/tcp/4001", "--data-dir", str(tmp_path / "asker"),
                code=1, prefix=enter(asker),
            )  # fmt: skip
            (target,) = said["targets"]
            assert target["step"] == "data" and announced in str(target["steps"])
            said = run_json(
                "network",
                "diagnose",
                "--timeout",
                "1",
                announced,
                "--data-dir",
                str(tmp_path / "asker"),
                code=1,
                prefix=enter(asker),
            )
            (target,) = said["targets"]
            assert target["step"] == "tcp" and "firewall" in target["next"]


def test_what_a_firewall_drops_of_a_peer_that_answers(tmp_path: Path) -> None:
    """One of two announced ports; then whatever is larger than a handshake's packets."""
    with make_world() as world:
        host, address = world.add_public()
        asker, _ = world.add_public()
        rules = "table ip f {{ chain i {{ type filter hook input priority 0; {}; }}; }}"

        def drop(rule: str) -> None:
            text = rules.format(rule)
            subprocess.run([*enter(host), "nft", "-f", "-"], input=text, text=True, check=True, timeout=20)

        drop("tcp dport 4002 drop")
        options = ["--listen", "/ip4/0.0.0.0/tcp/4001", "--data-dir", str(tmp_path / "host")]
        for port in (4001, 4002):
            options += ["--announce", f"/ip4/{address}/tcp/{port}"]
        ask = (
            "network",
            "diagnose",
            "--timeout",
            "1",
            f"/ip4/{address}/tcp/4001",
            "--data-dir",
            str(tmp_path / "asker"),
        )
        with running("join", *options, prefix=enter(host)) as node:
            node.wait_for("ready")
            (target,) = run_json(*ask, code=0, prefix=enter(asker))["targets"]
            assert (target["verdict"], target["step"]) == ("warning", "data")
            assert "/tcp/4002" in target["next"] and "/tcp/4001" not in target["next"]
            drop("meta length > 1200 drop")
            (target,) = run_json(*ask, code=1, prefix=enter(asker))["targets"]
            assert target["step"] == "data" and "MTU" in target["next"]
