from __future__ import annotations

import threading

import pytest
import trio
from net_helpers import get_call, get_identity, serve

from daaswarm.errors import ConnectionLost, DaaswarmError, DeadlineExceeded, ExpertError, Unreachable
from daaswarm.messages import ExpertCall, ExpertReply, FindNode, Found, Ping
from daaswarm.net.carrier import open_memory_pair
from daaswarm.net.connection import Connection
from daaswarm.net.dataplane import open_tcp_network
from daaswarm.net.handshake import ProvenPeer
from daaswarm.net.inbound import InboundBudget
from daaswarm.net.memory import MemoryHub

BIG = bytes(range(256)) * 30_000  # 7.7 MB, two windows


def serve_fast(peer_id, message, body):
    if isinstance(message, ExpertCall) and message.layer == 1:
        return ExpertReply(rows=1, hidden=1), [body]
    if isinstance(message, ExpertCall) and message.layer == 2:
        raise ExpertError("no layer 2")
    return None


async def test_the_fast_handler_is_tried_first():
    async def never(*args):
        raise AssertionError

    hub = MemoryHub()
    async with (
        hub.open_node(get_identity(1), handler=serve) as a,
        hub.open_node(get_identity(2), handler=serve, fast_handler=serve_fast) as b,
        hub.open_node(get_identity(3), handler=never, fast_handler=serve_fast) as c,
    ):
        for host in (b, c):
            _, body = await a.call(host.contact, get_call(1), [b"xy"], deadline_s=5)
            assert body == b"xy"
            with pytest.raises(ExpertError, match="no layer 2"):
                await a.call(host.contact, get_call(2), deadline_s=5)
        _, body = await a.call(b.contact, get_call(3), [b"z"], deadline_s=5)  # the slow way
        assert body == b"z"


async def test_a_bug_in_a_handler_costs_one_call(caplog):
    async def broken(*args):
        raise KeyError("a bug")

    hub = MemoryHub()
    async with hub.open_node(get_identity(1), handler=serve) as a, hub.open_node(get_identity(2), handler=broken) as b:
        with pytest.raises(ExpertError, match="internal error"):
            await a.call(b.contact, FindNode(target=bytes(32)), deadline_s=5)
        await a.call(b.contact, Ping(), deadline_s=5)
    assert "a bug" in caplog.text


async def test_giving_up_cancels_the_handler(autojump_clock):
    cancelled = trio.Event()

    async def wait(*args):
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    hub = MemoryHub()
    async with hub.open_node(get_identity(1), handler=serve) as a, hub.open_node(get_identity(2), handler=wait) as b:
        with trio.move_on_after(1):
            await a.call(b.contact, FindNode(target=bytes(32)), deadline_s=25)
        await cancelled.wait()
        assert trio.current_time() < 2000
        assert b.connections[0].is_idle and a.connections[0].is_idle


async def test_dials_to_one_peer_are_one_dial():
    hub = MemoryHub()
    async with hub.open_node(get_identity(1), handler=serve) as a, hub.open_node(get_identity(2), handler=serve) as b:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(a.connect, b.contact)
        assert len(a.connections) == 1


async def test_a_frozen_peer_is_noticed(autojump_clock):
    hub = MemoryHub()
    async with hub.open_node(get_identity(1), handler=serve) as a, hub.open_node(get_identity(2), handler=serve) as b:
        await a.connect(b.contact)
        hub.partition([a.peer_id], [b.peer_id])
        await trio.sleep(60)
        assert not a.is_connected(b.peer_id) and not b.is_connected(a.peer_id)
        with pytest.raises(Unreachable):
            await a.connect(b.contact)


async def test_a_peer_that_never_reads_ends_its_connection(autojump_clock):
    ours, _theirs = open_memory_pair(bytes(32))
    connection = Connection(
        ours, ProvenPeer(get_identity(2).peer_id), is_client=True, budget=InboundBudget(), handler=serve
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        begin = trio.current_time()
        with pytest.raises(ConnectionLost, match="read nothing"):
            await connection.call(get_call(), [BIG], deadline_s=30)
        assert trio.current_time() - begin < 15


async def test_a_connection_that_ends_fails_its_calls_promptly(autojump_clock):
    hub = MemoryHub()
    async with hub.open_node(get_identity(1), handler=serve) as a, hub.open_node(get_identity(2), handler=serve) as b:
        await a.connect(b.contact)
        pending = [a.submit(b.contact, FindNode(target=bytes(32)), deadline_s=25) for _ in range(5)]
        hub.kill(b.peer_id)
        for call in pending:
            with pytest.raises(ConnectionLost, match=b.peer_id):
                await trio.to_thread.run_sync(call.wait)
        with pytest.raises(Unreachable):
            a.submit(b.contact, Ping(), deadline_s=1)


async def test_threads_and_tasks_share_a_tls_connection():
    """Leaders hand over to followers, trio's reader to both; large and small calls at once; both sides ask."""
    async with (
        open_tcp_network(get_identity(1), handler=serve, fast_handler=serve_fast) as a,
        open_tcp_network(get_identity(2), handler=serve, fast_handler=serve_fast) as b,
    ):
        await a.connect(b.contact)
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for turn in range(60):
                    data = bytes([number, turn]) * 1000
                    calls = [a.submit(b.contact, get_call(layer), [data], deadline_s=20) for layer in (1, 3)]
                    for call in calls:
                        assert call.wait()[1] == data
                assert a.submit(b.contact, get_call(3), [BIG], deadline_s=30).wait()[1] == BIG
            except (DaaswarmError, AssertionError) as error:
                failures.append(error)

        async def ask(node, other) -> None:
            for turn in range(60):
                _, body = await node.call(other.contact, get_call(turn % 2), [bytes(turn)], deadline_s=20)
                assert len(body) == turn

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(trio.to_thread.run_sync, work, number)
                for _ in range(3):
                    nursery.start_soon(ask, a, b)
                    nursery.start_soon(ask, b, a)
        assert not failures, failures
        assert a.connections[0].is_idle and len(a.connections) == 1


async def test_a_thread_waits_no_longer_than_it_said():
    async with (
        open_tcp_network(get_identity(1), handler=serve, listen=[]) as a,
        open_tcp_network(get_identity(2), handler=serve) as b,
    ):
        await a.connect(b.contact)
        pending = a.submit(b.contact, FindNode(target=bytes(32)), deadline_s=20)
        with pytest.raises(DeadlineExceeded):
            await trio.to_thread.run_sync(pending.wait, 0.05)
        # A thread that reads the socket when the connection ends is woken by that.
        pending = a.submit(b.contact, FindNode(target=bytes(32)), deadline_s=20)
        started = threading.Event()

        def wait() -> None:
            started.set()
            with pytest.raises(ConnectionLost):
                pending.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, wait)
            await trio.to_thread.run_sync(started.wait)
            await a.disconnect(b.peer_id, "no longer wanted")
        assert isinstance((await a.call(b.contact, get_call(3), deadline_s=5))[0], ExpertReply | Found)
