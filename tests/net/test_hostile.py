"""Whatever a stranger does to a listening port, the node goes on serving, and its memory stays where it was."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import os
import socket
import ssl

import psutil
import pytest
import trio
from net_helpers import SWARM, get_call, get_identity, serve

from daaswarm import messages
from daaswarm.core.signing import get_handshake_payload
from daaswarm.errors import ConfigError, PeerIdMismatch, RemoteProtocolError, Unreachable
from daaswarm.limits import CALL_BODY_BYTES, CHUNK_BYTES, CONTROL_BYTES
from daaswarm.messages import ExpertReply, Hello, Ping, Prove
from daaswarm.net.dataplane import open_tcp_network
from daaswarm.net.frames import Kind, encode_handshake, encode_head
from daaswarm.net.handshake import Identity
from daaswarm.net.tls import create_tls_contexts

ATTACKER = get_identity(66)
PING = messages.encode(Ping())
CALL = messages.encode(get_call())


def get_proof(der: bytes, hello: Hello, server: str, **changes) -> bytes:
    payload = get_handshake_payload(
        hashlib.sha256(der).digest(), hello.nonce, SWARM, server, changes.pop("claim", ATTACKER.peer_id)
    )
    fields = {"public_key": ATTACKER.public_key, "signature": ATTACKER.key.sign(payload).signature}
    return encode_handshake(messages.encode(Prove(**(fields | changes))))


RAW = [b"", b"\x00" * 50, b"GET / HTTP/1.1\r\n\r\n", b"\x13/multistream/1.0.0\n", b"\x16\x03\x01" + b"\xff" * 200]
BEFORE_PROOF = [
    b"\x00" * 100,
    encode_head(Kind.HANDSHAKE, 0, header_bytes=CONTROL_BYTES),
    encode_head(Kind.REQUEST, 1, deadline_ms=9, header_bytes=len(PING)) + PING,
    encode_handshake(b"\xc1 not msgpack"),
    encode_handshake(messages.encode(Hello(nonce=bytes(32), swarm=bytes(32)))),
    encode_handshake(messages.encode(messages.Failure(code="x", message="y"))),
    encode_handshake(b"\x00"),
]
BAD_PROOFS = [
    {"signature": bytes(64)},
    {"public_key": bytes(32)},
    {"claim": get_identity(67).peer_id},
    {"version": 99},
    {"contact": messages.Contact(peer_id=get_identity(67).peer_id, addrs=[])},
]
AFTER_PROOF = [
    os.urandom(2000),
    encode_head(Kind.REQUEST, 1, deadline_ms=9, header_bytes=CONTROL_BYTES + 1),
    encode_head(Kind.REQUEST, 1, deadline_ms=9, header_bytes=len(CALL), body=CALL_BODY_BYTES) + CALL,  # then hangs up
    encode_head(Kind.BODY, 1, body=CHUNK_BYTES + 1),
    encode_head(Kind.BODY, 1, body=5) + b"x",
    encode_head(Kind.REQUEST, 2, deadline_ms=9, header_bytes=len(PING)) + PING,
    encode_head(Kind.REPLY, 2, header_bytes=len(PING)) + PING,
    encode_head(Kind.REQUEST, 1, deadline_ms=9, header_bytes=5) + b"junk!" + encode_head(Kind.CANCEL, 9),
    encode_handshake(b"again"),
]


class Attacker:
    """A blocking client that says anything; for a worker thread."""

    def __init__(self, port: int, server: str) -> None:
        self.port = port
        self.server = server
        self.context = create_tls_contexts(ATTACKER.key).client

    def send_raw(self, data: bytes) -> None:
        with socket.create_connection(("127.0.0.1", self.port), 10) as sock:
            sock.sendall(data)
            with contextlib.suppress(OSError):  # the node has hung up already
                sock.shutdown(socket.SHUT_WR)
            self.drain(sock)

    def send_tls(self, data: bytes | None, proof: dict | None = None) -> bytes:
        """Up to the server's hanging up; what it said last. ``proof`` None: send ``data`` instead of one."""
        with (
            socket.create_connection(("127.0.0.1", self.port), 10) as sock,
            self.context.wrap_socket(sock, suppress_ragged_eofs=True) as tls,
        ):
            head = tls.recv(16)
            hello = messages.get_decoder(messages.Handshake).decode(tls.recv(int.from_bytes(head[8:12], "big")))
            try:
                if proof is not None:
                    tls.sendall(get_proof(tls.getpeercert(True) or b"", hello, self.server, **proof))
                if data:
                    tls.sendall(data)
                socket.socket.shutdown(tls, socket.SHUT_WR)  # its own would forget the keys
            except OSError:
                pass  # the node has hung up already
            return self.drain(tls)

    def drain(self, sock) -> bytes:
        said = b""
        try:
            while data := sock.recv(65536):
                said += data
        except (ConnectionError, ssl.SSLError):
            pass  # hung up without a goodbye
        return said

    def attack(self, rounds: int) -> None:
        for _ in range(rounds):
            for data in RAW:
                self.send_raw(data)
            for data in BEFORE_PROOF:
                self.send_tls(data)
            for proof in BAD_PROOFS:
                self.send_tls(None, dict(proof))
            for data in AFTER_PROOF:
                self.send_tls(data, {})


async def test_the_listener_survives_strangers(caplog):
    caplog.set_level(logging.DEBUG)
    async with (
        open_tcp_network(get_identity(1), handler=serve) as node,
        open_tcp_network(get_identity(2), handler=serve, listen=[]) as good,
    ):
        assert node.contact is not None
        attacker = Attacker(node.listen_addresses[0].port, node.peer_id)
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


async def test_a_refused_proof_is_told_why():
    async with open_tcp_network(get_identity(1), handler=serve) as node:
        attacker = Attacker(node.listen_addresses[0].port, node.peer_id)
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
    monkeypatch.setattr("daaswarm.net.dataplane.HANDSHAKE_S", 0.2)
    async with open_tcp_network(get_identity(2), handler=serve, listen=[]) as good:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            addr = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}"
            with pytest.raises(Unreachable, match=r"no answer within 0\.2 s"):
                await good.connect_addr(addr)
