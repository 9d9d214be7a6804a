"""Clocks that are set, and machines that slept."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from daaswarm.net.dataplane import TcpNetwork
from daaswarm.node.vigil import Vigil
from daaswarm.types import PeerId
from tests.node.node_helpers import deploy, node


async def test_a_clock_that_is_set_back_loses_nothing(moe: Path, tmp_path: Path) -> None:
    async with node(tmp_path / "a") as a, node(tmp_path / "b", bootstrap=a) as b:
        root = (await deploy(a, moe, layers="0"))["model_root"]
        before = a.discovery.membership.own.get_signed(root, time.time())
        publication = a.discovery.kademlia.publisher.publications[bytes.fromhex(root)]
        due, seen = publication.due_at, [e.seen_at for e in a.discovery.kademlia.table.get_entries()]
        wall, monotonic = [time.time()], [0.0]
        vigil = Vigil(a.network, a.discovery, a.hosting, wall=lambda: wall[0], monotonic=lambda: monotonic[0])
        await vigil.look()
        wall[0] -= 3600
        monotonic[0] += 5
        await vigil.look()
        moved = [e.seen_at for e in a.discovery.kademlia.table.get_entries()]
        assert moved == pytest.approx([at - 3605 for at in seen])
        after = a.discovery.membership.own.get_signed(root, time.time())
        assert after != before and a.discovery.kademlia.publisher.publications[bytes.fromhex(root)].due_at != due
        assert b.discovery.book.put(after, time.time())
        assert not b.discovery.book.put(before, time.time())  # the newer one has the higher number all the same


async def test_after_a_suspension_dead_connections_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []

    async def check(self: TcpNetwork) -> None:
        checked.append(len(self.connections))

    async with node(tmp_path / "a") as a, node(tmp_path / "b", bootstrap=a) as b:
        await b.network.check_connections()
        assert b.network.is_connected(PeerId(a.peer_id))  # it answers
        monkeypatch.setattr(TcpNetwork, "check_connections", check)
        wall, monotonic = [1e9], [0.0]
        vigil = Vigil(b.network, b.discovery, b.hosting, wall=lambda: wall[0], monotonic=lambda: monotonic[0])
        await vigil.look()
        wall[0] += 5
        monotonic[0] += 5
        await vigil.look()
        assert checked == []
        wall[0] += 8 * 3600
        await vigil.look()
        assert checked == [1]
