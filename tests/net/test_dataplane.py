from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from functools import partial

import pytest
import trio
from net_helpers import get_call, get_identity, serve

from daaswarm.errors import Unreachable
from daaswarm.limits import HANDSHAKES_PER_ADDRESS
from daaswarm.messages import Contact, ExpertReply, Ping, Pong, Reply
from daaswarm.net.addresses import Address
from daaswarm.net.dataplane import open_tcp_network
from daaswarm.net.sockets import LOOKUPS, connect
from daaswarm.net.splice import HTTP_BYTE, MULTISTREAM_BYTE, SPLICES_PER_ADDRESS


async def test_calls_over_tls():
    async with (
        open_tcp_network(get_identity(1), handler=serve) as a,
        open_tcp_network(get_identity(2), handler=serve) as b,
        open_tcp_network(get_identity(3), handler=serve, listen=[]) as c,
    ):
        assert b.contact is not None and c.contact is None
        assert isinstance((await a.call(b.contact, Ping(), deadline_s=5))[0], Pong)
        big = bytes(range(256)) * 40_000
        _, body = await b.call(a.contact, get_call(), [big[:1000], big[1000:]], deadline_s=30)
        assert body == big
        assert len(a.connections) == len(b.connections) == 1
        assert (await c.connect_addr(b.contact.addrs[0])).peer_id == b.peer_id

        def work() -> Reply:
            for _ in range(100):
                reply, body = c.submit(b.contact, get_call(), [b"x" * 2000], deadline_s=5).wait()
                assert body == b"x" * 2000
            return reply

        assert isinstance(await trio.to_thread.run_sync(work), ExpertReply)


async def test_the_cipher_is_one_that_cpus_do_in_hardware():
    async with (
        open_tcp_network(get_identity(1), handler=serve) as a,
        open_tcp_network(get_identity(2), handler=serve) as b,
    ):
        await a.connect(b.contact)
        name, version, _ = a.connections[0]._carrier._ssl.cipher()
        assert "AES" in name and "GCM" in name and version == "TLSv1.3"


async def test_unproven_connections_of_one_address_are_capped():
    async with (
        open_tcp_network(get_identity(1), handler=serve, listen=[]) as client,
        open_tcp_network(get_identity(2), handler=serve) as node,
    ):
        target = ("127.0.0.1", node.listen_addresses[0].port)
        socks = [await trio.open_tcp_stream(*target) for _ in range(HANDSHAKES_PER_ADDRESS)]
        while node._shaking.total() < HANDSHAKES_PER_ADDRESS:
            await trio.lowlevel.checkpoint()
        with pytest.raises(Unreachable):
            await client.connect(node.contact)
        for sock in socks:
            await sock.aclose()
        while node._shaking:
            await trio.lowlevel.checkpoint()
        assert await client.connect(node.contact) == node.peer_id
        # A node that only dials is called back on its own connection.
        back = Contact(peer_id=client.peer_id, addrs=[])
        assert isinstance((await node.call(back, Ping(), deadline_s=5))[0], Pong)


async def test_one_address_cannot_take_all_connections(monkeypatch):
    monkeypatch.setattr("daaswarm.net.dataplane.CONNECTIONS_PER_ADDRESS", 2)
    async with (
        open_tcp_network(get_identity(1), handler=serve) as node,
        open_tcp_network(get_identity(2), handler=serve) as a,
        open_tcp_network(get_identity(3), handler=serve) as b,
        open_tcp_network(get_identity(4), handler=serve) as c,
    ):
        for stranger in (a, b):
            await stranger.call(node.contact, Ping(), deadline_s=5)
        with pytest.raises(Unreachable):
            await c.connect(node.contact)
        await node.call(c.contact, Ping(), deadline_s=5)  # whom the node dials doesn't count
        await a.disconnect(node.peer_id, "done")
        await c.disconnect(node.peer_id, "done")
        while len(node.connections) > 1:
            await trio.lowlevel.checkpoint()
        await c.call(node.contact, Ping(), deadline_s=5)
        assert node._proven == {"127.0.0.1": 2}
    assert not node._proven


async def test_the_libp2p_door_is_capped_by_address_too():
    async with open_tcp_network(get_identity(2), handler=serve) as node, trio.open_nursery() as nursery:

        async def hold(stream) -> None:
            await trio.sleep_forever()

        listeners = await nursery.start(partial(trio.serve_tcp, hold, 0, host="127.0.0.1"))
        inner = listeners[0].socket.getsockname()
        node.splicer.targets.update({HTTP_BYTE: inner, MULTISTREAM_BYTE: inner})
        socks = []
        for number in range(SPLICES_PER_ADDRESS + 1):
            sock = await trio.open_tcp_stream("127.0.0.1", node.listen_addresses[0].port)
            await sock.send_all(bytes([(HTTP_BYTE, MULTISTREAM_BYTE)[number % 2]]))
            socks.append(sock)
            if number < SPLICES_PER_ADDRESS:
                while node.splicer._by_origin.total() <= number:
                    await trio.lowlevel.checkpoint()
        with trio.fail_after(5), contextlib.suppress(trio.BrokenResourceError):
            assert await socks[-1].receive_some() == b""  # one too many
        assert node.splicer._by_origin == {"127.0.0.1": SPLICES_PER_ADDRESS}
        assert node._shaking.total() == 0  # our own peers still get in from that address
        for sock in socks:
            await sock.aclose()
        nursery.cancel_scope.cancel()


async def test_who_comes_before_libp2p_runs_waits_for_it():
    async with open_tcp_network(get_identity(2), handler=serve) as node, trio.open_nursery() as nursery:

        async def echo(stream: trio.SocketStream) -> None:
            await stream.send_all(await stream.receive_some())

        inner = (await nursery.start(partial(trio.serve_tcp, echo, 0, host="127.0.0.1")))[0].socket.getsockname()
        node.splicer.settled = trio.Event()
        early = await trio.open_tcp_stream("127.0.0.1", node.listen_addresses[0].port)
        await early.send_all(bytes([MULTISTREAM_BYTE]))
        while not node.splicer._by_origin:
            await trio.lowlevel.checkpoint()
        node.splicer.targets[MULTISTREAM_BYTE] = inner
        node.splicer.settled.set()
        with trio.fail_after(5):
            assert await early.receive_some() == bytes([MULTISTREAM_BYTE])
            other = await trio.open_tcp_stream("127.0.0.1", node.listen_addresses[0].port)
            await other.send_all(bytes([HTTP_BYTE]))  # of what doesn't run, and won't
            with contextlib.suppress(trio.BrokenResourceError):
                assert await other.receive_some() == b""
        await early.aclose()
        await other.aclose()
        nursery.cancel_scope.cancel()


async def test_a_bug_in_the_listener_costs_one_connection(monkeypatch, caplog):
    async def broken(*args):
        raise KeyError("a bug")

    async with (
        open_tcp_network(get_identity(1), handler=serve, listen=[]) as client,
        open_tcp_network(get_identity(2), handler=serve) as node,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(node, "_accept_tls", broken)
            with pytest.raises(Unreachable):
                await client.connect(node.contact)
        assert "a bug" in caplog.text
        assert await client.connect(node.contact) == node.peer_id


async def test_hostile_names_hold_up_only_each_other(monkeypatch):
    free = threading.Event()
    busy = most = 0

    def look_up(*args):
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        free.wait(30)
        busy -= 1
        raise OSError("no such name")

    async def dial(number: int) -> None:
        peer_id = get_identity(number + 10).peer_id
        with pytest.raises(Unreachable):
            await node.connect(Contact(peer_id=peer_id, addrs=[f"/dns4/host-{number}.invalid/tcp/1"]))

    async with (
        open_tcp_network(get_identity(1), handler=serve, listen=[]) as node,
        open_tcp_network(get_identity(2), handler=serve) as other,
    ):
        with monkeypatch.context() as patch:
            patch.setattr("daaswarm.net.sockets.LOOKUP_S", 0.1)
            real = socket.getaddrinfo
            patch.setattr(socket, "getaddrinfo", lambda *args: real(*args) if len(args) > 5 and args[5] else look_up())
            try:
                with trio.fail_after(20):
                    async with trio.open_nursery() as nursery:
                        for number in range(60):
                            nursery.start_soon(dial, number)
                        await trio.sleep(0.05)
                        assert await trio.to_thread.run_sync(lambda: "a thread") == "a thread"
                        await node.connect(other.contact)
                assert 0 < most <= LOOKUPS
            finally:
                free.set()


@pytest.mark.parametrize("host", ["a" * 70, "a\0b", "é" * 80])
async def test_a_name_that_cannot_be_one_is_unreachable(host):
    address = Address("dns4", host, 1, None)
    with pytest.raises(Unreachable):
        await connect(address, str(address), trio.CapacityLimiter(1))


def test_importing_the_data_plane_does_not_import_libp2p():
    code = "import sys, daaswarm.net.dataplane, daaswarm.net.memory; print('libp2p' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
