"""The node's network over TCP: one listening port for all who dial, one pool for all that is dialled.

The first byte of an inbound connection tells who it is: 0x16 opens TLS (our own peers), 0xD5 one end of a circuit
(``relaying.py``), 0x13 multistream (libp2p peers), ``G`` a WebSocket's GET (browsers). The last two are spliced to the
libp2p host's loopback listeners, if it runs. So one multiaddress serves all of them.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import trio

from daaswarm.errors import Busy, ConfigError, DaaswarmError, PeerIdMismatch, Unreachable
from daaswarm.limits import CONNECTIONS, CONNECTIONS_PER_ADDRESS, DIAL_S, HANDSHAKE_S, HANDSHAKES_PER_ADDRESS
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
from daaswarm.net.circuits import encode_opening
from daaswarm.net.connection import Connection
from daaswarm.net.handshake import ClientHandshake, Identity, ServerHandshake
from daaswarm.net.inbound import InboundBudget
from daaswarm.net.meetings import Meetings
from daaswarm.net.network import FastHandler, Handler
from daaswarm.net.pool import ConnectionPool, ShakenHands, check_peer_id, shake_hands
from daaswarm.net.relaying import CIRCUIT_BYTE
from daaswarm.net.scope import open_service_nursery
from daaswarm.net.sockets import LOOKUPS, Listener, Note, close, connect, marking, peek
from daaswarm.net.splice import Splicer
from daaswarm.net.tls import TlsCarrier, TlsContexts, create_tls_contexts
from daaswarm.types import PeerId

log = logging.getLogger(__name__)

SILENT_HINT = "is the node running, and does a firewall let its port through?"
TLS_BYTE = 0x16  # a TLS handshake record


@dataclass(frozen=True)
class Dialling:
    """How a dial is done: seconds for TCP, then for TLS and the proofs; ``note`` hears of tcp, tls and handshake."""

    connect_s: float = DIAL_S
    handshake_s: float = HANDSHAKE_S
    note: Note | None = None


DIALLING = Dialling()  # the usual way


class TcpNetwork(ConnectionPool):
    """A :class:`ConnectionPool` that dials and accepts TLS over TCP. Made by :func:`open_tcp_network`.

    ``splicer`` takes the libp2p host's inner addresses once that host runs. ``direct_addrs``: where this node can be
    dialled without a relay, as far as it knows; ``get_own_addrs`` looks that up anew.
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
        self.direct_addrs: list[str] = []
        self.get_own_addrs: Callable[[], list[str]] = list
        self.meetings = Meetings(self)
        self.circuits = self.meetings.circuits
        self._contexts = contexts
        self.lookups = trio.CapacityLimiter(LOOKUPS)
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

    # -- around NATs --------------------------------------------------------------------------------------------

    def start(self, function: Callable[..., Awaitable[object]], *args: object) -> None:
        """A task that lives as long as this network."""
        self._nursery.start_soon(function, *args)

    def get_direct(self, peer_id: PeerId) -> Connection | None:
        """The live connection with a peer that leads through no relay, one that the peer dialled first."""
        found = [c for c in self._by_peer.get(peer_id, ()) if c.is_open and not c.is_relayed]
        return min(found, key=lambda connection: connection.is_client, default=None)

    def get_dialled(self, peer_id: PeerId) -> Connection | None:
        """The live connection that this node has dialled without a relay: where that leads, the peer has proven."""
        found = (c for c in self._by_peer.get(peer_id, ()) if c.is_open and c.is_client and not c.is_relayed)
        return next(found, None)

    def get_direct_host(self, peer_id: PeerId) -> str | None:
        """The IP address at which this node sees a peer; ``None`` if there is no connection."""
        connection = self.get_direct(peer_id)
        return get_host(connection) if connection is not None else None

    def note_contact(self, contact: Contact) -> None:
        """A peer's addresses changed."""
        for connection in self._by_peer.get(PeerId(contact.peer_id), ()):
            connection.peer = replace(connection.peer, contact=contact)

    async def dial_directly(self, contact: Contact) -> ShakenHands:
        """A connection of its own that isn't in the pool, though there may be others with the peer already."""
        hands = await self._dial_any(contact)
        assert hands is not None  # none of the addresses leads through a relay
        return hands

    async def dial_through(self, door: Address, token: bytes, addr: str, expected: PeerId) -> ShakenHands:
        """The asker's end of a circuit. ``door``: where the relay has proven to be. Raises as ``connect`` does."""
        sock = None
        with trio.move_on_after(DIAL_S):
            sock = await self._open_circuit(door, token)
        if sock is None:
            raise Unreachable(f"no answer from {door} within {DIAL_S:g} s", hint=SILENT_HINT)
        return await self._prove_server(sock, addr, expected)

    async def accept_through(self, door: Address, token: bytes, addr: str, expected: PeerId) -> None:
        """The target's end of a circuit, up to a connection. ``door``: where the relay has proven to be.

        Raises:
            TooSlowError: the asker doesn't come.
        """
        with trio.fail_after(DIAL_S):
            sock = await self._open_circuit(door, token)
            try:
                await self._accept_tls(sock, addr, expected)
            except BaseException:
                close(sock)
                raise

    async def _open_circuit(self, door: Address, token: bytes) -> socket.socket:
        sock = await connect(door, str(door), self.lookups)
        try:
            opening = encode_opening(token)
            if sock.send(opening) != len(opening):  # 33 bytes into an empty buffer
                raise Unreachable(f"{door} takes nothing")
        except BaseException as error:
            close(sock)
            if isinstance(error, OSError):
                raise Unreachable(f"{door}: {error.strerror or error}") from error
            raise
        return sock

    # -- connections --------------------------------------------------------------------------------------------

    async def _serve_socket(self, sock: socket.socket) -> None:
        """One inbound connection up to its proof, or spliced. A peer's fault ends it and is logged in a line."""
        kept = False
        token: bytes | None = None
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
                    first = await peek(sock)
                    if first == TLS_BYTE:
                        await self._accept_tls(sock, addr)
                        kept = True
                    elif first == CIRCUIT_BYTE:
                        token = await self.meetings.relay.read_token(sock)
            finally:
                self._shaking[origin] -= 1
                if not self._shaking[origin]:
                    del self._shaking[origin]
            if token is not None:
                await self.meetings.relay.serve(sock, token)
            elif not kept:
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
                close(sock)

    async def _accept_tls(self, sock: socket.socket, addr: str, expected: PeerId | None = None) -> None:
        binding = self._contexts.binding
        carrier = TlsCarrier(sock, self._contexts.server, binding=binding, remote_addr=addr)
        await carrier.shake_hands()
        handshake = ServerHandshake(self.identity, self.contact, binding, observed_addr=addr)
        hands = await shake_hands(carrier, handshake)
        if expected not in (None, hands.peer.peer_id):
            raise PeerIdMismatch(f"{hands.peer.peer_id} came through the relay, not {expected}")
        self.add(hands, is_client=False)

    async def _run(self, connection: Connection) -> None:
        if connection.is_client or connection.is_relayed:  # the relay's limits bound the latter
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

    async def dial_anew(self, addr: str, dialling: Dialling = DIALLING) -> Connection:
        """One more connection with whoever is at ``addr``, without a relay; raises as ``connect_addr`` does."""
        hands = await self._dial_tcp(addr, None, dialling)
        assert hands is not None
        return self.add(hands, is_client=True)

    async def _dial_tcp(
        self,
        addr: str,
        expected: PeerId | None,
        dialling: Dialling | None = None,
    ) -> ShakenHands | None:
        dialling = dialling or DIALLING
        address = parse_address(addr)
        if expected is None:
            expected = address.peer_id
        elif address.peer_id not in (None, expected):
            raise ConfigError(f"{addr} is not an address of {expected}")
        if address.relay is not None:
            return await self.circuits.dial(address, addr)
        sock = None
        with marking("tcp", dialling.note):
            with trio.move_on_after(dialling.connect_s):
                sock = await connect(address, addr, self.lookups)
            if sock is None:
                raise Unreachable(f"no answer from {addr} within {dialling.connect_s:g} s", hint=SILENT_HINT)
        return await self._prove_server(sock, addr, expected, dialling)

    async def _prove_server(
        self, sock: socket.socket, addr: str, expected: PeerId | None, dialling: Dialling | None = None
    ) -> ShakenHands:
        """The client's side of both handshakes. Closes the socket if they fail."""
        dialling = dialling or DIALLING
        step, what = "tls", "accepted the connection"
        try:
            host, port = sock.getpeername()[:2]
            reached_at = str(get_host_address(host, port, expected))
            with trio.fail_after(dialling.handshake_s):
                with marking("tls", dialling.note):
                    carrier = TlsCarrier(sock, self._contexts.client, remote_addr=addr)
                    proven = await carrier.shake_hands()
                assert proven is not None
                with marking("peer id"):
                    check_peer_id(expected, proven, addr)
                    if proven == self.peer_id:
                        raise Unreachable(f"{addr} is this node itself", hint="give the address of another node")
                step, what = "handshake", "speaks TLS as daaswarm does"
                with marking("handshake", dialling.note):
                    handshake = ClientHandshake(self.identity, self.contact, carrier.binding, proven)
                    hands = await shake_hands(carrier, handshake)
                    return replace(hands, peer=replace(hands.peer, reached_at=reached_at))
        except BaseException as error:
            close(sock)
            if isinstance(error, trio.TooSlowError):
                with marking(step):
                    raise Unreachable(
                        f"{addr} {what}, but gave no answer within {dialling.handshake_s:g} s",
                        hint="is it a daaswarm node, and not overloaded?",
                    ) from None
            if isinstance(error, OSError):
                with marking(step):
                    raise Unreachable(f"{addr} broke off the handshake: {error}") from error
            if isinstance(error, Exception) and not isinstance(error, DaaswarmError):
                log.exception("the handshake with %s failed", addr)  # a bug of ours that its answer brought to light
                with marking(step):
                    raise Unreachable(f"{addr}: internal error; the log has the details") from error
            raise


def get_host(connection: Connection) -> str:
    """The IP address at the other end, whatever name led to it."""
    return parse_address(connection.peer.reached_at or connection.remote_addr).host


@asynccontextmanager
async def open_tcp_network(
    identity: Identity,
    *,
    handler: Handler,
    fast_handler: FastHandler | None = None,
    listen: Sequence[str] = (DEFAULT_LISTEN,),
    announce: Sequence[str] = (),
    interfaces: Sequence[str] = (),
    budget: InboundBudget | None = None,
) -> AsyncIterator[TcpNetwork]:
    """A node's network, listening at ``listen``; with none it only dials, and its ``contact`` is ``None``.

    Args:
        announce: what others are told to dial instead of the bound addresses.
        interfaces: names or patterns of those whose addresses others are told, where it listens on all.

    Raises:
        ConfigError: an address is bad or can't be bound.
    """
    addresses = [parse_address(text) for text in listen]
    listeners: list[Listener] = []
    try:
        for address in addresses:
            listeners.append(Listener(address))
        bound = [listener.address for listener in listeners]

        def get_own_addrs() -> list[str]:
            return get_announce_addrs(bound, announce, identity.peer_id, interfaces) if bound else []

        direct = get_own_addrs()
        contact = Contact(peer_id=identity.peer_id, addrs=direct) if bound else None
        contexts = create_tls_contexts(identity.key)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    async with open_service_nursery() as nursery:
        network = TcpNetwork(identity, contexts, nursery, handler=handler, fast_handler=fast_handler, budget=budget)
        network.contact = contact
        network.listen_addresses = bound
        network.direct_addrs, network.get_own_addrs = direct, get_own_addrs
        for listener in listeners:
            nursery.start_soon(network.serve, listener)
        yield network
