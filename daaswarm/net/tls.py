"""TLS 1.3 over a non-blocking socket, as a carrier. ``ssl.MemoryBIO`` lets one ``recv`` feed many records at once."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import trio
from nacl.signing import SigningKey

from daaswarm.errors import RemoteProtocolError, Unreachable
from daaswarm.net.carrier import READ_BYTES
from daaswarm.net.certificate import create_certificate, get_certified_peer_id
from daaswarm.net.frames import Buffer, get_size
from daaswarm.systems import wait_readable
from daaswarm.types import PeerId

RECORD_BYTES = 16 * 1024  # the most that one TLS record holds: buffers up to here are joined, saving records and calls
HANDSHAKE_READ_BYTES = 4096
ALPN = "daaswarm/1"


@dataclass(frozen=True)
class TlsContexts:
    """One node's TLS settings; ``binding`` is the SHA-256 of the certificate it shows as a server."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    binding: bytes


def create_tls_contexts(identity_key: SigningKey) -> TlsContexts:
    """A fresh TLS key and certificate for this process.

    Peers are named by the libp2p extension, so OpenSSL verifies no chain and no host name: the client checks the
    certificate itself after the handshake, and proves its own PeerId in the first messages.
    """
    certificate = create_certificate(identity_key)
    server = _create_context(ssl.PROTOCOL_TLS_SERVER)
    server.num_tickets = 0  # no resumption: it would skip the certificate
    # load_cert_chain only reads files; this one is readable by us alone and holds a key that dies with the process.
    with tempfile.NamedTemporaryFile() as file:
        file.write(certificate.key_pem + certificate.certificate_pem)
        file.flush()
        server.load_cert_chain(file.name)
    return TlsContexts(server, _create_context(ssl.PROTOCOL_TLS_CLIENT), hashlib.sha256(certificate.der).digest())


class _Buffers(threading.local):
    """Scratch memory per thread, not per connection: 1,024 idle connections would hold half a gigabyte."""

    def __init__(self) -> None:
        self.encrypted = bytearray(READ_BYTES)
        self.plain = bytearray(READ_BYTES + RECORD_BYTES)  # a read may complete a record of which most had come before


_buffers = _Buffers()


class TlsCarrier:
    """Args: ``sock``: connected and non-blocking; ``binding``: the own certificate's hash on the server's side."""

    threads_can_read = True

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, binding: bytes = b"", remote_addr: str) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.remote_addr = remote_addr
        self.binding = binding
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._is_server = bool(binding)
        self._ssl = context.wrap_bio(self._incoming, self._outgoing, server_side=self._is_server)
        self._unsent: memoryview | None = None

    async def shake_hands(self) -> PeerId | None:
        """TLS's own handshake; on the client's side the PeerId that the server proved. The caller sets the deadline.

        Raises:
            RemoteProtocolError: the other side doesn't speak TLS 1.3, or shows no libp2p certificate.
            Unreachable: it hung up.
        """
        while True:
            try:
                self._ssl.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._send_pending()
                await self._receive_for_handshake()
            except ssl.SSLError as error:
                raise RemoteProtocolError(
                    f"no TLS 1.3 with {self.remote_addr}: {error.reason or error}", hint="is it a daaswarm node?"
                ) from error
        await self._send_pending()
        if self._is_server:
            return None
        if self._ssl.selected_alpn_protocol() != ALPN:
            raise RemoteProtocolError(
                f"{self.remote_addr} speaks TLS, but not daaswarm", hint="check host and port of the address"
            )
        der = self._ssl.getpeercert(binary_form=True) or b""
        self.binding = hashlib.sha256(der).digest()
        return get_certified_peer_id(der)

    async def _send_pending(self) -> None:
        while not self.flush():
            await self.wait_writable()

    async def _receive_for_handshake(self) -> None:
        while True:
            await self.wait_readable()
            try:
                data = self._sock.recv(HANDSHAKE_READ_BYTES)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError as error:
                raise Unreachable(f"{self.remote_addr} broke off the handshake: {error}") from error
            if not data:
                raise Unreachable(
                    f"{self.remote_addr} hung up during the handshake",
                    hint="is it a daaswarm node, and not overloaded?",
                )
            self._incoming.write(data)
            return

    # -- Carrier ----------------------------------------------------------------------------------------------

    def send(self, buffers: Sequence[Buffer]) -> bool:
        write = self._ssl.write
        if get_size(buffers) <= RECORD_BYTES:
            write(buffers[0] if len(buffers) == 1 else b"".join(buffers))
        else:
            for buffer in buffers:
                write(buffer)  # into memory, so always whole
        return self.flush()

    def flush(self) -> bool:
        while True:
            unsent = self._unsent
            if unsent is None:
                if not self._outgoing.pending:
                    return True
                unsent = memoryview(self._outgoing.read())
            try:
                sent = self._sock.send(unsent)
            except (BlockingIOError, InterruptedError):
                sent = 0
            self._unsent = unsent[sent:] if sent < len(unsent) else None
            if self._unsent is not None:
                return False

    def receive(self) -> Buffer | None:
        encrypted, plain = _buffers.encrypted, memoryview(_buffers.plain)
        try:
            size = self._sock.recv_into(encrypted)
        except (BlockingIOError, InterruptedError):
            return None
        if not size:
            return b""
        self._incoming.write(memoryview(encrypted)[:size])
        got = 0
        while self._incoming.pending or not got:
            try:
                read = self._ssl.read(len(plain) - got, plain[got:])  # type: ignore[arg-type]
            except ssl.SSLWantReadError:
                break
            if not read:
                return plain[:got] if got else b""
            got += int(read)
        return plain[:got] if got else None

    async def wait_readable(self) -> None:
        await trio.lowlevel.wait_readable(self._sock.fileno())

    async def wait_writable(self) -> None:
        await trio.lowlevel.wait_writable(self._sock.fileno())

    def wait_readable_blocking(self, timeout_s: float) -> None:
        wait_readable(self._sock, timeout_s)

    def fileno(self) -> int:
        return self._sock.fileno()

    def shut_down(self) -> None:
        with contextlib.suppress(OSError):  # it may be broken already
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock.fileno())
            self._sock.close()


def _create_context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3  # its default order begins with AES-GCM, which CPUs do in hardware
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([ALPN])
    return context
