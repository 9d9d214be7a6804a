"""What a network is to the rest of the node: calls out, calls in. TCP (``dataplane.py``) and memory (``memory.py``)."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

import trio

from daaswarm.errors import DaaswarmError
from daaswarm.messages import Contact, Reply, Request
from daaswarm.net.frames import Buffer
from daaswarm.net.links import SharedLinks
from daaswarm.net.pending import PendingCall
from daaswarm.types import PeerId

logger = logging.getLogger(__name__)

Answer = tuple[Reply, Sequence[Buffer]]
"""A reply and the parts of its body, which must not change any more: they may be written later."""

Handler = Callable[[PeerId, Contact | None, Request, memoryview, float], Awaitable[Answer]]
"""``(peer, its contact if it can be dialled, request, body, deadline_s)`` → (reply, body parts). Raise a
``DaaswarmError`` to refuse; it keeps its name across the wire. Cancelled when the deadline passes, or the peer gives up
or is gone."""

FastHandler = Callable[[PeerId, Request, memoryview, float], Answer | None]
"""``(peer, request, body, deadline_s)``. Tried first, in trio's thread, without a task; ``None`` sends the request the
:data:`Handler`'s way. When many requests arrive at once it isn't asked for all of them, so the handler must be able to
serve everything."""


class Network(Protocol):
    """One node's calls to others. All methods are for trio's thread, except :meth:`submit`."""

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def contact(self) -> Contact | None:
        """Own dialable addresses; ``None`` for a node that only dials."""
        ...

    @property
    def links(self) -> SharedLinks:
        """How far peers are, as calls told. :meth:`call` notes its own; whoever uses :meth:`submit` notes those."""
        ...

    async def connect(self, contact: Contact) -> PeerId:
        """Make sure there is a connection; the PeerId that was proven.

        Raises:
            Unreachable: no address answered as daaswarm in time.
            PeerIdMismatch: another peer answered.
            RemoteProtocolError: it's another swarm, another version, or not daaswarm.
        """
        ...

    async def connect_addr(self, addr: str) -> Contact:
        """Like :meth:`connect` for one multiaddress, with or without ``/p2p/ID``; whoever was proven there."""
        ...

    async def call(
        self, contact: Contact, message: Request, body: Sequence[Buffer] = (), *, deadline_s: float
    ) -> tuple[Reply, memoryview]:
        """Connect if need be, call, and wait. Never returns a ``Failure``: that is raised as the error it names.

        Raises:
            Unreachable: no connection could be made.
            ConnectionLost: it ended before the answer.
            DeadlineExceeded: no answer within ``deadline_s``.
            Busy, ExpertError, ...: what the peer answered.
        """
        ...

    def submit(
        self, contact: Contact, message: Request, body: Sequence[Buffer] = (), *, deadline_s: float
    ) -> PendingCall:
        """Write a call to the live connection from a worker thread; then ``PendingCall.wait()``. Thread-safe.

        Raises:
            Unreachable: there is no live connection; :meth:`connect` first.
        """
        ...

    def is_connected(self, peer_id: PeerId) -> bool:
        """Thread-safe."""
        ...

    async def disconnect(self, peer_id: PeerId, reason: str) -> None:
        """End the connections to a peer (banned, or no longer wanted)."""
        ...


async def connect_all(network: Network, contacts: Iterable[Contact]) -> None:
    """Have a live connection to each of them but this node itself; who can't be reached is logged."""

    async def connect(contact: Contact) -> None:
        try:
            await network.connect(contact)
        except DaaswarmError as error:
            logger.info("host %s: %s", contact.peer_id, error)

    async with trio.open_nursery() as nursery:
        for contact in contacts:
            if contact.peer_id != network.peer_id:
                nursery.start_soon(connect, contact)
