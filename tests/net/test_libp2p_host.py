"""A foreign libp2p host reaches a node through its one listening port."""

from __future__ import annotations

import gc
import sys

import pytest
import trio
from net_helpers import SWARM, get_call, get_identity, serve

from daaswarm import messages
from daaswarm.messages import Ping, Pong
from daaswarm.net.dataplane import open_tcp_network
from daaswarm.net.frames import Frame, FrameParser, Kind, encode_head
from daaswarm.net.inbound import InboundBudget
from daaswarm.net.libp2p_host import _Door, get_protocol, open_libp2p_host

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


async def ping(stream) -> Frame:
    header = messages.encode(Ping())
    await stream.write(encode_head(Kind.REQUEST, 1, deadline_ms=5000, header_bytes=len(header)) + header)
    parser = FrameParser()
    while (frame := parser.next_frame()) is None:
        parser.feed(await stream.read(4096))
    return frame


async def visit(addr: str, suffix: str) -> None:
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.host.exceptions import StreamFailure
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from multiaddr import Multiaddr

    base, _, peer_id = addr.partition("/p2p/")
    other = new_host(key_pair=create_new_key_pair(bytes([7]) * 32), enable_websocket=bool(suffix))
    with trio.fail_after(30):
        async with other.run(listen_addrs=[]):
            info = info_from_p2p_addr(Multiaddr(f"{base}{suffix}/p2p/{peer_id}"))
            await other.connect(info)
            stream = await other.new_stream(info.peer_id, [get_protocol(SWARM)])
            frame = await ping(stream)
            assert isinstance(messages.get_decoder(messages.Reply).decode(frame.header), Pong)
            assert str(stream.muxed_conn.peer_id) == peer_id
            # Garbage ends that stream, not the host.
            await stream.write(b"\xff" * 100)
            stream = await other.new_stream(info.peer_id, [get_protocol(SWARM)])
            assert (await ping(stream)).call == 1
            # Another swarm finds nobody to talk to.
            with pytest.raises(StreamFailure):
                await other.new_stream(info.peer_id, [get_protocol(bytes(32))])


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("suffix", ["", "/ws"])
async def test_ping_through_the_one_port(suffix):
    async with (
        open_tcp_network(get_identity(1), handler=serve) as node,
        open_libp2p_host(get_identity(1), handler=serve) as door,
    ):
        node.splicer.targets.update(door.targets)
        assert node.contact is not None and door.peer_id == node.peer_id
        await visit(node.contact.addrs[0], suffix)
    # py-libp2p's client leaves its socket unclosed; let that warning come up here, where it's ignored.
    gc.collect()


class Stream:
    """One libp2p stream as a door sees it, and its other end."""

    class Muxed:
        peer_id = get_identity(7).peer_id

    muxed_conn = Muxed()

    def __init__(self) -> None:
        self.to_door, self._read = trio.open_memory_channel[bytes](9)
        self._written, self.from_door = trio.open_memory_channel[bytes](9)

    async def read(self, size: int) -> bytes:
        return await self._read.receive()

    async def write(self, data: bytes) -> None:
        await self._written.send(data)

    async def reset(self) -> None:
        self._written.close()


async def test_who_is_struck_off_the_allow_list_is_answered_no_more(nursery):
    allowed = get_identity(1).allowed
    stream = Stream()
    served = []

    async def handle(peer_id, contact, message, body, deadline_s):
        served.append(peer_id)
        return await serve(peer_id, contact, message, body, deadline_s)

    nursery.start_soon(_Door(handle, None, InboundBudget(), allowed).serve, stream)
    header = messages.encode(get_call())
    for call in (1, 3):
        await stream.to_door.send(encode_head(Kind.REQUEST, call, deadline_ms=5000, header_bytes=len(header)) + header)
        if call == 1:
            await stream.from_door.receive()
            allowed.replace([get_identity(2).peer_id])
    with trio.fail_after(5), pytest.raises(trio.EndOfChannel):
        await stream.from_door.receive()
    assert len(served) == 1


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
async def test_who_is_not_on_the_allow_list_gets_no_answer(caplog):
    identity = get_identity(1)
    identity.allowed.replace([get_identity(2).peer_id])
    with caplog.at_level("INFO", "daaswarm.net.libp2p_host"):
        async with (
            open_tcp_network(identity, handler=serve) as node,
            open_libp2p_host(identity, handler=serve) as door,
        ):
            node.splicer.targets.update(door.targets)
            assert node.contact is not None
            with pytest.raises(BaseExceptionGroup):  # py-libp2p's client wraps what ends it
                await visit(node.contact.addrs[0], "")
    assert "not on the allow-list" in caplog.text
    gc.collect()


async def test_cancelled_while_it_starts(monkeypatch):
    """libp2p forgets a socket whose listening is cancelled."""
    identity = get_identity(1)
    async with open_libp2p_host(identity, handler=serve):  # its modules are loaded
        pass
    opened = []

    def open_socket(*args, **options):
        opened.append(create(*args, **options))
        scope.cancel()
        return opened[-1]

    create = trio.socket.socket
    monkeypatch.setattr(trio.socket, "socket", open_socket)
    with trio.fail_after(10), trio.CancelScope() as scope:
        async with open_libp2p_host(identity, handler=serve):
            await trio.sleep_forever()
    assert opened and [sock.fileno() for sock in opened] == [-1] * len(opened)
