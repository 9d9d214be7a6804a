"""An in-memory network: many nodes in one process, under the same sessions and connections as over TCP.

For tests and simulations of a swarm: :class:`MemoryHub` also drops, kills and partitions.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import trio

from daaswarm.errors import DaaswarmError, Unreachable
from daaswarm.limits import HANDSHAKE_S
from daaswarm.messages import Contact
from daaswarm.net.carrier import MemoryCarrier, open_memory_pair
from daaswarm.net.handshake import ClientHandshake, Identity, ServerHandshake
from daaswarm.net.inbound import InboundBudget
from daaswarm.net.network import FastHandler, Handler
from daaswarm.net.pool import ConnectionPool, ShakenHands, check_peer_id, shake_hands
from daaswarm.net.scope import open_service_nursery
from daaswarm.types import PeerId


class MemoryHub:
    """The wires between nodes of one process, and the ways to cut them."""

    def __init__(self) -> None:
        self._nodes: dict[str, tuple[ConnectionPool, trio.Nursery]] = {}  # by address
        self._killed: set[PeerId] = set()
        self._sides: list[frozenset[PeerId]] = []
        self._wires: list[tuple[PeerId, PeerId, MemoryCarrier, MemoryCarrier]] = []

    @asynccontextmanager
    async def open_node(
        self,
        identity: Identity,
        *,
        handler: Handler,
        fast_handler: FastHandler | None = None,
        dialable: bool = True,
        budget: InboundBudget | None = None,
    ) -> AsyncIterator[ConnectionPool]:
        """One node's network. ``dialable=False``: a node that only dials (no contact)."""
        peer_id = identity.peer_id
        addr = f"/memory/{peer_id}"

        async def dial(target: str, expected: PeerId | None) -> ShakenHands:
            return await self._dial(pool, target, expected)

        async with open_service_nursery() as nursery:
            pool = ConnectionPool(identity, dial, nursery, handler=handler, fast_handler=fast_handler, budget=budget)
            if dialable:
                pool.contact = Contact(peer_id=peer_id, addrs=[addr])
                self._nodes[addr] = (pool, nursery)
            try:
                yield pool
            finally:
                self._nodes.pop(addr, None)

    def kill(self, peer_id: PeerId) -> None:
        """End the node's connections and refuse new ones, as if its process had died."""
        self._killed.add(peer_id)
        self.drop_connections(peer_id)

    def revive(self, peer_id: PeerId) -> None:
        self._killed.discard(peer_id)

    def drop_connections(self, peer_id: PeerId, other: PeerId | None = None) -> None:
        """End the connections of one peer, or those between two; they may be made again."""
        for client, server, up, _ in self._wires:
            if peer_id in (client, server) and (other is None or other in (client, server)):
                up.shut_down()
        self._forget_closed()

    def partition(self, *sides: Iterable[PeerId]) -> None:
        """Nothing passes between the sides any more, silently, as if a cable were pulled. Peers in none stay whole."""
        self._sides = [frozenset(side) for side in sides]
        self._hold()

    def heal(self) -> None:
        """End the partition; what was held arrives."""
        self._sides = []
        self._hold()

    def _are_apart(self, a: PeerId, b: PeerId) -> bool:
        side_a = [side for side in self._sides if a in side]
        side_b = [side for side in self._sides if b in side]
        return bool(side_a and side_b and side_a != side_b)

    def _hold(self) -> None:
        self._forget_closed()
        for client, server, up, _ in self._wires:
            apart = self._are_apart(client, server)
            up.inbound.hold(apart)
            up.outbound.hold(apart)

    def _forget_closed(self) -> None:
        self._wires = [wire for wire in self._wires if not wire[2].inbound.closed]

    async def _dial(self, pool: ConnectionPool, addr: str, expected: PeerId | None) -> ShakenHands:
        await trio.lowlevel.checkpoint()
        found = self._nodes.get(addr)
        if found is None or found[0].peer_id in self._killed or pool.peer_id in self._killed:
            raise Unreachable(f"{addr} refused the connection", hint="is the node running?")
        server, nursery = found
        binding = secrets.token_bytes(32)
        up, down = open_memory_pair(binding, client_addr=f"/memory/{pool.peer_id}", server_addr=addr)
        self._forget_closed()
        self._wires.append((pool.peer_id, server.peer_id, up, down))
        if self._are_apart(pool.peer_id, server.peer_id):
            up.inbound.hold(True)
            up.outbound.hold(True)
        try:
            nursery.start_soon(self._accept, server, down)
            check_peer_id(expected, server.peer_id, addr)
            return await shake_hands(up, ClientHandshake(pool.identity, pool.contact, binding, server.peer_id))
        except BaseException as error:
            up.close()
            if isinstance(error, OSError):
                raise Unreachable(f"{addr} hung up during the handshake") from error
            raise

    async def _accept(self, pool: ConnectionPool, carrier: MemoryCarrier) -> None:
        hands = None
        try:
            with trio.move_on_after(HANDSHAKE_S):
                hands = await shake_hands(
                    carrier,
                    ServerHandshake(pool.identity, pool.contact, carrier.binding, observed_addr=carrier.remote_addr),
                )
                pool.add(hands, is_client=False)
        except (DaaswarmError, OSError):
            hands = None  # the client learned why
        finally:
            if hands is None:
                carrier.close()
