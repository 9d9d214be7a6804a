"""A relay: lets peers that can't be dialled be met, and passes their bytes, which are TLS of theirs, as they are."""

from __future__ import annotations

import logging
import secrets
import socket
from typing import TYPE_CHECKING

import trio

from daaswarm.core.pacing import TokenBucket
from daaswarm.core.quotas import Quotas
from daaswarm.core.relay_desk import TOKEN_S, Circuit, RelayDesk
from daaswarm.errors import Busy, DaaswarmError, NotAllowed, RelayRefused, RemoteProtocolError, Unreachable
from daaswarm.messages import Arranged, Invite, Meet, Reserved
from daaswarm.net.addresses import get_origin
from daaswarm.types import PeerId

if TYPE_CHECKING:
    from daaswarm.net.dataplane import TcpNetwork

log = logging.getLogger(__name__)

CIRCUIT_BYTE = 0xD5  # no record of TLS, no letter, no length of a multistream header begins with it
TOKEN_BYTES = 32
INVITE_S = 4.0  # for the target to dial the asker, or say that it will come: its REVERSE_S and a slow round trip
CIRCUIT_IDLE_S = 120.0  # both ends ping after 20 s of silence
CIRCUIT_S = 12 * 3600.0  # then the two have to meet again, which also finds a direct way if there is one by now
CIRCUIT_BYTES = 64 << 30  # passed in all, both ways: half a day of a gigabyte every ten minutes
CIRCUIT_BYTES_PER_S = 32 << 20  # of one circuit, both ways: a quarter of a gigabit line
RELAY_BYTES_PER_S = 64 << 20  # of all circuits: half of that line is left to the node's own work
COPY_BYTES = 64 * 1024  # read at once
RESERVES_PER_S, RESERVE_BURST = (
    0.1,
    8.0,
)  # of one peer; each looks at all connections, and one in five minutes is needed


class _Pair:
    """The end that came first, waiting for the other; ``done`` when their circuit has ended."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.met = trio.Event()
        self.done = trio.Event()


class Relay:
    """One node's service as a relay. ``is_on``: it offers it."""

    def __init__(self, network: TcpNetwork) -> None:
        self.is_on = False
        self.desk = RelayDesk()
        self.bytes_passed = 0
        self.bucket = TokenBucket(RELAY_BYTES_PER_S)  # of all circuits together
        self._network = network
        self._pairs: dict[int, _Pair] = {}  # by id of the circuit
        self._reserves = Quotas(RESERVES_PER_S, RESERVE_BURST)

    def reserve(self, peer: PeerId) -> Reserved:
        """Raises:
        RelayRefused: this node is no relay, or the peer isn't connected directly.
        Busy: the limits are reached.
        """
        self._check_on()
        if wait_s := self._reserves.take(peer, trio.current_time()):
            raise Busy("reservations were asked for too often", retry_after_s=wait_s)
        host = self._network.get_direct_host(peer)
        if host is None:
            raise RelayRefused("a reservation needs a direct connection with the relay")
        for other in self.desk.reservations:
            if self._network.get_direct(other) is None:
                self.desk.release(other)  # gone without a word
        ttl_s = self.desk.reserve(peer, get_origin(host), trio.current_time())
        self._keep_connections()
        return Reserved(ttl_s=ttl_s)

    async def meet(self, asker: PeerId, message: Meet) -> Arranged:
        """Raises:
        RelayRefused: this node is no relay, or the target has no reservation or is gone.
        Busy: the limits are reached.
        """
        self._check_on()
        host = self._network.get_direct_host(asker)
        if host is None:
            raise RelayRefused("a meeting needs a direct connection with the relay")
        target = PeerId(message.target)
        tokens = secrets.token_bytes(TOKEN_BYTES), secrets.token_bytes(TOKEN_BYTES)
        circuit = self.desk.meet(asker, get_origin(host), target, tokens, trio.current_time())
        try:
            connection = self._network.get_direct(target)
            if connection is None:
                self.desk.release(target)
                raise RelayRefused(f"{target} is not connected with this relay any more")
            invite = Invite(peer=asker, host=host, addrs=message.addrs, token=tokens[1])
            try:
                reply, _ = await connection.call(invite, deadline_s=INVITE_S)
            except DaaswarmError as error:
                raise RelayRefused(f"{target} does not come: {error.message}") from error
            if not isinstance(reply, Arranged):
                raise RelayRefused(f"{target} answered with {type(reply).__name__}")
        except BaseException:
            self.desk.close(circuit)
            raise
        if reply.dialled:
            self.desk.close(circuit)
            return Arranged(dialled=True)
        return Arranged(token=tokens[0])

    async def read_token(self, sock: socket.socket) -> bytes:
        """What follows :data:`CIRCUIT_BYTE`, which it takes too. The caller sets the deadline.

        Raises:
            Unreachable: hung up before.
        """
        read = b""
        while len(read) < 1 + TOKEN_BYTES:
            await trio.lowlevel.wait_readable(sock.fileno())
            try:
                data = sock.recv(1 + TOKEN_BYTES - len(read))
            except (BlockingIOError, InterruptedError):
                continue
            if not data:
                raise Unreachable("hung up before it showed a circuit's token")
            read += data
        return read[1:]

    async def serve(self, sock: socket.socket, token: bytes) -> None:
        """One end of a circuit, until that is over. Leaves ``sock`` to the caller to close.

        Raises:
            RemoteProtocolError: a token that was never given, or before.
            Unreachable: the other end doesn't come.
        """
        circuit = self.desk.claim(token, trio.current_time())
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        pair = self._pairs.get(id(circuit))
        if pair is not None:
            pair.met.set()
            try:
                await self._pass(circuit, pair.stream, stream)
            finally:
                pair.done.set()
            return
        pair = self._pairs[id(circuit)] = _Pair(stream)
        try:
            with trio.move_on_after(TOKEN_S):
                await pair.met.wait()
            if not pair.met.is_set():
                raise Unreachable(f"the other end of its circuit did not come within {TOKEN_S:g} s")
            await pair.done.wait()
        finally:
            del self._pairs[id(circuit)]
            self.desk.close(circuit)

    def _keep_connections(self) -> None:
        """One connection with each who has a reservation isn't closed for being idle; no others'."""
        for connection in self._network.connections:
            if not connection.is_client:
                connection.is_kept = False
        for peer in self.desk.reservations:
            connection = self._network.get_direct(peer)
            if connection is not None:
                connection.is_kept = True

    def _check_on(self) -> None:
        if not self.is_on:
            raise RelayRefused("this node is no relay", hint="network.relay is off there, or nobody can dial it")

    async def _pass(self, circuit: Circuit, a: trio.SocketStream, b: trio.SocketStream) -> None:
        """Copy both ways until either end closes, nothing comes, or a limit is reached."""
        bucket = TokenBucket(CIRCUIT_BYTES_PER_S)
        passed = 0
        with trio.move_on_after(CIRCUIT_S), trio.move_on_after(CIRCUIT_IDLE_S) as scope:
            async with trio.open_nursery() as nursery:

                async def copy(source: trio.SocketStream, target: trio.SocketStream) -> None:
                    nonlocal passed
                    try:
                        while data := await source.receive_some(COPY_BYTES):
                            for peer in (circuit.asker, circuit.target):
                                self._network.identity.allowed.check(peer)  # the list may have changed
                            passed += len(data)
                            self.bytes_passed += len(data)
                            if passed > CIRCUIT_BYTES:
                                log.info("a circuit of %s has passed %d bytes: closed", circuit.asker, passed)
                                nursery.cancel_scope.cancel()
                            scope.deadline = trio.current_time() + CIRCUIT_IDLE_S
                            now = trio.current_time()
                            wait_s = max(bucket.take(len(data), now), self.bucket.take(len(data), now))
                            if wait_s:
                                await trio.sleep(wait_s)
                            await target.send_all(data)
                        await target.send_eof()
                    except (trio.BrokenResourceError, NotAllowed):
                        nursery.cancel_scope.cancel()

                nursery.start_soon(copy, a, b)
                nursery.start_soon(copy, b, a)


def check_token(token: bytes) -> bytes:
    """Raises:
    RemoteProtocolError: no token's length.
    """
    if len(token) != TOKEN_BYTES:
        raise RemoteProtocolError("the relay arranged nothing: neither a connection nor a token", reject=False)
    return token
