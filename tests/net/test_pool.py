"""Which connections a node keeps, and which it refuses."""

from __future__ import annotations

import pytest
import trio
from net_helpers import get_identity, serve

from daaswarm.errors import Busy, DaaswarmError, Unreachable
from daaswarm.messages import FindNode, Ping
from daaswarm.net.memory import MemoryHub
from daaswarm.net.pool import ConnectionPool

WAIT = FindNode(target=bytes(32))  # served until it's cancelled


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


class Waiting:
    """A call of ``node`` that ``host`` never answers."""

    def __init__(self, node: ConnectionPool, host: ConnectionPool) -> None:
        self.node, self.host = node, host
        self.failed = False

    async def run(self) -> None:
        assert self.host.contact is not None
        try:
            await self.node.call(self.host.contact, WAIT, deadline_s=25)
        except DaaswarmError:
            self.failed = True


async def test_a_newcomer_pushes_out_an_idle_connection_and_never_one_in_use(monkeypatch):
    monkeypatch.setattr("daaswarm.net.pool.CONNECTIONS", 2)
    hub = MemoryHub()
    async with (
        hub.open_node(get_identity(1), handler=serve) as host,
        hub.open_node(get_identity(2), handler=serve) as a,
        hub.open_node(get_identity(3), handler=serve) as b,
        hub.open_node(get_identity(4), handler=serve) as c,
    ):
        busy = [Waiting(node, host) for node in (a, b)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(busy[0].run)
            await settle()
            await b.connect(host.contact)
            await c.connect(host.contact)  # in the place of b
            await settle()
            assert host.is_connected(a.peer_id) and host.is_connected(c.peer_id) and not host.is_connected(b.peer_id)
            nursery.start_soon(busy[1].run)  # b again, in the place of c
            await settle()
            assert not host.is_connected(c.peer_id)
            with pytest.raises(DaaswarmError):  # both are in use
                await c.call(host.contact, Ping(), deadline_s=5)
            with pytest.raises(Busy, match="in use"):
                await host.connect(c.contact)
            assert not any(call.failed for call in busy)
            nursery.cancel_scope.cancel()


async def test_strangers_do_not_push_out_whom_the_node_dialled(monkeypatch):
    monkeypatch.setattr("daaswarm.net.pool.CONNECTIONS", 2)
    hub = MemoryHub()
    async with (
        hub.open_node(get_identity(1), handler=serve) as node,
        hub.open_node(get_identity(2), handler=serve) as host,
        hub.open_node(get_identity(3), handler=serve) as a,
        hub.open_node(get_identity(4), handler=serve) as b,
    ):
        await node.connect(host.contact)
        for stranger in (a, b, a, b):
            await stranger.connect(node.contact)
            await settle()
            assert node.is_connected(host.peer_id)
        await node.connect(a.contact)  # one's own dial may
        await settle()
        assert node.is_connected(a.peer_id) and node.is_connected(host.peer_id)
        await node.connect(b.contact)
        await settle()
        assert node.is_connected(b.peer_id) and len(node.connections) == 2


async def test_one_peers_connections_in_use_are_not_replaced(monkeypatch):
    monkeypatch.setattr("daaswarm.net.pool.CONNECTIONS_PER_PEER", 1)
    hub = MemoryHub()
    async with hub.open_node(get_identity(1), handler=serve) as a, hub.open_node(get_identity(2), handler=serve) as b:
        await a.connect_addr(b.contact.addrs[0])
        await a.connect_addr(b.contact.addrs[0])  # the first was idle
        await settle()
        assert len(a.connections) == len(b.connections) == 1
        async with trio.open_nursery() as nursery:
            call = Waiting(a, b)
            nursery.start_soon(call.run)
            await settle()
            with pytest.raises(Busy, match="in use"):
                await a.connect_addr(b.contact.addrs[0])
            await settle()
            assert not call.failed
            nursery.cancel_scope.cancel()


async def test_a_bug_in_dialling_costs_one_dial(monkeypatch, caplog):
    async def broken(*args):
        raise KeyError("a bug")

    hub = MemoryHub()
    async with hub.open_node(get_identity(1), handler=serve) as a, hub.open_node(get_identity(2), handler=serve) as b:
        with monkeypatch.context() as patch:
            patch.setattr(a, "_dial_address", broken)
            with pytest.raises(Unreachable, match="internal error"):
                await a.connect(b.contact)
            with pytest.raises(Unreachable, match="internal error"):
                await a.connect_addr(b.contact.addrs[0])
        assert "a bug" in caplog.text
        await a.connect(b.contact)
