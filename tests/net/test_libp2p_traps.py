"""py-libp2p's measured traps, and that the door (``net/libp2p_host.py``, ``net/libp2p_guards.py``) survives each.

Not tested here, because nothing of ours goes there:

* connecting hangs for 40 s at a silent listener, costs 250 ms, and a refused dial is remembered for 60 s: the door
  never dials (a test below says so), and the data plane's own dials have deadlines (``test_hostile.py``);
* ``new_stream`` blocks at the 257th idle stream: this node opens no libp2p streams, peers of it do (see below);
* KadDHT (stale answers, silent limits), GossipSub (drops bursts), pre-shared keys (a mismatch hangs), QUIC (loses data)
  and ping (whole milliseconds): not used. Swarms are kept apart by the protocol's name (``test_libp2p_host.py``);
* the cost of noise and yamux, and the second that the import takes: between nodes there is TLS, and ``libp2p`` is
  imported once a door opens (``test_dataplane.py``).
"""

from __future__ import annotations

import gc
import logging
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import psutil
import pytest
import trio
from net_helpers import SWARM, get_call, get_identity, serve

from daaswarm import messages
from daaswarm.limits import MIB
from daaswarm.messages import ExpertCall, ExpertReply, FindNode, Found, Ping, Pong
from daaswarm.net import libp2p_host
from daaswarm.net.connection import Connection
from daaswarm.net.dataplane import TcpNetwork, open_tcp_network
from daaswarm.net.frames import Frame, FrameParser, Kind, encode_head
from daaswarm.net.libp2p_host import MAX_STREAMS, get_protocol, open_libp2p_host

pytestmark = pytest.mark.filterwarnings(
    # py-libp2p's client leaves sockets behind; see the last test for what the door leaves.
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)

PROMPT_S = 10.0  # far beyond what anything here takes on a busy machine, and far below what libp2p hangs for
SYN, DATA, WINDOW_UPDATE = 1, 0, 1  # of yamux
FLOOD_BYTES = 40 * MIB


class World(NamedTuple):
    """A node with its door open."""

    node: TcpNetwork
    door: Any

    def get_muxers(self) -> list[Any]:
        """The door's ends of the libp2p connections."""
        found = self.door.host.get_network().connections.values()
        return [c.muxed_conn for some in found for c in (some if isinstance(some, list) else [some])]


class Peer(NamedTuple):
    """A foreign libp2p host, connected to the node."""

    host: Any
    target: Any

    async def open(self) -> Any:
        return await self.host.new_stream(self.target, [get_protocol(SWARM)])


@pytest.fixture(autouse=True)
def fast_dials(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import libp2p.network.swarm

    monkeypatch.setattr(libp2p.network.swarm, "_HAPPY_EYEBALLS_DELAY", 0)
    yield
    gc.collect()  # so that the client's unclosed sockets are complained about here, where it's ignored


@asynccontextmanager
async def open_world(handler: Callable[..., Awaitable[Any]] = serve) -> AsyncIterator[World]:
    async with (
        open_tcp_network(get_identity(1), handler=handler) as node,
        open_libp2p_host(get_identity(1), handler=handler) as door,
    ):
        node.splicer.targets.update(door.targets)
        yield World(node, door)


@asynccontextmanager
async def visit(world: World, number: int = 7) -> AsyncIterator[Peer]:
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from multiaddr import Multiaddr

    assert world.node.contact is not None
    host = new_host(key_pair=create_new_key_pair(bytes([number]) * 32))
    async with host.run(listen_addrs=[]):
        info = info_from_p2p_addr(Multiaddr(world.node.contact.addrs[0]))
        with trio.fail_after(PROMPT_S):
            await host.connect(info)
        yield Peer(host, info.peer_id)


async def ask(stream: Any, message: Any, call: int = 1) -> None:
    header = messages.encode(message)
    await stream.write(encode_head(Kind.REQUEST, call, deadline_ms=20_000, header_bytes=len(header)) + header)


async def read(stream: Any, parser: FrameParser) -> Frame:
    while (frame := parser.next_frame()) is None:
        parser.feed(await stream.read(65_536))
    return frame


async def check_ping(stream: Any, call: int = 1) -> None:
    with trio.fail_after(PROMPT_S):
        await ask(stream, Ping(), call)
        frame = await read(stream, FrameParser())
    assert isinstance(messages.decode(messages.Reply, frame.header), Pong)


async def wait_until(done: Callable[[], bool]) -> None:
    with trio.fail_after(PROMPT_S):
        while not done():  # noqa: ASYNC110 - libp2p tells nobody
            await trio.sleep(0.01)


def yamux_frame(kind: int, flags: int, stream: int, length: int) -> bytes:
    return struct.pack("!BBHII", 0, kind, flags, stream, length)


# -- trap 1: a stream handler that raises takes the whole host down ---------------------------------------------------


async def test_a_bug_in_the_door_costs_one_stream(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    async def broken(self: Connection) -> None:
        raise KeyError("a bug")

    async with open_world() as world, visit(world) as peer:
        other = await peer.open()
        await check_ping(other)
        with monkeypatch.context() as patch:
            patch.setattr(Connection, "run", broken)
            with trio.fail_after(PROMPT_S), pytest.raises(Exception):  # noqa: B017 - libp2p has many names for it
                stream = await peer.open()
                await stream.write(b"x")
                while await stream.read(1):
                    pass
        await check_ping(other, 3)
        await check_ping(await peer.open())
    assert "a bug" in caplog.text


# -- trap 2: cancelling a write in flight poisons the connection -------------------------------------------------------


async def answer_much(peer_id: Any, contact: Any, message: Any, body: Any, deadline_s: float) -> Any:
    if isinstance(message, FindNode):
        return Found(), [bytes(4 * MIB)]
    return await serve(peer_id, contact, message, body, deadline_s)


async def stop_reading(stream: Any) -> None:
    """Let the node send without end, and take nothing from the socket: the node's writes get stuck."""
    muxer = stream.muxed_conn
    await muxer._write_frame(yamux_frame(WINDOW_UPDATE, 0, stream.muxed_stream.stream_id, 1 << 30))
    for call in range(1, 40, 2):
        await ask(stream, FindNode(target=bytes(32)), call)

    async def never(*args: Any) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    muxer.secured_conn.read = never


async def test_a_stalled_write_ends_that_connection_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_host, "WRITE_STALL_S", 0.5)
    async with open_world(answer_much) as world, visit(world, 8) as good:
        good_stream = await good.open()
        await check_ping(good_stream)
        async with visit(world, 7) as bad:
            await stop_reading(await bad.open())
            await check_ping(good_stream, 3)
            await wait_until(lambda: len(world.get_muxers()) == 1)  # not left behind, poisoned but "connected"
            await check_ping(good_stream, 5)
        async with visit(world, 7) as bad:  # it may come back
            await check_ping(await bad.open())


async def test_a_node_that_leaves_does_not_wait_for_a_peer_that_stalls() -> None:
    async with trio.open_nursery() as nursery:
        leave = trio.Event()
        left = trio.Event()

        async def run(task_status: Any) -> None:
            with trio.CancelScope() as scope:
                async with open_world(answer_much) as world:
                    task_status.started((world, scope))
                    await leave.wait()
                    scope.cancel()
                    await trio.lowlevel.checkpoint()
            left.set()

        world, _ = await nursery.start(run)
        async with visit(world) as peer:
            await stop_reading(await peer.open())
            await trio.sleep(0.3)  # the node's write is stuck by now
            leave.set()
            with trio.fail_after(libp2p_host.WRITE_STALL_S / 2):
                await left.wait()


# -- trap 3: a peer that doesn't read resets the stream after 5 s; keep draining while computing -----------------------


async def test_bodies_larger_than_any_window_arrive_while_the_node_computes() -> None:
    body = bytes(range(256)) * (9 * MIB // 256)

    async def slow(peer_id: Any, contact: Any, message: Any, received: Any, deadline_s: float) -> Any:
        if isinstance(message, ExpertCall) and message.layer == 1:
            await computed.wait()
        return await serve(peer_id, contact, message, received, deadline_s)

    computed = trio.Event()
    async with open_world(slow) as world, visit(world) as peer:
        stream = await peer.open()
        parser = FrameParser()
        received = bytearray()
        with trio.fail_after(60):
            await ask(stream, get_call(1), 1)  # still computing while the rest goes on
            await send_body(stream, parser, body)
            while len(received) < len(body):
                frame = await read(stream, parser)
                if frame.kind in (Kind.REPLY, Kind.BODY):
                    assert frame.call == 3
                    received += frame.body
                    await stream.write(encode_head(Kind.WINDOW, 3, body=len(frame.body)))
            assert bytes(received) == body
            computed.set()
            frame = await read(stream, parser)
            assert (frame.kind, frame.call) == (Kind.REPLY, 1)
            assert isinstance(messages.decode(messages.Reply, frame.header), ExpertReply)


async def send_body(stream: Any, parser: FrameParser, body: bytes) -> None:
    """Call 3 with ``body``, by the rules: the first chunk, then what windows allow."""
    header, chunk, granted = messages.encode(get_call()), 256 * 1024, 4 * MIB
    head = encode_head(Kind.REQUEST, 3, deadline_ms=30_000, header_bytes=len(header), body=len(body))
    await stream.write(head + header + body[:chunk])
    sent = chunk
    while sent < len(body):
        while sent >= granted:
            frame = await read(stream, parser)
            assert (frame.kind, frame.call) == (Kind.WINDOW, 3)
            granted += frame.total
        part = body[sent : sent + chunk]
        await stream.write(encode_head(Kind.BODY, 3, body=len(part)) + part)
        sent += len(part)


# -- trap 4: idle streams pile up --------------------------------------------------------------------------------------


async def test_a_peer_has_few_streams_and_closed_ones_make_room() -> None:
    from libp2p.host.exceptions import StreamFailure

    async with open_world() as world, visit(world) as peer, visit(world, 8) as other:
        kept = [await peer.open() for _ in range(libp2p_host.CONNECTIONS_PER_PEER)]
        for stream in kept:
            await check_ping(stream)
        with trio.fail_after(PROMPT_S), pytest.raises(Exception):  # noqa: B017 - likewise
            refused = await peer.open()
            await ask(refused, Ping())
            while await refused.read(1):
                pass
        await check_ping(await other.open())
        for number, stream in enumerate(kept):
            await (stream.close() if number % 2 else stream.reset())
        # A hundred more, one after the other, right and wrong ones: nothing is used up.
        for _ in range(50):
            stream = await peer.open()
            with trio.fail_after(PROMPT_S):
                await stream.close()
            with pytest.raises(StreamFailure):
                await peer.host.new_stream(peer.target, ["/no/such/protocol"])
        await wait_until(lambda: all(len(muxer.streams) < 8 for muxer in world.get_muxers()))
        await check_ping(await peer.open())
    assert MAX_STREAMS >= libp2p_host.CONNECTIONS_PER_PEER


async def test_a_flood_of_new_streams_ends_the_connection() -> None:
    async with open_world() as world, visit(world, 8) as good:
        good_stream = await good.open()
        await check_ping(good_stream)
        tasks = trio.lowlevel.current_statistics().tasks_living
        async with visit(world) as peer:
            muxer = (await peer.open()).muxed_conn
            with pytest.raises(Exception):  # noqa: B017 - likewise
                for number in range(101, 10_000, 2):
                    await muxer._write_frame(yamux_frame(WINDOW_UPDATE, SYN, number, 0))
                await wait_until(lambda: muxer.is_closed)
                raise ConnectionError
            assert trio.lowlevel.current_statistics().tasks_living < tasks + 200
        await check_ping(good_stream, 3)


# -- trap 5: inbound flow control isn't enforced -----------------------------------------------------------------------


@pytest.mark.parametrize("negotiated", [False, True])
async def test_a_flood_into_an_unread_stream_ends_the_connection(negotiated: bool) -> None:
    async with open_world() as world, visit(world, 8) as good:
        good_stream = await good.open()
        await check_ping(good_stream)
        async with visit(world) as peer:
            stream = await peer.open()
            muxer, number = stream.muxed_conn, stream.muxed_stream.stream_id
            if not negotiated:  # a stream of which the protocol is never named, so that nobody will read it
                number = 101
                await muxer._write_frame(yamux_frame(WINDOW_UPDATE, SYN, number, 0))
            before = psutil.Process().memory_info().rss
            chunk = yamux_frame(DATA, 0, number, 60_000) + (encode_head(Kind.CANCEL, 1) * 4000)[:60_000]
            with trio.fail_after(60), pytest.raises(Exception):  # noqa: B017 - likewise
                for _ in range(FLOOD_BYTES // len(chunk)):
                    await muxer._write_frame(chunk)
                await wait_until(lambda: muxer.is_closed)
                raise ConnectionError
            assert psutil.Process().memory_info().rss - before < FLOOD_BYTES / 2
        await check_ping(good_stream, 3)


# -- trap 6: a frozen peer stays "connected" ---------------------------------------------------------------------------


async def test_a_frozen_peer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daaswarm.net.connection.IDLE_PING_S", 0.2)
    monkeypatch.setattr("daaswarm.net.connection.PING_ANSWER_S", 0.2)
    async with open_world() as world, visit(world) as peer:
        stream = await peer.open()
        parser = FrameParser()
        with trio.fail_after(PROMPT_S):
            frame = await read(stream, parser)  # the node asks whether anybody is there, and gets no answer
            assert messages.decode(messages.Request, frame.header) == Ping()
            with pytest.raises(Exception):  # noqa: B017 - likewise
                while True:
                    await read(stream, parser)


# -- trap 9: half-open connections and garbage -------------------------------------------------------------------------


async def test_half_open_connections_and_garbage_leave_nothing(caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    async with open_world() as world:
        address = ("127.0.0.1", world.node.listen_addresses[0].port)
        socks = [socket.create_connection(address) for _ in range(24)]  # one address may have 32
        for number, sock in enumerate(socks):
            sock.sendall(b"\x13/multistream/1.0.0\n"[: 1 + number] + b"\xff" * 300 * (number % 2))
        async with visit(world) as peer:
            await check_ping(await peer.open())
        for sock in socks:
            sock.close()
        # The visitor's own connection is closed only when its process ends.
        await wait_until(lambda: world.node.splicer._by_origin.total() <= 1 and len(world.get_muxers()) <= 1)
        async with visit(world) as peer:
            await check_ping(await peer.open())
    assert not any(record.exc_info for record in caplog.records)


# -- a surprise of 0.8: the connection manager dials what strangers have named -----------------------------------------


async def test_the_door_never_dials() -> None:
    from multiaddr import Multiaddr

    with socket.create_server(("127.0.0.1", 0)) as victim:
        victim.setblocking(False)
        async with open_world() as world, visit(world) as peer:
            await check_ping(await peer.open())
            network = world.door.host.get_network()
            named = Multiaddr(f"/ip4/127.0.0.1/tcp/{victim.getsockname()[1]}")
            network.peerstore.add_addrs(peer.host.get_id(), [named], 3600)
            someone = get_identity(9).peer_id
            from libp2p.peer.id import ID

            network.peerstore.add_addrs(ID.from_base58(someone), [named], 3600)
            with trio.fail_after(PROMPT_S):
                await network.auto_connector.maybe_connect()
            assert not network.auto_connector._started
            with pytest.raises(BlockingIOError):
                victim.accept()


# -- surprises at the end: StreamEOF, and what a host leaves behind ----------------------------------------------------


async def test_the_end_of_a_stream_and_of_the_node_are_quiet(caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    process = psutil.Process()
    async with open_world() as world, visit(world) as peer:
        for end in ("close", "reset"):
            stream = await peer.open()
            await check_ping(stream)
            await getattr(stream, end)()
        await check_ping(await peer.open())
    gc.collect()
    files = process.num_fds()
    with trio.fail_after(2 * PROMPT_S):
        for _ in range(3):
            async with open_world() as world, visit(world) as peer:
                await check_ping(await peer.open())
    gc.collect()
    assert process.num_fds() <= files + 3  # what the three clients left; the door leaves nothing
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
