"""Strangers at a listening port: two dozen kinds of malformed bytes, handshakes and frames."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import ssl
from typing import Any

import msgspec

from daaswarm import messages
from daaswarm.core.signing import get_handshake_payload, get_peer_id
from daaswarm.limits import CALL_BODY_BYTES, CHUNK_BYTES, CONTROL_BYTES
from daaswarm.messages import Hello, Ping, Prove
from daaswarm.net.frames import Kind, encode_handshake, encode_head
from daaswarm.net.handshake import Identity
from daaswarm.net.tls import create_tls_contexts

OTHER = get_peer_id(bytes(range(32)))  # a peer that the attacker is not
PING = messages.encode(Ping())
CALL = messages.encode(messages.ExpertCall(model_root="ab" * 32, layer=0, experts=[0], dtype="f32", rows=1, hidden=1))


def get_proof(identity: Identity, der: bytes, hello: Hello, server: str, **changes: Any) -> bytes:
    """A proof of ``identity``, right but for ``changes``."""
    payload = get_handshake_payload(
        hashlib.sha256(der).digest(), hello.nonce, identity.swarm, server, changes.pop("claim", identity.peer_id)
    )
    fields: dict[str, Any] = {"public_key": identity.public_key, "signature": identity.key.sign(payload).signature}
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
BAD_PROOFS: list[dict[str, Any]] = [
    {"signature": bytes(64)},
    {"public_key": bytes(32)},
    {"claim": OTHER},
    {"version": 99},
    {"contact": messages.Contact(peer_id=OTHER, addrs=[])},
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
    """A blocking client that says anything; for a worker thread.

    Args:
        identity: its own key, and the swarm of the node under attack.
        port: of that node, on 127.0.0.1.
        server: that node's PeerId.
    """

    def __init__(self, identity: Identity, port: int, server: str) -> None:
        self.identity = identity
        self.port = port
        self.server = server
        self.context = create_tls_contexts(identity.key).client

    def send_raw(self, data: bytes) -> None:
        """Bytes before any TLS."""
        with socket.create_connection(("127.0.0.1", self.port), 10) as sock:
            sock.sendall(data)
            with contextlib.suppress(OSError):  # the node has hung up already
                sock.shutdown(socket.SHUT_WR)
            self.drain(sock)

    def send_tls(self, data: bytes | None, proof: dict[str, Any] | None = None) -> bytes:
        """Up to the server's hanging up; what it said last. ``proof`` None: send ``data`` instead of one."""
        with (
            socket.create_connection(("127.0.0.1", self.port), 10) as sock,
            self.context.wrap_socket(sock, suppress_ragged_eofs=True) as tls,
        ):
            head = tls.recv(16)
            hello = msgspec.msgpack.decode(tls.recv(int.from_bytes(head[8:12], "big")), type=Hello)
            try:
                if proof is not None:
                    tls.sendall(get_proof(self.identity, tls.getpeercert(True) or b"", hello, self.server, **proof))
                if data:
                    tls.sendall(data)
                socket.socket.shutdown(tls, socket.SHUT_WR)  # its own would forget the keys
            except OSError:
                pass  # the node has hung up already
            return self.drain(tls)

    def drain(self, sock: socket.socket) -> bytes:
        """All that the node says until it hangs up."""
        said = b""
        try:
            while data := sock.recv(65536):
                said += data
        except (ConnectionError, ssl.SSLError):
            pass  # hung up without a goodbye
        return said

    def attack(self, rounds: int) -> None:
        """Every kind of bad connection, ``rounds`` times."""
        for _ in range(rounds):
            for data in RAW:
                self.send_raw(data)
            for data in BEFORE_PROOF:
                self.send_tls(data)
            for proof in BAD_PROOFS:
                self.send_tls(None, dict(proof))
            for data in AFTER_PROOF:
                self.send_tls(data, {})


KINDS = len(RAW) + len(BEFORE_PROOF) + len(BAD_PROOFS) + len(AFTER_PROOF)
