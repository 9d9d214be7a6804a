"""What a hostile relay, asker or announcement gets out of a node; helpers are those of ``test_circuits.py``."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
import trio
from net_helpers import get_identity
from test_circuits import get_contact, peer, ping, reserve, swarm

from daaswarm.errors import Busy, DaaswarmError, Unreachable
from daaswarm.messages import Arranged, Contact, Meet, Pong
from daaswarm.net.dataplane import Dialling, TcpNetwork, open_tcp_network


async def test_many_askers_of_one_machine_are_not_all_dialled(monkeypatch):
    """Each would be a connection of the target's own, which strangers' don't push out."""
    async with swarm() as (_, target, one), peer(4) as other:
        monkeypatch.setattr("daaswarm.net.circuits.DIALLED_PER_HOST", 2)  # the relay's is one
        await ping(one, get_contact(target))
        await ping(other, get_contact(target))
        assert not target.get(one.peer_id).is_relayed and target.get(other.peer_id).is_relayed
        assert target.circuits.dialled_back == 1 and target.circuits.came == 1


async def test_a_flood_of_reservations_is_told_to_wait():
    async with swarm(listen=[]) as (relay, target, _):
        with pytest.raises(Busy, match="too often") as caught:
            for _ in range(20):
                await reserve(target, relay)
        assert caught.value.retry_after_s > 0
        assert relay.meetings.relay.desk.reservations == [target.peer_id]


async def test_a_relay_that_makes_askers_up_does_not_fill_a_node(monkeypatch):
    monkeypatch.setattr("daaswarm.net.circuits.RELAYED", 2)
    async with swarm(listen=[]) as (_, target, one), contextlib.AsyncExitStack() as stack:
        contact = get_contact(target)
        await ping(one, contact)
        others = [await stack.enter_async_context(peer(20 + n, listen=[])) for n in range(2)]
        await ping(others[0], contact)
        with pytest.raises(Unreachable, match="too many peers want to meet"):
            await ping(others[1], contact)
        await one.disconnect(target.peer_id, "done")
        while target.is_connected(one.peer_id):
            await trio.lowlevel.checkpoint()
        await ping(others[1], contact)


async def test_a_relay_passes_nothing_for_whom_its_list_leaves_out():
    async with swarm(listen=[]) as (relay, target, one):
        await ping(one, get_contact(target))
        relay.identity.allowed.replace([one.peer_id])
        with pytest.raises(DaaswarmError):
            await ping(one, get_contact(target))
        assert relay.meetings.relay.desk.circuits == 0


# -- where an opening goes --------------------------------------------------------------------------------------------

WORDS = b"\r\nFLUSHALL\r\n".ljust(32, b" ")  # what a relay would have somebody say to a database


@contextlib.asynccontextmanager
async def victim() -> AsyncIterator[tuple[int, list[bytes]]]:
    """A port of this machine's own, and what is said there."""
    heard: list[bytes] = []

    async def hear(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            heard.append(await stream.receive_some())
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, hear, [listener])
        yield listener.socket.getsockname()[1], heard
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def hostile(one: TcpNetwork) -> AsyncIterator[TcpNetwork]:
    """A relay with a connection to ``one``, that arranges whatever it is asked for with a token of its choice."""

    async def handle(peer_id, contact, message, body, deadline_s):
        if isinstance(message, Meet):
            return Arranged(token=WORDS), ()
        return Pong(), ()

    async with open_tcp_network(get_identity(7), handler=handle) as relay:
        assert one.contact is not None
        await relay.connect(one.contact)
        yield relay


async def test_no_announced_address_is_told_a_relays_words():
    """Whoever announces a circuit names its relay's address too: what a relay has chosen is said to that relay only."""
    target = get_identity(8).peer_id
    async with peer(3) as one, hostile(one) as relay, victim() as (port, heard):
        addr = f"/ip4/127.0.0.1/tcp/{port}/p2p/{relay.peer_id}/p2p-circuit/p2p/{target}"
        for _ in range(2):  # the relay has dialled this node; then this node the relay
            with pytest.raises(DaaswarmError):
                await one.connect(Contact(peer_id=target, addrs=[addr]))
            assert relay.contact is not None
            await one.dial_anew(relay.contact.addrs[0], Dialling())
        assert not any(b"FLUSHALL" in said for said in heard)


async def test_a_circuit_is_opened_where_the_relay_is_connected():
    """Its name may lead elsewhere by now."""
    async with swarm(listen=[]) as (relay, target, one), victim() as (port, heard):
        door = f"/ip4/127.0.0.1/tcp/{port}/p2p/{relay.peer_id}"
        assert relay.contact is not None
        await one.connect(relay.contact)
        target.circuits.relays[relay.peer_id] = door
        await ping(one, get_contact(target))
        assert relay.meetings.relay.desk.circuits == 1 and heard == []


async def test_who_only_heard_from_a_relay_need_not_dial_it_to_be_dialled():
    async with peer(1) as relay, peer(2, listen=[]) as target, peer(3) as one:
        await reserve(target, relay)
        assert one.contact is not None
        await relay.connect(one.contact)
        addr = f"/ip4/127.0.0.1/tcp/1/p2p/{relay.peer_id}/p2p-circuit/p2p/{target.peer_id}"
        await ping(one, Contact(peer_id=target.peer_id, addrs=[addr]))
        assert [connection.is_client for connection in one.connections] == [False, False]


async def test_who_only_heard_from_a_relay_dials_it_once():
    async with peer(1) as relay, peer(3) as one, contextlib.AsyncExitStack() as stack:
        assert one.contact is not None
        await relay.connect(one.contact)
        one.circuits.is_dialable = False
        targets = [await stack.enter_async_context(peer(10 + n, listen=[])) for n in range(6)]
        for target in targets:
            await reserve(target, relay)
        async with trio.open_nursery() as nursery:
            for target in targets:
                nursery.start_soon(ping, one, get_contact(target))
        own = [connection for connection in one.connections if connection.peer_id == relay.peer_id]
        assert sorted(connection.is_client for connection in own) == [False, True]
        assert one.circuits._knocking == {}
