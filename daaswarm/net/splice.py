"""Inbound connections of libp2p peers and browsers, passed byte by byte to the libp2p host's loopback listeners."""

from __future__ import annotations

import logging
import socket
from collections import Counter

import trio

from daaswarm.errors import Busy, RemoteProtocolError, Unreachable
from daaswarm.limits import HANDSHAKES_PER_ADDRESS

log = logging.getLogger(__name__)

MAX_SPLICES = 128  # each costs four file descriptors and a libp2p connection of 60 KB
SPLICES_PER_ADDRESS = HANDSHAKES_PER_ADDRESS  # which of them are proven only libp2p knows, so all count
SPLICE_IDLE_S = 120.0  # libp2p's own keep-alive is well below
CONNECT_S = 5.0  # to our own loopback
SETTLE_S = 20.0  # that a connection waits for the libp2p host to start
COPY_BYTES = 64 * 1024  # read at once

MULTISTREAM_BYTE = 0x13  # the length of "/multistream/1.0.0\n"
HTTP_BYTE = ord("G")  # a WebSocket begins with GET


class Splicer:
    """``targets``: first byte → (host, port) of an inner listener. Empty while no libp2p host runs. ``settled``: one
    runs, or won't; whoever starts one puts an event here that isn't set yet, and who comes before that waits.
    """

    def __init__(self) -> None:
        self.targets: dict[int, tuple[str, int]] = {}
        self.settled = trio.Event()
        self.settled.set()
        self._by_origin: Counter[str] = Counter()  # open splices

    async def splice(self, sock: socket.socket, first: int, origin: str) -> None:
        """Copy both ways until either end closes, or both are idle. Leaves ``sock`` to the caller to close.

        Raises:
            RemoteProtocolError: nothing here understands what begins with ``first``.
            Busy: too many splices, of all or of this origin (see ``get_origin``).
            Unreachable: the inner listener is gone.
        """
        if first not in (MULTISTREAM_BYTE, HTTP_BYTE) or (self.settled.is_set() and first not in self.targets):
            raise RemoteProtocolError(f"speaks neither TLS nor libp2p (first byte 0x{first:02x})")
        if self._by_origin.total() >= MAX_SPLICES:
            raise Busy(f"{MAX_SPLICES} libp2p connections are open")
        if self._by_origin[origin] >= SPLICES_PER_ADDRESS:
            raise Busy(f"{SPLICES_PER_ADDRESS} libp2p connections of one address are open")
        self._by_origin[origin] += 1
        try:
            if first not in self.targets:
                with trio.move_on_after(SETTLE_S):
                    await self.settled.wait()
            target = self.targets.get(first)
            if target is None:
                raise Unreachable("libp2p doesn't run here")
            outer = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
            try:
                with trio.fail_after(CONNECT_S):
                    inner = await trio.open_tcp_stream(*target)
            except (OSError, trio.TooSlowError) as error:
                raise Unreachable("the libp2p host does not answer") from error
            async with inner:
                await _copy_both(outer, inner)
        finally:
            self._by_origin[origin] -= 1
            if not self._by_origin[origin]:
                del self._by_origin[origin]


async def _copy_both(a: trio.SocketStream, b: trio.SocketStream) -> None:
    with trio.move_on_after(SPLICE_IDLE_S) as scope:
        async with trio.open_nursery() as nursery:

            async def copy(source: trio.SocketStream, target: trio.SocketStream) -> None:
                try:
                    while data := await source.receive_some(COPY_BYTES):
                        scope.deadline = trio.current_time() + SPLICE_IDLE_S
                        await target.send_all(data)
                    await target.send_eof()
                except trio.BrokenResourceError:
                    scope.cancel()

            nursery.start_soon(copy, a, b)
            nursery.start_soon(copy, b, a)
