"""The connections of one node: dialled once per peer, used both ways, bounded in number."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import trio

from daaswarm.errors import (
    Busy,
    ConfigError,
    ConnectionLost,
    DaaswarmError,
    DeadlineExceeded,
    LocalProtocolError,
    PeerIdMismatch,
    RemoteProtocolError,
    Unreachable,
)
from daaswarm.limits import CALL_S, CONNECTIONS, CONNECTIONS_PER_PEER, DIAL_S
from daaswarm.messages import Contact, Reply, Request
from daaswarm.net.carrier import Carrier
from daaswarm.net.connection import Connection
from daaswarm.net.frames import Buffer, FrameParser
from daaswarm.net.handshake import ClientHandshake, Identity, ProvenPeer, ServerHandshake
from daaswarm.net.inbound import InboundBudget
from daaswarm.net.links import SharedLinks
from daaswarm.net.network import FastHandler, Handler
from daaswarm.net.pending import PendingCall
from daaswarm.types import PeerId

log = logging.getLogger(__name__)

DRAIN_LOOK_S = 0.01  # between two looks whether all is sent, while a node leaves
ROOM_RETRY_S = 1.0  # hint that goes with a refusal for lack of connections: a few calls' time
STAGGER_S = 0.25  # a contact's next address is tried after this, while the ones before may still answer


@dataclass(frozen=True)
class ShakenHands:
    """What a completed handshake leaves."""

    carrier: Carrier
    peer: ProvenPeer
    early: bytes  # bytes that came right behind it


Dial = Callable[[str, "PeerId | None"], Awaitable["ShakenHands | None"]]
"""``(address, expected peer)`` → a proven carrier; ``None``: the peer has dialled this node instead, and is connected.
Sets no deadline; closes what it opened when it fails."""


@dataclass
class _Dialling:
    done: trio.Event = field(default_factory=trio.Event)
    error: DaaswarmError | None = None


async def shake_hands(carrier: Carrier, handshake: ClientHandshake | ServerHandshake) -> ShakenHands:
    """Run a handshake over a carrier. The caller sets the deadline and closes the carrier on errors.

    Raises:
        RemoteProtocolError: the peer failed it, or refused us.
        Unreachable: the peer hung up.
    """
    parser = FrameParser(handshake=True)
    if isinstance(handshake, ServerHandshake):
        await _send(carrier, handshake.start())
    while handshake.peer is None:
        frame = parser.next_frame()
        if frame is None:
            data = carrier.receive()
            if data is None:
                await carrier.wait_readable()
            elif not len(data):
                raise Unreachable(f"{carrier.remote_addr} hung up during the handshake")
            else:
                parser.feed(data)
            continue
        answer = handshake.receive(frame)
        if answer:
            await _send(carrier, answer)
        if handshake.error is not None:
            raise handshake.error
    return ShakenHands(carrier, handshake.peer, parser.take_rest())


async def _send(carrier: Carrier, data: bytes) -> None:
    done = carrier.send([data])
    while not done:
        await carrier.wait_writable()
        done = carrier.flush()


class ConnectionPool:
    """One node's network (see ``network.Network``), given a way to dial.

    Args:
        nursery: the connections run in it; cancelling it ends them all.
    """

    def __init__(
        self,
        identity: Identity,
        dial: Dial,
        nursery: trio.Nursery,
        *,
        handler: Handler,
        fast_handler: FastHandler | None = None,
        budget: InboundBudget | None = None,
    ) -> None:
        self.identity = identity
        self.contact: Contact | None = None
        self.links = SharedLinks()
        self._peer_id = identity.peer_id
        self._dial_address = dial
        self._nursery = nursery
        self._handler = handler
        self._fast_handler = fast_handler
        self._budget = budget or InboundBudget()
        self._by_peer: dict[PeerId, list[Connection]] = {}
        self._count = 0
        self._dialling: dict[PeerId, _Dialling] = {}

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    @property
    def connections(self) -> list[Connection]:
        return [connection for some in self._by_peer.values() for connection in some]

    def get(self, peer_id: PeerId | str) -> Connection | None:
        """The live connection with a peer: the newest that leads through no relay, else the newest. Thread-safe."""
        relayed = None
        for connection in reversed(self._by_peer.get(PeerId(peer_id), ())):
            if connection.is_open:
                if not connection.is_relayed:
                    return connection
                relayed = relayed or connection
        return relayed

    def is_connected(self, peer_id: PeerId) -> bool:
        return self.get(peer_id) is not None

    def add(self, hands: ShakenHands, *, is_client: bool) -> Connection:
        """Take over a proven carrier. Beyond a limit it pushes out an idle connection, never one in use.

        Raises:
            Busy: the peer, or the node, has all the connections it may have, and all are in use.
            NotAllowed: the allow-list was changed while it proved itself.
        """
        peer_id = hands.peer.peer_id
        try:
            self.identity.allowed.check(peer_id)
            self._make_room(peer_id, is_client)
        except DaaswarmError:
            _drop(hands.carrier)
            raise
        connection = Connection(
            hands.carrier,
            hands.peer,
            is_client=is_client,
            budget=self._budget,
            handler=self._handler,
            fast_handler=self._fast_handler,
            early=hands.early,
            get_near=self.links.pack_near,
        )
        self._by_peer.setdefault(peer_id, []).append(connection)
        self._count += 1
        self._nursery.start_soon(self._run, connection)
        return connection

    async def connect(self, contact: Contact) -> PeerId:
        return (await self._connect(contact)).peer_id

    async def connect_addr(self, addr: str) -> Contact:
        with trio.move_on_after(DIAL_S):
            hands = await self._dial_one(addr, None)
            connection = self.add(hands, is_client=True) if hands else self._get_come(addr)
            return connection.peer.contact or Contact(peer_id=connection.peer_id, addrs=[addr])
        raise _get_silent([addr], DIAL_S)

    async def call(
        self, contact: Contact, message: Request, body: Sequence[Buffer] = (), *, deadline_s: float
    ) -> tuple[Reply, memoryview]:
        connection = self.get(contact.peer_id)
        if connection is None:
            begin = trio.current_time()
            with trio.move_on_after(deadline_s):
                connection = await self._connect(contact)
            if connection is None:
                raise _get_silent(contact.addrs, deadline_s)
            deadline_s -= trio.current_time() - begin
            if deadline_s <= 0:
                raise DeadlineExceeded(f"connecting to {contact.peer_id} took all of the call's time")
        began = trio.current_time()
        reply, answer = await connection.call(message, body, deadline_s=min(deadline_s, CALL_S))
        self.links.note(connection.peer_id, body, reply, answer, trio.current_time() - began)
        return reply, answer

    def submit(
        self, contact: Contact, message: Request, body: Sequence[Buffer] = (), *, deadline_s: float
    ) -> PendingCall:
        connection = self.get(contact.peer_id)
        if connection is None:
            raise Unreachable(f"no connection with {contact.peer_id}", hint="connect first")
        return connection.submit(message, body, deadline_s=deadline_s)

    async def check_connections(self) -> None:
        """Ping all peers at once; connections that bring no answer end. After a suspension, TCP wouldn't notice."""
        async with trio.open_nursery() as nursery:
            for connection in self.connections:
                if connection.is_open:
                    nursery.start_soon(connection.check)

    async def drain(self) -> None:
        """Until every answer that peers wait for is sent. The caller sets the deadline."""
        # There is no event to wait for: answers are written by whichever thread holds the connection.
        while any(c.served_calls for c in self.connections if c.is_open):  # noqa: ASYNC110
            await trio.sleep(DRAIN_LOOK_S)

    async def disconnect(self, peer_id: PeerId, reason: str) -> None:
        for connection in list(self._by_peer.get(peer_id, ())):
            connection.close(ConnectionLost(reason))
        await trio.lowlevel.checkpoint()

    async def _connect(self, contact: Contact) -> Connection:
        peer_id = PeerId(contact.peer_id)
        if peer_id == self._peer_id:
            raise LocalProtocolError("a node does not dial itself")
        connection = self.get(peer_id)
        if connection is not None:
            return connection
        dialling = self._dialling.get(peer_id)
        if dialling is None:
            # In a task of its own: the first caller may be cancelled while others wait for the same connection.
            dialling = self._dialling[peer_id] = _Dialling()
            self._nursery.start_soon(self._dial, contact, dialling)
        await dialling.done.wait()
        if dialling.error is not None:
            raise type(dialling.error)(dialling.error.message, hint=dialling.error.hint) from dialling.error
        connection = self.get(peer_id)
        if connection is None:
            raise ConnectionLost(f"the connection with {peer_id} ended as soon as it was made")
        return connection

    async def _dial(self, contact: Contact, dialling: _Dialling) -> None:
        try:
            hands = await self._dial_any(contact)
            if hands is not None:
                self.add(hands, is_client=True)
        except DaaswarmError as error:
            dialling.error = error
        finally:
            del self._dialling[PeerId(contact.peer_id)]
            dialling.done.set()

    async def _dial_any(self, contact: Contact) -> ShakenHands | None:
        """The first of the contact's addresses that answers as that peer; ``None`` if it has dialled this node."""
        if not contact.addrs:
            raise Unreachable(f"{contact.peer_id} gives no address", hint="it only dials; it must connect to this node")
        winners: list[ShakenHands | None] = []
        errors: list[DaaswarmError] = []

        async def try_address(addr: str, failed: trio.Event, scope: trio.CancelScope) -> None:
            try:
                hands = await self._dial_one(addr, PeerId(contact.peer_id))
            except ConfigError as error:  # in somebody's advert, not in what our user typed
                errors.append(Unreachable(error.message))
                failed.set()
                return
            except DaaswarmError as error:
                errors.append(error)
                failed.set()
                return
            if not winners:
                winners.append(hands)
                scope.cancel()
            elif hands is not None:
                _drop(hands.carrier)

        try:
            with trio.move_on_after(DIAL_S):
                async with trio.open_nursery() as nursery:
                    for addr in contact.addrs:
                        failed = trio.Event()
                        nursery.start_soon(try_address, addr, failed, nursery.cancel_scope)
                        with trio.move_on_after(STAGGER_S):
                            await failed.wait()
        except BaseException:  # cancelled, perhaps just when one had won
            for hands in winners:
                if hands is not None:
                    _drop(hands.carrier)
            raise
        if winners:
            return winners[0]
        if len(errors) < len(contact.addrs):
            errors.append(_get_silent(contact.addrs, DIAL_S))
        if len(errors) == 1:
            raise errors[0]
        # One that names the cause best: somebody answered, but wrongly.
        for error in errors:
            if isinstance(error, PeerIdMismatch | RemoteProtocolError):
                raise error
        reasons = "; ".join(error.message for error in errors)
        raise Unreachable(f"{contact.peer_id} is not reachable: {reasons}", hint=errors[0].hint)

    async def _dial_one(self, addr: str, expected: PeerId | None) -> ShakenHands | None:
        try:
            return await self._dial_address(addr, expected)
        except DaaswarmError:
            raise
        except Exception as error:  # a bug of ours that a stranger's answer, or address, brought to light
            log.exception("dialling %s failed", addr)
            raise Unreachable(f"{addr} can't be dialled: internal error; the log has the details") from error

    def _get_come(self, addr: str) -> Connection:
        """The connection by which the peer at ``addr`` has dialled this node."""
        for connection in reversed(self.connections):
            if connection.is_open and addr.endswith(f"/p2p/{connection.peer_id}"):
                return connection
        raise ConnectionLost(f"the connection with the peer at {addr} ended as soon as it was made")

    async def _run(self, connection: Connection) -> None:
        try:
            await connection.run()
        except Exception:  # ends this connection, and not the node
            log.exception("the connection with %s at %s failed", connection.peer_id, connection.remote_addr)
        finally:
            some = self._by_peer[connection.peer_id]
            some.remove(connection)
            self._count -= 1
            if not some:
                del self._by_peer[connection.peer_id]

    def _make_room(self, peer_id: PeerId, is_client: bool) -> None:
        some = self._by_peer.get(peer_id, [])
        if sum(connection.is_open for connection in some) >= CONNECTIONS_PER_PEER and not _evict(some):
            raise Busy(f"all {CONNECTIONS_PER_PEER} connections with {peer_id} are in use", retry_after_s=ROOM_RETRY_S)
        if len(some) >= 2 * CONNECTIONS_PER_PEER:  # work still goes on for those that have ended
            raise Busy(f"the last connections with {peer_id} have not ended yet", retry_after_s=ROOM_RETRY_S)
        if self._count >= CONNECTIONS:
            # Strangers who dial in never push out whom this node has dialled: it is about to call them again.
            inbound = [connection for connection in self.connections if not connection.is_client]
            if not _evict(inbound) and not (is_client and _evict(self.connections)):
                raise Busy(f"all {CONNECTIONS} connections of this node are in use", retry_after_s=ROOM_RETRY_S)


def _evict(connections: Sequence[Connection]) -> bool:
    """Close the oldest idle one; ``False`` when all are in use."""
    for connection in connections:
        if connection.is_open and connection.is_idle and not connection.is_kept:
            connection.close(ConnectionLost("idle, and its room is needed for a newer connection"))
            return True
    return False


def check_peer_id(expected: PeerId | None, proven: PeerId, addr: str) -> None:
    """Raises:
    PeerIdMismatch: somebody else answered.
    """
    if expected is not None and proven != expected:
        raise PeerIdMismatch(
            f"{addr} answered as {proven}, not as {expected}",
            hint="the node there has a new key, or the address now belongs to another; ask for its current address",
        )


def _drop(carrier: Carrier) -> None:
    carrier.shut_down()
    carrier.close()


def _get_silent(addrs: Sequence[str], seconds: float) -> Unreachable:
    return Unreachable(
        f"no answer from {', '.join(addrs)} within {seconds:g} s",
        hint="is the node running, and does a firewall let its port through?",
    )
