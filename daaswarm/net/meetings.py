"""What peers ask of each other to find ways around NATs and firewalls: one place for all of a node's parts in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from daaswarm.errors import RemoteProtocolError
from daaswarm.messages import Arranged, CheckReach, Invite, Meet, Meeting, Moved, Pong, Reached, Reserve, Reserved
from daaswarm.net.circuits import Circuits
from daaswarm.net.dialling_back import DialBack
from daaswarm.net.relaying import Relay
from daaswarm.types import PeerId

if TYPE_CHECKING:
    from daaswarm.net.dataplane import TcpNetwork


class Meetings:
    """One node's parts: ``relay`` for others, ``circuits`` for itself, and dialling back."""

    def __init__(self, network: TcpNetwork) -> None:
        self.relay = Relay(network)
        self.circuits = Circuits(network)
        self._dial_back = DialBack(network)
        self._network = network

    async def answer(self, peer: PeerId, message: Meeting) -> Reached | Reserved | Arranged | Pong:
        """The reply to a peer's request."""
        if isinstance(message, CheckReach):
            return await self._dial_back.answer(peer, message)
        if isinstance(message, Reserve):
            return self.relay.reserve(peer)
        if isinstance(message, Meet):
            return await self.relay.meet(peer, message)
        if isinstance(message, Invite):
            return await self.circuits.answer(peer, message)
        assert isinstance(message, Moved)
        if message.contact.peer_id != peer:
            raise RemoteProtocolError(f"{peer} gave another peer's contact as its own")
        self._network.note_contact(message.contact)
        return Pong()
