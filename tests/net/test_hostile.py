"""Whatever a stranger does to a listening port, the node goes on serving, and its memory stays where it was."""

from __future__ import annotations

import contextlib
import gc
import logging
import socket
import ssl

import psutil
import pytest
import trio
from net_helpers import get_call, get_identity, serve

from daaswarm import messages
from daaswarm.errors import ConfigError, PeerIdMismatch, RemoteProtocolError, Unreachable
from daaswarm.messages import ExpertReply
from daaswarm.net.dataplane import Dialling, open_tcp_network
from daaswarm.net.frames import Kind, encode_handshake, encode_head
from daaswarm.net.handshake import Identity
from daaswarm.net.tls import create_tls_contexts
from daaswarm.testing.attacker import Attacker

ATTACKER = get_identity(66)


async def test_the_listener_survives_strangers(caplog):
    caplog.set_level(logging.DEBUG)
    async with (
        open_tcp_network(get_identity(1), handler=serve) as node,
        open_tcp_network(get_identity(2), handler=serve, listen=[]) as good,
    ):
        assert node.contact is not None
        attacker = Attacker(ATTACKER, node.listen_addresses[0].port, node.peer_id)
        await good.connect(node.contact)
        await trio.to_thread.run_sync(attacker.attack, 1)
        caplog.clear()
        gc.collect()
        before = psutil.Process().memory_info().rss
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, attacker.attack, 38)  # 26 kinds: 988 connections
                for _ in range(20):
                    reply, _ = await good.call(node.contact, get_call(), [b"x" * 4000], deadline_s=20)
                    assert isinstance(reply, ExpertReply)
        gc.collect()
        assert psutil.Process().memory_info().rss - before < 20_000_000
        assert not any(record.exc_info for record in caplog.records)  # a line each, never a traceback
        while len(node.connections) > 1:
            await trio.lowlevel.checkpoint()
        assert not node._shaking
        assert node._budget.used_bytes == node._budget.reserved_bytes == node._budget.calls == 0


DEEP = b"\x91" * 100_000 + b"\x00"
NOT_TEXT = b"\xa2\xff\xff"


@pytest.mark.parametrize("junk", [DEEP, NOT_TEXT])
async def test_a_header_that_breaks_the_decoder(junk):
    async with (
        open_tcp_network(get_identity(1), handler=serve) as node,
        open_tcp_network(get_identity(2), handler=serve, listen=[]) as good,
    ):
        assert node.contact is not None
        attacker = Attacker(ATTACKER, node.listen_addresses[0].port, node.peer_id)
        header = b"\x82\xa1t" + (b"\xa4ping\xa1x" + junk if junk is DEEP else junk + b"\xa1x\x00")
        request = encode_head(Kind.REQUEST, 1, deadline_ms=9, header_bytes=len(header)) + header
        said = await trio.to_thread.run_sync(attacker.send_tls, request, {})
        assert b"unsupported" in said
        proof = b"\x82\xa1t\xa5prove" + (b"\xa1x" + junk[-3_000:] if junk is DEEP else b"\xa5agent" + junk)
        said = await trio.to_thread.run_sync(attacker.send_tls, encode_handshake(proof))
        assert b"remote_protocol_error" in said
        assert isinstance((await good.call(node.contact, get_call(), deadline_s=5))[0], ExpertReply)


async def test_clients_that_stop_during_the_handshake(monkeypatch):
    monkeypatch.setattr("daaswarm.net.dataplane.HANDSHAKE_S", 0.2)
    async with open_tcp_network(get_identity(1), handler=serve) as node:
        address = ("127.0.0.1", node.listen_addresses[0].port)
        hello = get_client_hello()
        for data in (b"", b"\x16", hello[:50], hello):  # silent, or stopped at some point; the last never reads
            with trio.fail_after(10), socket.create_connection(address) as sock:
                sock.sendall(data)
                while not node._shaking:
                    await trio.lowlevel.checkpoint()
                while node._shaking:
                    await trio.lowlevel.checkpoint()
        assert not node.connections


def get_client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = create_tls_contexts(ATTACKER.key).client.wrap_bio(incoming, outgoing)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


async def test_a_refused_proof_is_told_why():
    async with open_tcp_network(get_identity(1), handler=serve) as node:
        attacker = Attacker(ATTACKER, node.listen_addresses[0].port, node.peer_id)
        said = await trio.to_thread.run_sync(attacker.send_tls, None, {"signature": bytes(64)})
        assert b"bad_proof" in said
        said = await trio.to_thread.run_sync(attacker.send_tls, None, {"version": 99})
        assert b"wrong_version" in said


async def test_another_swarm_another_peer_nobody():
    async with (
        open_tcp_network(get_identity(1), handler=serve) as node,
        open_tcp_network(Identity.from_seed(bytes(32), bytes(32)), handler=serve, listen=[]) as stranger,
        open_tcp_network(get_identity(2), handler=serve, listen=[]) as good,
    ):
        assert node.contact is not None
        with pytest.raises(RemoteProtocolError, match="another swarm"):
            await stranger.connect(node.contact)
        base = str(node.listen_addresses[0])
        other = get_identity(3).peer_id
        with pytest.raises(PeerIdMismatch) as mismatch:
            await good.connect(messages.Contact(peer_id=other, addrs=[base]))
        assert other in mismatch.value.message and node.peer_id in mismatch.value.message
        with pytest.raises(ConfigError, match="cannot listen at"):
            async with open_tcp_network(get_identity(4), handler=serve, listen=[base]):
                pass
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            closed = f"/ip4/127.0.0.1/tcp/{unused.getsockname()[1]}"
            with pytest.raises(Unreachable, match=closed):
                await good.connect(messages.Contact(peer_id=other, addrs=[closed]))


async def answer_with(data: bytes, task_status=trio.TASK_STATUS_IGNORED) -> None:
    async def talk(stream) -> None:
        await stream.receive_some(1)
        await stream.send_all(data)
        await trio.sleep_forever()

    await trio.serve_tcp(talk, 0, host="127.0.0.1", task_status=task_status)


async def test_dialling_what_is_not_daaswarm():
    async with open_tcp_network(get_identity(2), handler=serve, listen=[]) as good, trio.open_nursery() as nursery:
        listeners = await nursery.start(answer_with, b"SSH-2.0-OpenSSH_9.0\r\n")
        port = listeners[0].socket.getsockname()[1]
        with pytest.raises(RemoteProtocolError, match=r"no TLS 1\.3"):
            await good.connect_addr(f"/ip4/127.0.0.1/tcp/{port}")
        nursery.cancel_scope.cancel()


async def test_a_silent_listener(autojump_clock, monkeypatch):
    monkeypatch.setattr("daaswarm.net.dataplane.DIALLING", Dialling(handshake_s=0.2))
    async with open_tcp_network(get_identity(2), handler=serve, listen=[]) as good:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            addr = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}"
            with pytest.raises(Unreachable, match=r"no answer within 0\.2 s"):
                await good.connect_addr(addr)
