"""Parts of py-libp2p that strangers could abuse, replaced by ones that they can't.

Its yamux doesn't enforce the receive windows that it announces (a stranger could fill the memory through one stream
that nobody reads), nor the number of streams that a peer opens (each costs a task). Its connection manager dials
whatever addresses strangers name, to fill a quota. Imports libp2p, which takes a second: import it late.
"""

from __future__ import annotations

import struct

import trio
from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.custom_types import TProtocol
from libp2p.network.auto_connector import AutoConnector
from libp2p.peer.id import ID
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import FLAG_ACK, HEADER_SIZE, PROTOCOL_ID, YAMUX_HEADER_FORMAT, Yamux

from daaswarm.limits import MIB

UNREAD_BYTES = 4 * MIB  # of all streams of one connection; 8 honest ones, each with its whole window (512 KiB) unread
STREAMS_PER_CONNECTION = 32  # open at once: four of ours at most, and libp2p's own (identify, ping) for a moment
NO_ROUND_TRIP_S = 1e-9  # yamux doubles windows, up to 16 MiB, of streams that fill theirs within four round trips


class NeverConnector(AutoConnector):
    """Takes the place of the connection manager's dialler, and never starts: the data plane dials, not the door."""

    async def start(self) -> None:
        pass


class BoundedMuxer(MuxerMultistream):
    """Agrees with every peer on bounded yamux, and on nothing else: mplex has no flow control at all."""

    def __init__(self) -> None:
        super().__init__({TProtocol(PROTOCOL_ID): BoundedYamux})

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        # The parent makes a Yamux whenever that protocol was agreed on, whatever class was registered for it.
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        return self._annotate_connection(BoundedYamux(conn, peer_id, conn.is_initiator), conn, protocol)


class BoundedYamux(Yamux):
    """One connection with a libp2p peer; a peer that exceeds a limit loses it."""

    def rtt(self) -> float:
        return NO_ROUND_TRIP_S  # so windows double once and then stay

    async def abort(self) -> None:
        """End the connection at once, without a goodbye: the peer doesn't read, or its bytes are out of step."""
        await self._cleanup_on_error()

    # The two places that handle_incoming passes through. It takes TooSlowError, and nothing else, from each of them
    # as a reason to end the connection.

    async def _read_data_body(self, length: int) -> bytes:
        if sum(map(len, self.stream_buffers.values())) + length > UNREAD_BYTES:
            raise trio.TooSlowError
        return await super()._read_data_body(length)

    async def _write_frame(self, data: bytes) -> None:
        if len(self.streams) > STREAMS_PER_CONNECTION:
            _, _, flags, _, _ = struct.unpack_from(YAMUX_HEADER_FORMAT, data[:HEADER_SIZE])
            if flags & FLAG_ACK:  # the answer to a stream that the peer has just opened
                raise trio.TooSlowError
        await super()._write_frame(data)
