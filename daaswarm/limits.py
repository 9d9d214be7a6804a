"""Every limit of the wire and the node, with its unit and its reason. Over one: refused by name, never silently."""

from __future__ import annotations

KIB, MIB = 1024, 1024 * 1024

CONTROL_BYTES = 1 * MIB  # a frame's header; adverts with bitmaps fit in 16 KiB
CHUNK_BYTES = 256 * KIB  # a frame's body; larger bodies travel in chunks, so that they can't starve a small call
CALL_BODY_BYTES = 256 * MIB  # a call's whole body: 4,096 rows x 16,384 x f32
WINDOW_BYTES = 4 * MIB  # of a call's body may be sent before the receiver grants more
INBOUND_BYTES = 512 * MIB  # all unfinished bodies of a node together; past it no window is granted
INBOUND_BYTES_PER_PEER = 64 * MIB  # one peer's part of that; four such peers fill the half that is shared

CALLS_PER_PEER = 256  # in flight on one connection
CALLS_PER_HOST = 4_096  # in flight on one node
CONNECTIONS_PER_PEER = 4  # one is enough; more only while they are being replaced
CONNECTIONS = 1_024  # file descriptors
CONNECTIONS_PER_ADDRESS = 256  # inbound ones of one IP address, or IPv6 /64: PeerIds cost nothing, addresses do
HANDSHAKES_PER_ADDRESS = 32  # unproven connections of one IP address at once

HANDSHAKE_S = 5.0  # TLS and both proofs; a silent listener must not hold a dialer
DIAL_S = 10.0  # all addresses of a peer together, handshakes included
CALL_S = 30.0  # the longest deadline that a call may carry
WRITE_STALL_S = 10.0  # a peer that doesn't read ends its connection
IDLE_PING_S = 20.0  # silence after which a connection is pinged

RECORD_BYTES = 4 * KIB  # a DHT record is a signed pointer, not a payload
RECORDS = 65_536  # per node
RECORDS_PER_KEY = 64  # publishers of one key; one Found message carries them all
GOSSIP_BYTES = 16 * KIB  # a gossiped message, so also an advert; 64 KiB was the largest that arrived
