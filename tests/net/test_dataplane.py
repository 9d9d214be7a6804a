from __future__ import annotations

import subprocess
import sys

import pytest
import trio
from net_helpers import get_call, get_identity, serve

from daaswarm.errors import Unreachable
from daaswarm.limits import HANDSHAKES_PER_ADDRESS
from daaswarm.messages import Contact, ExpertReply, Ping, Pong, Reply
from daaswarm.net.dataplane import open_tcp_network


async def test_calls_over_tls():
    async with (
        open_tcp_network(get_identity(1), handler=serve) as a,
        open_tcp_network(get_identity(2), handler=serve) as b,
        open_tcp_network(get_identity(3), handler=serve, listen=[]) as c,
    ):
        assert b.contact is not None and c.contact is None
        assert (await a.call(b.contact, Ping(), deadline_s=5))[0] == Pong()
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
        assert (await node.call(back, Ping(), deadline_s=5))[0] == Pong()


def test_importing_the_data_plane_does_not_import_libp2p():
    code = "import sys, daaswarm.net.dataplane, daaswarm.net.memory; print('libp2p' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
