from __future__ import annotations

import threading

import pytest
import trio
from net_helpers import get_call, get_identity, serve

from daaswarm import messages
from daaswarm.errors import ConnectionLost, DaaswarmError, DeadlineExceeded, ExpertError, Unreachable
from daaswarm.limits import CALLS_PER_PEER
from daaswarm.messages import ExpertCall, ExpertReply, FindNode, Found, Ping, Store
from daaswarm.net.carrier import open_memory_pair
from daaswarm.net.connection import Connection
from daaswarm.net.dataplane import open_tcp_network
from daaswarm.net.frames import Kind, encode_head
from daaswarm.net.handshake import ProvenPeer
from daaswarm.net.inbound import InboundBudget
from daaswarm.net.memory import MemoryHub

BIG = bytes(range(256)) * 30_000  # 7.7 MB, two windows


def serve_fast(peer_id, message, body, deadline_s):
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


async def test_a_bug_in_the_fast_handler_or_in_an_answer_costs_one_call(caplog):
    def broken(peer_id, message, body, deadline_s):
        if isinstance(message, Store):
            return "neither an answer nor None"
        raise KeyError("a bug")

    async def answer_nonsense(*args):
        return object(), ()

    hub = MemoryHub()
    async with (
        hub.open_node(get_identity(1), handler=serve) as a,
        hub.open_node(get_identity(2), handler=serve, fast_handler=broken) as b,
        hub.open_node(get_identity(3), handler=answer_nonsense) as c,
    ):
        for host in (b, c):
            for _ in range(2):
                with pytest.raises(ExpertError, match="internal error"):
                    await a.call(host.contact, FindNode(target=bytes(32)), deadline_s=5)
            await a.call(host.contact, Ping(), deadline_s=5)
            assert len(host.connections) == 1 and host.connections[0].is_idle
        with pytest.raises(ConnectionLost):
            await a.call(b.contact, Store(records=[]), deadline_s=5)
        await a.call(b.contact, Ping(), deadline_s=5)
        assert b._budget.calls == 0
    assert "a bug" in caplog.text and "can't be sent" in caplog.text


@pytest.mark.parametrize("name", ["receive", "next_buffers", "drop_stalled"])
async def test_a_bug_in_a_connection_ends_only_that_connection(name, monkeypatch, caplog, autojump_clock):
    def broken(*args):
        raise KeyError("a bug")

    hub = MemoryHub()
    async with (
        hub.open_node(get_identity(1), handler=serve) as a,
        hub.open_node(get_identity(2), handler=serve) as b,
        hub.open_node(get_identity(3), handler=serve) as c,
    ):
        await a.connect(b.contact)
        await c.connect(b.contact)
        monkeypatch.setattr(b.get(a.peer_id)._session, name, broken)
        with pytest.raises(ConnectionLost):
            await a.call(b.contact, FindNode(target=bytes(32)), deadline_s=25)
        assert "a bug" in caplog.text
        await a.call(b.contact, Ping(), deadline_s=5)  # on a new one
        await c.call(b.contact, Ping(), deadline_s=5)


async def test_calls_that_are_cancelled_at_once_are_capped_like_others():
    ours, theirs = open_memory_pair(bytes(32))
    budget = InboundBudget()
    running = most = started = 0
    finish = trio.Event()

    async def work(*args):  # can't be cancelled, like a thread that computes
        nonlocal running, most, started
        running, started = running + 1, started + 1
        most = max(most, running)
        with trio.CancelScope(shield=True), trio.move_on_after(20):
            await finish.wait()
        running -= 1
        return Found(), ()

    header = messages.encode(FindNode(target=bytes(32)))
    connection = Connection(theirs, ProvenPeer(get_identity(2).peer_id), is_client=False, budget=budget, handler=work)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        # Some at work already, then a flood in one read.
        for first, count in ((1, 10), (21, 10_000)):
            data = bytearray()
            for call in range(first, first + 2 * count, 2):
                data += encode_head(Kind.REQUEST, call, deadline_ms=9999, header_bytes=len(header)) + header
                if call > 20:
                    data += encode_head(Kind.CANCEL, call)
            ours.send([data])
            await trio.testing.wait_all_tasks_blocked()
            while ours.receive():
                pass
        assert started == most == running == 10  # what was cancelled before it began never begins
        assert budget.calls == 10
        finish.set()
        await trio.testing.wait_all_tasks_blocked()
    assert running == budget.calls == 0 and connection._serving.tasks == 0


async def test_a_cancelled_call_counts_until_its_work_has_ended():
    ours, theirs = open_memory_pair(bytes(32))
    budget = InboundBudget()
    running = most = 0
    finish = trio.Event()

    async def work(*args):
        nonlocal running, most
        running += 1
        most = max(most, running)
        with trio.CancelScope(shield=True), trio.move_on_after(20):
            await finish.wait()
        running -= 1
        return Found(), ()

    header = messages.encode(FindNode(target=bytes(32)))
    connection = Connection(theirs, ProvenPeer(get_identity(2).peer_id), is_client=False, budget=budget, handler=work)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        for call in range(1, 2 * 3 * CALLS_PER_PEER, 2):
            ours.send([encode_head(Kind.REQUEST, call, deadline_ms=9999, header_bytes=len(header)) + header])
            await trio.testing.wait_all_tasks_blocked()
            ours.send([encode_head(Kind.CANCEL, call)])
            while ours.receive():
                pass
        await trio.testing.wait_all_tasks_blocked()
        assert most == running == budget.calls == CALLS_PER_PEER
        ours.shut_down()  # hanging up gives nothing back either
        await trio.testing.wait_all_tasks_blocked()
        assert not connection.is_open and running == budget.calls == CALLS_PER_PEER
        finish.set()
    assert running == budget.calls == 0


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


async def test_a_peers_words_cannot_write_to_the_terminal():
    async def rude(*args):
        raise ExpertError("\x1b[2J\nfake: ok\x07", hint="\r\u202e")

    hub = MemoryHub()
    async with hub.open_node(get_identity(1), handler=serve) as a, hub.open_node(get_identity(2), handler=rude) as b:
        with pytest.raises(ExpertError, match="fake: ok") as info:
            await a.call(b.contact, FindNode(target=bytes(32)), deadline_s=5)
        assert info.value.message.isprintable() and info.value.hint.isprintable()
