"""A small internet in network namespaces: a public network, and houses behind NATs that let nothing in.

Needs root, ``ip`` and ``nft``. Everything is removed at the end of the ``with`` block, whatever happens in it.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

COMMAND_S = 20
PUBLIC = "203.0.113"  # TEST-NET-3 (RFC 5737)

# What a home router does: its house shares its one address, and nobody gets in who wasn't asked.
NAT = """
table ip nat {
    chain postrouting {
        type nat hook postrouting priority 100;
        oifname "wan" masquerade
    }
}
table ip filter {
    chain forward {
        type filter hook forward priority 0; policy drop;
        ct state established,related accept
        iifname "lan" accept
    }
    chain input {
        type filter hook input priority 0; policy drop;
        ct state established,related accept
    }
}
"""

_numbers = itertools.count()


def call(*command: str, input: str | None = None) -> None:
    done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=COMMAND_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


@functools.cache
def why_not() -> str:
    """Why there can be no such world here; empty if there can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "nft"):
        if shutil.which(tool) is None:
            return f"there is no {tool} here"
    try:
        with make_world() as world:
            world.add_house()
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        return f"network namespaces don't work here: {error}"
    return ""


class World:
    """``names``: its namespaces."""

    def __init__(self) -> None:
        self._prefix = f"ds{os.getpid()}x{next(_numbers)}"
        self.names: list[str] = []
        self._hosts = 0
        self._houses = 0

    def open(self) -> None:
        self.street = self._add("street")
        self._ip(self.street, "link", "add", "br0", "type", "bridge")
        self._ip(self.street, "addr", "add", f"{PUBLIC}.1/24", "dev", "br0")
        self._ip(self.street, "link", "set", "br0", "up")

    def add_public(self) -> tuple[str, str]:
        """A machine that everybody can dial: its namespace and address."""
        name = self._add(f"p{self._hosts + 1}")
        return name, self._plug(name, "eth0")

    def add_house(self) -> tuple[str, str]:
        """A machine behind a NAT: its namespace, and the NAT's public address."""
        self._houses += 1
        router, inside = self._add(f"r{self._houses}"), self._add(f"h{self._houses}")
        address = self._plug(router, "wan")
        self._ip(router, "link", "add", "lan", "type", "veth", "peer", "name", "eth0", "netns", inside)
        self._ip(router, "addr", "add", f"10.9.{self._houses}.1/24", "dev", "lan")
        self._ip(inside, "addr", "add", f"10.9.{self._houses}.2/24", "dev", "eth0")
        self._ip(router, "link", "set", "lan", "up")
        self._ip(inside, "link", "set", "eth0", "up")
        self._ip(inside, "route", "add", "default", "via", f"10.9.{self._houses}.1")
        call(*inside_of(router), "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        call(*inside_of(router), "nft", "-f", "-", input=NAT)
        return inside, address

    def close(self) -> None:
        for name in reversed(self.names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=COMMAND_S)

    def _plug(self, name: str, device: str) -> str:
        """Connect a namespace with the street."""
        self._hosts += 1
        port, address = f"port{self._hosts}", f"{PUBLIC}.{self._hosts + 9}"
        self._ip(self.street, "link", "add", port, "type", "veth", "peer", "name", device, "netns", name)
        self._ip(self.street, "link", "set", port, "master", "br0")
        self._ip(self.street, "link", "set", port, "up")
        self._ip(name, "addr", "add", f"{address}/24", "dev", device)
        self._ip(name, "link", "set", device, "up")
        self._ip(name, "route", "add", "default", "via", f"{PUBLIC}.1")
        return address

    def _add(self, name: str) -> str:
        name = f"{self._prefix}{name}"
        call("ip", "netns", "add", name)
        self.names.append(name)
        self._ip(name, "link", "set", "lo", "up")
        return name

    def _ip(self, name: str, *arguments: str) -> None:
        call("ip", "-n", name, *arguments)


def inside_of(name: str) -> list[str]:
    """What comes before a command to run it in a namespace."""
    return ["ip", "netns", "exec", name]


@contextmanager
def make_world() -> Iterator[World]:
    world = World()
    try:
        world.open()
        yield world
    finally:
        world.close()
