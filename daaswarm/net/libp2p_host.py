"""The door for libp2p peers and browsers: a py-libp2p host with this node's key.

It listens on loopback only; ``dataplane.py`` splices to it who speaks libp2p at the node's one public port. A stream of
``/daaswarm/1/<swarm>`` carries the same frames as between nodes, without our handshake: noise has proven the PeerId
already, and a peer of another swarm finds no protocol to speak. It proves no swarm key, so a node of a private swarm
runs no such host.
py-libp2p's traps are kept in here and in ``libp2p_guards.py``: an exception that leaves a handler ends the host, a
cancelled write poisons the connection, and nothing limits what is received unread.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

from daaswarm.core.allow_list import AllowList
from daaswarm.errors import ConfigError, ConnectionLost, DaaswarmError, NotAllowed
from daaswarm.limits import CONNECTIONS_PER_PEER, WRITE_STALL_S
from daaswarm.messages import PROTOCOL_VERSION, Contact, Request
from daaswarm.net.addresses import parse_address
from daaswarm.net.carrier import MemoryCarrier, open_memory_pair
from daaswarm.net.connection import Connection
from daaswarm.net.handshake import Identity, ProvenPeer
from daaswarm.net.inbound import InboundBudget
from daaswarm.net.network import Answer, FastHandler, Handler
from daaswarm.net.splice import HTTP_BYTE, MULTISTREAM_BYTE
from daaswarm.types import PeerId

if TYPE_CHECKING:
    from libp2p.abc import INetStream

log = logging.getLogger(__name__)

MAX_STREAMS = 256  # open streams of all libp2p peers together
READ_BYTES = 64 * 1024  # asked of a stream at once
CLOSE_S = 1.0  # for what a peer is sent at the end; it may not read, and a node that leaves must not wait for it

_MODULES = ("libp2p", "libp2p.crypto.ed25519", "libp2p.exceptions", "daaswarm.net.libp2p_guards")


def get_protocol(swarm: bytes) -> str:
    """The stream protocol of a swarm (32 bytes). Like our handshake, it keeps swarms apart; it is no secret."""
    return f"/daaswarm/{PROTOCOL_VERSION}/{swarm.hex()}"


@dataclass
class Libp2pHost:
    """A running host. ``targets``: first byte → inner (host, port), for ``Splicer.targets``."""

    peer_id: PeerId
    host: Any
    targets: dict[int, tuple[str, int]] = field(default_factory=dict)


@asynccontextmanager
async def open_libp2p_host(
    identity: Identity,
    *,
    handler: Handler,
    fast_handler: FastHandler | None = None,
    budget: InboundBudget | None = None,
) -> AsyncIterator[Libp2pHost]:
    """Run a libp2p host with TCP (noise, yamux) and WebSocket listeners on loopback ports.

    Raises:
        ConfigError: it can't listen.
    """
    for name in _MODULES:  # a second of imports: in a thread, so that the loop goes on
        await trio.to_thread.run_sync(importlib.import_module, name)
    import libp2p
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.custom_types import TProtocol
    from multiaddr import Multiaddr

    from daaswarm.net.libp2p_guards import BoundedMuxer, NeverConnector

    # A stranger's garbage makes libp2p log tracebacks; what matters is logged here, in a line.
    libp2p_log = logging.getLogger("libp2p")
    if libp2p_log.level in (logging.NOTSET, logging.WARNING):  # WARNING is what its import sets
        libp2p_log.setLevel(logging.CRITICAL)
    listen = [Multiaddr("/ip4/127.0.0.1/tcp/0"), Multiaddr("/ip4/127.0.0.1/tcp/0/ws")]
    host = libp2p.new_host(
        key_pair=create_new_key_pair(bytes(identity.key)),
        enable_websocket=True,
        disable_identify_address_discovery=True,
    )
    swarm: Any = host.get_network()
    swarm.upgrader.muxer_multistream = BoundedMuxer()
    swarm.auto_connector = NeverConnector(swarm)
    if str(host.get_id()) != identity.peer_id:
        raise ConfigError(f"libp2p derived the PeerId {host.get_id()} from the key of {identity.peer_id}")
    door = _Door(handler, fast_handler, budget or InboundBudget(), identity.allowed)
    host.set_stream_handler(TProtocol(get_protocol(identity.swarm)), door.serve)
    failure: Exception | None = None
    # Shielded while it starts: cancelled between opening a socket and listening, libp2p leaves that socket open.
    with trio.CancelScope(shield=True) as starting:
        async with host.run(listen_addrs=listen):
            starting.shield = False
            running = Libp2pHost(identity.peer_id, host)
            for addr in host.get_addrs():
                text = str(addr).partition("/p2p/")[0]
                is_websocket = text.endswith("/ws")
                inner = parse_address(text.removesuffix("/ws"))
                running.targets[HTTP_BYTE if is_websocket else MULTISTREAM_BYTE] = (inner.host, inner.port)
            if MULTISTREAM_BYTE not in running.targets:
                raise ConfigError("the libp2p host could not listen on 127.0.0.1")
            try:
                yield running
            except Exception as error:  # noqa: BLE001 - raised again below, where libp2p's nursery can't wrap it
                failure = error
            finally:
                with trio.move_on_after(CLOSE_S, shield=True):  # pyright: ignore[reportCallIssue] - wrong third-party stubs
                    for listener in swarm.listeners.values():  # libp2p leaves their sockets open
                        await listener.close()
    if failure is not None:
        raise failure


class _Door:
    """Serves streams; nothing that a stream does may raise out of :meth:`serve`."""

    def __init__(
        self, handler: Handler, fast_handler: FastHandler | None, budget: InboundBudget, allowed: AllowList
    ) -> None:
        self._allowed = allowed
        self._handler = handler
        self._fast_handler = fast_handler
        self._budget = budget
        self._streams: Counter[PeerId] = Counter()

    async def serve(self, stream: INetStream) -> None:
        peer_id = PeerId(str(stream.muxed_conn.peer_id))
        if not self._allowed.admits(peer_id):
            log.info("refused a libp2p stream of %s: not on the allow-list", peer_id)
            await _reset(stream)
            return
        if self._streams.total() >= MAX_STREAMS or self._streams[peer_id] >= CONNECTIONS_PER_PEER:
            log.info("refused a libp2p stream of %s: too many are open", peer_id)
            await _reset(stream)
            return
        self._streams[peer_id] += 1
        try:
            await self._serve(stream, peer_id)
        except DaaswarmError as error:
            log.info("libp2p stream of %s ended: %s", peer_id, error)
        except Exception:
            # Whatever leaves this function ends the host, and with it every other libp2p peer.
            log.exception("serving a libp2p stream of %s failed", peer_id)
        finally:
            self._streams[peer_id] -= 1
            if not self._streams[peer_id]:
                del self._streams[peer_id]
            with trio.CancelScope(shield=True):  # pyright: ignore[reportCallIssue] - wrong third-party stubs
                await _reset(stream)

    async def _serve(self, stream: INetStream, peer_id: PeerId) -> None:
        outer, inner = open_memory_pair(os.urandom(32), client_addr=f"/libp2p/{peer_id}")

        def check() -> None:
            """The list may have changed since the stream was opened."""
            try:
                self._allowed.check(peer_id)
            except NotAllowed as error:
                connection.close(error)
                raise

        async def handle(
            peer: PeerId, contact: Contact | None, message: Request, body: memoryview, deadline_s: float
        ) -> Answer:
            check()
            return await self._handler(peer, contact, message, body, deadline_s)

        def handle_inline(peer: PeerId, message: Request, body: memoryview, deadline_s: float) -> Answer | None:
            check()
            return self._fast_handler(peer, message, body, deadline_s) if self._fast_handler is not None else None

        connection = Connection(
            inner,
            ProvenPeer(peer_id),
            is_client=False,
            budget=self._budget,
            handler=handle,
            fast_handler=handle_inline,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_pump_in, stream, outer)
            nursery.start_soon(_pump_out, stream, outer, connection)
            await connection.run()
            nursery.cancel_scope.cancel()


async def _pump_in(stream: INetStream, outer: MemoryCarrier) -> None:
    """Stream → session, as fast as the session takes it and no faster."""
    from libp2p.exceptions import BaseLibp2pError

    try:
        while data := await stream.read(READ_BYTES):
            done = outer.send([data])
            while not done:
                await outer.wait_writable()
                done = outer.flush()
    except (BaseLibp2pError, OSError, ValueError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
        log.debug("libp2p stream ended: %s", error)
    outer.shut_down()


async def _pump_out(stream: INetStream, outer: MemoryCarrier, connection: Connection) -> None:
    """Session → stream. A write is cancelled only when it stalls, since that poisons the libp2p connection."""
    from libp2p.exceptions import BaseLibp2pError

    try:
        while True:
            data = outer.receive()
            if data is None:
                await outer.wait_readable()
                continue
            if not data:
                return
            with trio.CancelScope(shield=True):  # pyright: ignore[reportCallIssue] - wrong third-party stubs
                with trio.fail_after(WRITE_STALL_S):
                    await stream.write(bytes(data))
    except trio.TooSlowError:
        connection.close(ConnectionLost(f"the peer has read nothing for {WRITE_STALL_S:g} s"))
        await _abort(stream)
    except (BaseLibp2pError, OSError, ValueError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
        connection.close(ConnectionLost(f"libp2p could not write: {error}"))


async def _reset(stream: INetStream) -> None:
    from libp2p.exceptions import BaseLibp2pError

    with trio.move_on_after(CLOSE_S) as scope:
        try:
            await stream.reset()
        except (BaseLibp2pError, OSError, ValueError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            log.debug("resetting a libp2p stream failed: %s", error)
    if scope.cancelled_caught:
        await _abort(stream)


async def _abort(stream: INetStream) -> None:
    """End the connection that ``stream`` is one of."""
    from daaswarm.net.libp2p_guards import BoundedYamux

    muxer = stream.muxed_conn
    assert isinstance(muxer, BoundedYamux)
    with trio.move_on_after(CLOSE_S, shield=True):  # pyright: ignore[reportCallIssue] - wrong third-party stubs
        await muxer.abort()
