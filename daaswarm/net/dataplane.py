"""The node's network over TCP: one listening port for all who dial, one pool for all that is dialled.

The first byte of an inbound connection tells who it is: 0x16 opens TLS (our own peers), 0x13 multistream (libp2p
peers), ``G`` a WebSocket's GET (browsers). The last two are spliced to the libp2p host's loopback listeners, if it
runs. So one multiaddress serves all three.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from daaswarm.errors import Busy, ConfigError, DaaswarmError, Unreachable
from daaswarm.limits import CONNECTIONS, CONNECTIONS_PER_ADDRESS, HANDSHAKE_S, HANDSHAKES_PER_ADDRESS
from daaswarm.messages import Contact
from daaswarm.net.addresses import (
    DEFAULT_LISTEN,
    Address,
    format_address,
    get_announce_addrs,
    get_host_address,
    get_origin,
    parse_address,
)
from daaswarm.net.connection import Connection
from daaswarm.net.handshake import ClientHandshake, Identity, ServerHandshake
from daaswarm.net.inbound import InboundBudget
from daaswarm.net.network import FastHandler, Handler
from daaswarm.net.pool import ConnectionPool, ShakenHands, check_peer_id, shake_hands
from daaswarm.net.scope import open_service_nursery
from daaswarm.net.splice import Splicer
from daaswarm.net.tls import TlsCarrier, TlsContexts, create_tls_contexts
from daaswarm.systems import claim_port
from daaswarm.types import PeerId

log = logging.getLogger(__name__)

BACKLOG = 128  # connections that the kernel holds until they're accepted
ACCEPT_PAUSE_S = 0.1  # when there are no file descriptors left, or the network is down
LOOKUPS = 16  # names looked up at once; threads of their own, so that hostile names can't hold up computing
LOOKUP_S = 5.0  # a resolver's own first timeout; its thread may stay in there longer, and then counts as one
TLS_BYTE = 0x16  # a TLS handshake record

LISTEN_HINTS = {
    errno.EADDRINUSE: "another program has this port; stop it, or choose another (tcp/0 picks a free one)",
    errno.EACCES: "ports below 1024 are the system's: choose a higher one",
}


class Listener:
    """A bound port. Args: ``port`` 0 picks a free one.

    Raises:
        ConfigError: the address can't be bound; it's named.
    """

    def __init__(self, address: Address) -> None:
        self._sock = _bind(address)
        host, port = self._sock.getsockname()[:2]
        self.address = get_host_address(host, port)

    async def accept(self) -> socket.socket:
        """The next connection, non-blocking."""
        while True:
            await trio.lowlevel.wait_readable(self._sock.fileno())
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                continue
            except OSError as error:
                if error.errno in (errno.EBADF, errno.EINVAL, errno.ENOTSOCK):
                    raise  # the listener itself is broken
                log.warning("cannot accept connections at %s: %s", self.address, error.strerror)
                await trio.sleep(ACCEPT_PAUSE_S)
                continue
            sock.setblocking(False)
            return sock

    def close(self) -> None:
        trio.lowlevel.notify_closing(self._sock.fileno())
        self._sock.close()


class TcpNetwork(ConnectionPool):
    """A :class:`ConnectionPool` that dials and accepts TLS over TCP. Made by :func:`open_tcp_network`.

    ``splicer`` takes the libp2p host's inner addresses once that host runs.
    """

    def __init__(
        self,
        identity: Identity,
        contexts: TlsContexts,
        nursery: trio.Nursery,
        *,
        handler: Handler,
        fast_handler: FastHandler | None,
        budget: InboundBudget | None,
    ) -> None:
        super().__init__(identity, self._dial_tcp, nursery, handler=handler, fast_handler=fast_handler, budget=budget)
        self.splicer = Splicer()
        self.listen_addresses: list[Address] = []
        self._contexts = contexts
        self._lookups = trio.CapacityLimiter(LOOKUPS)
        self._shaking: Counter[str] = Counter()  # unproven inbound connections by get_origin
        self._proven: Counter[str] = Counter()  # the others

    async def serve(self, listener: Listener) -> None:
        """Accept connections until cancelled."""
        try:
            while True:
                sock = await listener.accept()
                self._nursery.start_soon(self._serve_socket, sock)
        finally:
            listener.close()

    async def _serve_socket(self, sock: socket.socket) -> None:
        """One inbound connection up to its proof, or spliced. A peer's fault ends it and is logged in a line."""
        kept = False
        addr = "?"
        try:
            host, port = sock.getpeername()[:2]
            addr = format_address(get_host_address(host, port))
            origin = get_origin(host)
            if self._shaking[origin] >= HANDSHAKES_PER_ADDRESS or self._shaking.total() >= CONNECTIONS:
                raise Busy("too many unproven connections")
            if self._proven[origin] >= CONNECTIONS_PER_ADDRESS:
                raise Busy(f"{CONNECTIONS_PER_ADDRESS} connections of that address are open")
            self._shaking[origin] += 1
            try:
                with trio.fail_after(HANDSHAKE_S):
                    first = await _peek(sock)
                    if first == TLS_BYTE:
                        await self._accept_tls(sock, addr)
                        kept = True
            finally:
                self._shaking[origin] -= 1
                if not self._shaking[origin]:
                    del self._shaking[origin]
            if not kept:
                await self.splicer.splice(sock, first, origin)
        except trio.TooSlowError:
            log.info("refused %s: no handshake within %g s", addr, HANDSHAKE_S)
        except DaaswarmError as error:
            log.info("refused %s: %s", addr, error)
        except OSError as error:
            log.debug("%s went away: %s", addr, error)
        except Exception:  # ends this connection, and not the node
            log.exception("the inbound connection of %s failed", addr)
        finally:
            if not kept:
                _close(sock)

    async def _accept_tls(self, sock: socket.socket, addr: str) -> None:
        binding = self._contexts.binding
        carrier = TlsCarrier(sock, self._contexts.server, binding=binding, remote_addr=addr)
        await carrier.shake_hands()
        handshake = ServerHandshake(self.identity, self.contact, binding, observed_addr=addr)
        self.add(await shake_hands(carrier, handshake), is_client=False)

    async def _run(self, connection: Connection) -> None:
        if connection.is_client:
            await super()._run(connection)
            return
        origin = get_origin(parse_address(connection.remote_addr).host)
        self._proven[origin] += 1
        try:
            await super()._run(connection)
        finally:
            self._proven[origin] -= 1
            if not self._proven[origin]:
                del self._proven[origin]

    async def _dial_tcp(self, addr: str, expected: PeerId | None) -> ShakenHands:
        address = parse_address(addr)
        if expected is None:
            expected = address.peer_id
        elif address.peer_id not in (None, expected):
            raise ConfigError(f"{addr} is not an address of {expected}")
        sock = await _connect(address, addr, self._lookups)
        try:
            with trio.fail_after(HANDSHAKE_S):
                carrier = TlsCarrier(sock, self._contexts.client, remote_addr=addr)
                proven = await carrier.shake_hands()
                assert proven is not None
                check_peer_id(expected, proven, addr)
                if proven == self.peer_id:
                    raise Unreachable(f"{addr} is this node itself")
                return await shake_hands(carrier, ClientHandshake(self.identity, self.contact, carrier.binding, proven))
        except BaseException as error:
            _close(sock)
            if isinstance(error, trio.TooSlowError):
                raise Unreachable(
                    f"{addr} accepted the connection, but gave no answer within {HANDSHAKE_S:g} s",
                    hint="is it a daaswarm node?",
                ) from None
            if isinstance(error, OSError):
                raise Unreachable(f"{addr} broke off the handshake: {error}") from error
            raise


@asynccontextmanager
async def open_tcp_network(
    identity: Identity,
    *,
    handler: Handler,
    fast_handler: FastHandler | None = None,
    listen: Sequence[str] = (DEFAULT_LISTEN,),
    announce: Sequence[str] = (),
    budget: InboundBudget | None = None,
) -> AsyncIterator[TcpNetwork]:
    """A node's network, listening at ``listen``; with none it only dials, and its ``contact`` is ``None``.

    Args:
        announce: what others are told to dial instead of the bound addresses.

    Raises:
        ConfigError: an address is bad or can't be bound.
    """
    addresses = [parse_address(text) for text in listen]
    listeners: list[Listener] = []
    try:
        for address in addresses:
            listeners.append(Listener(address))
        bound = [listener.address for listener in listeners]
        contact = None
        if listeners:
            contact = Contact(peer_id=identity.peer_id, addrs=get_announce_addrs(bound, announce, identity.peer_id))
        contexts = create_tls_contexts(identity.key)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    async with open_service_nursery() as nursery:
        network = TcpNetwork(identity, contexts, nursery, handler=handler, fast_handler=fast_handler, budget=budget)
        network.contact = contact
        network.listen_addresses = bound
        for listener in listeners:
            nursery.start_soon(network.serve, listener)
        yield network


def _bind(address: Address) -> socket.socket:
    family = socket.AF_INET6 if address.protocol.endswith("6") else socket.AF_INET
    sock = None
    try:
        info = socket.getaddrinfo(address.host, address.port, family, socket.SOCK_STREAM)
        sock = socket.socket(family, socket.SOCK_STREAM)
        claim_port(sock)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(info[0][4])
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        if sock is not None:
            sock.close()
        hint = LISTEN_HINTS.get(error.errno or 0, "choose an address of this machine, or /ip4/0.0.0.0 for all it has")
        raise ConfigError(f"cannot listen at {address}: {error.strerror or error}", hint=hint) from error
    return sock


async def _look_up(address: Address, addr: str, lookups: trio.CapacityLimiter) -> tuple[Any, ...]:
    """The first of ``socket.getaddrinfo``'s answers.

    Raises:
        Unreachable: no such name, or no answer in time.
    """
    families = {"4": socket.AF_INET, "6": socket.AF_INET6}
    family = families.get(address.protocol[-1], socket.AF_UNSPEC)
    arguments = address.host, address.port, family, socket.SOCK_STREAM, 0
    found: Sequence[tuple[Any, ...]] = []
    try:
        if address.protocol.startswith("ip"):
            found = socket.getaddrinfo(*arguments, socket.AI_NUMERICHOST | socket.AI_NUMERICSERV)
        else:
            with trio.move_on_after(LOOKUP_S):
                found = await trio.to_thread.run_sync(
                    socket.getaddrinfo, *arguments, abandon_on_cancel=True, limiter=lookups
                )
    except OSError as error:
        raise Unreachable(f"{addr}: {error.strerror or error}", hint="check the host's name") from error
    except ValueError as error:  # UnicodeError: a name that can't be one
        raise Unreachable(f"{addr}: not a host's name: {error}", hint="check the host's name") from error
    if not found:
        raise Unreachable(f"{addr}: the name was not found within {LOOKUP_S:g} s", hint="check the name server")
    return found[0]


async def _connect(address: Address, addr: str, lookups: trio.CapacityLimiter) -> socket.socket:
    """A connected, non-blocking socket. The caller sets the deadline.

    Raises:
        Unreachable: unknown name, refused, no route, no file descriptor left.
    """
    family, kind, protocol, _, target = await _look_up(address, addr, lookups)
    try:
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise Unreachable(f"{addr}: {error.strerror or error}") from error
    sock.setblocking(False)
    try:
        code = sock.connect_ex(target)
        if code == errno.EINPROGRESS:
            await trio.lowlevel.wait_writable(sock.fileno())
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise Unreachable(f"{addr}: {os.strerror(code)}", hint="is the node running there, and is the port right?")
    except BaseException as error:
        _close(sock)
        if isinstance(error, OSError):
            raise Unreachable(f"{addr}: {error.strerror or error}") from error
        raise
    return sock


async def _peek(sock: socket.socket) -> int:
    """The first byte that will be read, left in place.

    Raises:
        Unreachable: hung up before sending any.
    """
    while True:
        await trio.lowlevel.wait_readable(sock.fileno())
        try:
            data = sock.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            continue
        if not data:
            raise Unreachable("hung up without a word")
        return data[0]


def _close(sock: socket.socket) -> None:
    if sock.fileno() >= 0:
        trio.lowlevel.notify_closing(sock.fileno())
        sock.close()
