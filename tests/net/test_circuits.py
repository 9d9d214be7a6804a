"""Peers that can't be dialled are met through a relay: over loopback, with nodes that announce nothing to dial."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
import trio
from net_helpers import get_call, get_identity, serve

from daaswarm.core.relay_desk import TOKEN_S
from daaswarm.errors import Busy, ConnectionLost, DaaswarmError, RelayRefused, Unreachable
from daaswarm.messages import Contact, FindNode, Invite, Meet, Meeting, Ping, Pong, Reserve, Reserved
from daaswarm.net.addresses import parse_address
from daaswarm.net.circuits import check_relay, encode_opening, get_dialable, is_circuit
from daaswarm.net.dataplane import TcpNetwork, open_tcp_network


@contextlib.asynccontextmanager
async def peer(number: int, **options) -> AsyncIterator[TcpNetwork]:
    network: TcpNetwork

    async def handle(peer_id, contact, message, body, deadline_s):
        if isinstance(message, Meeting):
            return await network.meetings.answer(peer_id, message), ()
        return await serve(peer_id, contact, message, body, deadline_s)

    async with open_tcp_network(get_identity(number), handler=handle, **options) as network:
        yield network


async def reserve(target: TcpNetwork, relay: TcpNetwork) -> None:
    assert relay.contact is not None
    relay.meetings.relay.is_on = True
    reply, _ = await target.call(relay.contact, Reserve(), deadline_s=5)
    assert isinstance(reply, Reserved)
    connection = target.get(relay.peer_id)
    assert connection is not None
    target.circuits.relays[relay.peer_id] = connection.remote_addr


@contextlib.asynccontextmanager
async def swarm(**asker) -> AsyncIterator[tuple[TcpNetwork, TcpNetwork, TcpNetwork]]:
    """A relay, a target that only dials and holds a reservation, and an asker."""
    async with peer(1) as relay, peer(2, listen=[]) as target, peer(3, **asker) as one:
        await reserve(target, relay)
        yield relay, target, one


async def ping(one: TcpNetwork, contact: Contact) -> None:
    assert isinstance((await one.call(contact, Ping(), deadline_s=5))[0], Pong)


def get_contact(target: TcpNetwork) -> Contact:
    return Contact(peer_id=target.peer_id, addrs=target.circuits.get_addrs())


async def test_two_that_only_dial_meet_through_a_relay():
    async with swarm(listen=[]) as (relay, target, one):
        contact = get_contact(target)
        await ping(one, contact)
        body = bytes(range(256)) * 20_000
        assert (await one.call(contact, get_call(), [body], deadline_s=30))[1] == body
        connection, other = one.get(target.peer_id), target.get(one.peer_id)
        assert connection is not None and is_circuit(connection.remote_addr) and connection.is_client
        assert other is not None and is_circuit(other.remote_addr) and not other.is_client
        await ping(target, Contact(peer_id=one.peer_id, addrs=[]))
        assert relay.meetings.relay.bytes_passed > 2 * len(body) and relay.meetings.relay.desk.circuits == 1
        assert not relay._proven.keys() - {"127.0.0.1"}
        # The circuit is no connection with the relay's peers: what needs a direct one is refused over it.
        assert target.get_direct_host(one.peer_id) is None and one.get_direct(target.peer_id) is None
        await one.disconnect(target.peer_id, "done")
        while relay.meetings.relay.desk.circuits or target.is_connected(one.peer_id):
            await trio.lowlevel.checkpoint()
        relay.meetings.relay.desk.validate()


async def test_the_target_dials_an_asker_that_can_be_dialled():
    async with swarm() as (relay, target, one):
        await ping(one, get_contact(target))
        connection = one.get(target.peer_id)
        assert connection is not None and not connection.is_client and not is_circuit(connection.remote_addr)
        assert relay.meetings.relay.bytes_passed == 0 and relay.meetings.relay.desk.circuits == 0
        # By its address alone, as a bootstrap peer would be.
        await one.disconnect(target.peer_id, "again")
        assert (await one.connect_addr(target.circuits.get_addrs()[0])).peer_id == target.peer_id


async def test_an_asker_that_refuses_connections_is_met_by_circuit():
    async with peer(9) as gone:
        assert gone.contact is not None
        port = parse_address(gone.contact.addrs[0]).port
    async with swarm() as (relay, target, one):
        one.direct_addrs = [f"/ip4/127.0.0.1/tcp/{port}/p2p/{one.peer_id}"]  # a port where nothing listens
        await ping(one, get_contact(target))
        assert relay.meetings.relay.desk.circuits == 1


# -- abuse ----------------------------------------------------------------------------------------------------------


opened: list[socket.socket] = []


@pytest.fixture(autouse=True)
def close_ends():
    yield
    while opened:
        opened.pop().close()


async def open_end(relay: TcpNetwork, data: bytes) -> trio.SocketStream:
    sock = socket.create_connection(("127.0.0.1", relay.listen_addresses[0].port))
    opened.append(sock)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
    await stream.send_all(data)
    return stream


async def is_closed(stream: trio.SocketStream) -> bool:
    with trio.fail_after(8):
        try:
            return await stream.receive_some() == b""
        except trio.BrokenResourceError:
            return True


async def test_tokens_are_known_single_use_and_short_lived():
    async with swarm(listen=[]) as (relay, target, one):
        forged = await open_end(relay, encode_opening(b"x" * 32))
        assert await is_closed(forged)
        desk = relay.meetings.relay.desk
        circuit = desk.meet(one.peer_id, "o", target.peer_id, (b"a" * 32, b"b" * 32), trio.current_time())
        first = await open_end(relay, encode_opening(b"a" * 32))
        while circuit.waiting != {b"b" * 32}:
            await trio.lowlevel.checkpoint()
        again = await open_end(relay, encode_opening(b"a" * 32))
        assert await is_closed(again)
        second = await open_end(relay, encode_opening(b"b" * 32) + b"early")
        assert await first.receive_some() == b"early"
        await first.send_all(b"back")
        assert await second.receive_some() == b"back"
        await first.aclose()
        assert await is_closed(second)
        await second.aclose()
        old = desk.meet(one.peer_id, "o", target.peer_id, (b"c" * 32, b"d" * 32), trio.current_time() - TOKEN_S)
        assert old.waiting
        late = await open_end(relay, encode_opening(b"c" * 32))
        assert await is_closed(late)
        desk.validate()
        assert desk.circuits == 0


async def test_an_end_whose_other_does_not_come_is_let_go(monkeypatch):
    monkeypatch.setattr("daaswarm.net.relaying.TOKEN_S", 0.05)
    async with swarm(listen=[]) as (relay, target, one):
        desk = relay.meetings.relay.desk
        desk.meet(one.peer_id, "o", target.peer_id, (b"a" * 32, b"b" * 32), trio.current_time())
        lonely = await open_end(relay, encode_opening(b"a" * 32))
        assert await is_closed(lonely)
        assert desk.circuits == 0
        desk.validate()


async def test_a_slow_token_holds_no_circuit(monkeypatch):
    monkeypatch.setattr("daaswarm.net.dataplane.HANDSHAKE_S", 0.1)
    async with peer(1) as relay:
        slow = await open_end(relay, encode_opening(b"x" * 32)[:20])
        assert await is_closed(slow)
        assert not relay._shaking


async def test_a_relay_closes_circuits_that_idle_or_pass_too_much(monkeypatch):
    monkeypatch.setattr("daaswarm.net.relaying.CIRCUIT_BYTES", 1000)
    async with swarm(listen=[]) as (relay, target, one):
        desk = relay.meetings.relay.desk

        async def open_both() -> list[trio.SocketStream]:
            desk.meet(one.peer_id, "o", target.peer_id, (b"a" * 32, b"b" * 32), trio.current_time())
            return [await open_end(relay, encode_opening(token * 32)) for token in (b"a", b"b")]

        ends = await open_both()
        await ends[0].send_all(b"x" * 1001)
        assert await is_closed(ends[1])
        monkeypatch.setattr("daaswarm.net.relaying.CIRCUIT_IDLE_S", 0.05)
        while desk.circuits:
            await trio.lowlevel.checkpoint()
        ends = await open_both()
        assert await is_closed(ends[0]) and await is_closed(ends[1])
        # Nor does an end that reads nothing hold one: the other's bytes pile up, and nothing moves.
        monkeypatch.setattr("daaswarm.net.relaying.CIRCUIT_BYTES", 1 << 40)
        while desk.circuits:
            await trio.lowlevel.checkpoint()
        ends = await open_both()
        with trio.fail_after(8), pytest.raises(trio.BrokenResourceError):
            while True:
                await ends[0].send_all(bytes(1 << 20))
        while desk.circuits:
            await trio.lowlevel.checkpoint()


async def test_what_a_relay_refuses():
    async with swarm(listen=[]) as (relay, target, one):
        service = relay.meetings.relay
        with pytest.raises(Unreachable, match="holds no reservation at this relay"):
            await target.call(Contact(peer_id=one.peer_id, addrs=[get_circuit(relay, one)]), Ping(), deadline_s=5)
        service.is_on = False
        with pytest.raises(Unreachable, match="is no relay"):
            await one.connect(get_contact(target))
        with pytest.raises(RelayRefused):
            await one.call(relay.contact, Reserve(), deadline_s=5)
        service.is_on = True
        # The target forgot its reservation: it comes for nobody.
        target.circuits.relays.clear()
        with pytest.raises(Unreachable, match="does not come"):
            await one.connect(Contact(peer_id=target.peer_id, addrs=[get_circuit(relay, target)]))
        await target.disconnect(relay.peer_id, "gone")
        while relay.is_connected(target.peer_id):
            await trio.lowlevel.checkpoint()
        with pytest.raises(Unreachable, match="is not connected with this relay"):
            await one.connect(Contact(peer_id=target.peer_id, addrs=[get_circuit(relay, target)]))
        assert service.desk.circuits == 0 and not service.desk.reservations
        service.desk.validate()


def get_circuit(relay: TcpNetwork, target: TcpNetwork) -> str:
    assert relay.contact is not None
    return f"{relay.contact.addrs[0]}/p2p-circuit/p2p/{target.peer_id}"


async def test_a_flood_of_meetings_is_told_to_wait():
    async with swarm(listen=[]) as (relay, target, one):
        target.circuits.relays.clear()  # it answers each invitation with a refusal
        refusals: list[DaaswarmError] = []
        for _ in range(40):
            with pytest.raises(DaaswarmError) as caught:
                await one.call(relay.contact, Meet(target=target.peer_id), deadline_s=5)
            refusals.append(caught.value)
        busy = [error for error in refusals if isinstance(error, Busy)]
        assert len(busy) >= 40 - 16 - 8 and all(error.retry_after_s > 0 for error in busy)
        assert relay.meetings.relay.desk.circuits == 0


async def test_only_a_relay_with_our_reservation_may_invite():
    async with swarm(listen=[]) as (relay, target, one):
        await ping(one, get_contact(target))
        back = Contact(peer_id=target.peer_id, addrs=[])
        invite = Invite(peer=relay.peer_id, host="127.0.0.1", addrs=relay.direct_addrs, token=b"x" * 32)
        with pytest.raises(RelayRefused):
            await one.call(back, invite, deadline_s=5)  # over the circuit, by no relay of the target's


def test_no_invitation_makes_a_node_dial_a_victim():
    asker = get_identity(3).peer_id
    addrs = [
        "/ip4/198.51.100.7/tcp/80",  # somebody else
        "/ip4/192.0.2.9/tcp/4001",  # where the relay sees the asker
        f"/ip4/192.0.2.9/tcp/4002/p2p/{get_identity(4).peer_id}",  # another peer
        "/dns4/victim.example/tcp/4001",
    ]
    invite = Invite(peer=asker, host="192.0.2.9", addrs=addrs, token=bytes(32))
    own = ["/ip4/10.1.2.3/tcp/4001", "/ip4/127.0.0.1/tcp/4001"]
    far = "/ip4/198.51.100.1/tcp/4001"
    assert get_dialable(invite, far, own) == ["/ip4/192.0.2.9/tcp/4001"]
    lan = ["/ip4/10.1.2.200/tcp/1", "/ip4/10.1.3.200/tcp/1", "/ip4/127.0.0.1/tcp/6379", "nonsense"]
    for host, relay, expected in (
        ("not an address", far, []),
        ("192.0.2.9", far, [0]),  # on this machine's own network, whatever the relay sees
        ("10.1.3.200", far, [0]),  # a relay in the internet sees nobody there
        ("10.1.3.200", "/ip4/10.1.9.9/tcp/4001", [0, 1]),  # one that is inside may
        ("127.0.0.1", far, [0]),
        ("127.0.0.1", "/ip4/10.1.9.9/tcp/4001", [0]),
        ("127.0.0.1", "/dns4/relay.example/tcp/4001", [0]),
        ("127.0.0.1", "/ip4/127.0.0.1/tcp/4001", [0, 2]),  # one on this machine may too
    ):
        invite = Invite(peer=asker, host=host, addrs=lan, token=bytes(32))
        assert get_dialable(invite, relay, own) == [lan[i] for i in expected], (host, relay)
    disguises = "64:ff9b::a01:2c8", "64:ff9b:1::a01:2c8", "2002:a01:2c8::1"
    for host in ("0.0.0.0", "224.0.0.1", "::ffff:127.0.0.1", *disguises):
        kind = "ip6" if ":" in host else "ip4"
        invite = Invite(peer=asker, host=host, addrs=[f"/{kind}/{host}/tcp/1"], token=bytes(32))
        assert get_dialable(invite, far, own) == []


async def test_who_comes_through_a_relay_must_be_who_was_asked_for():
    async with swarm(listen=[]) as (relay, target, one), peer(4, listen=[]) as other:
        await reserve(other, relay)
        service = relay.meetings.relay
        real = relay.get_direct
        relay.get_direct = lambda wanted: real(other.peer_id if wanted == target.peer_id else wanted)  # type: ignore[method-assign]
        with pytest.raises(DaaswarmError, match="not as"):
            await one.connect(get_contact(target))
        while service.desk.circuits:
            await trio.lowlevel.checkpoint()
        assert not one.is_connected(other.peer_id)


# -- failures -------------------------------------------------------------------------------------------------------


async def test_a_dying_relay_ends_calls_and_another_takes_over():
    async with (
        peer(2, listen=[]) as target,
        peer(3, listen=[]) as one,
        peer(5) as second,
        trio.open_nursery() as nursery,
    ):
        dead = trio.Event()
        first = await nursery.start(run_until, dead)
        await reserve(target, first)
        await reserve(target, second)
        contact = get_contact(target)
        await ping(one, contact)
        connection = one.get(target.peer_id)
        assert connection is not None and first.peer_id in connection.remote_addr
        failures: list[DaaswarmError] = []

        async def ask() -> None:
            try:
                await one.call(contact, FindNode(target=bytes(32)), deadline_s=20)  # serve sleeps on it
            except DaaswarmError as error:
                failures.append(error)

        nursery.start_soon(ask)
        while not connection._session.own_calls:
            await trio.lowlevel.checkpoint()
        dead.set()
        while not failures:
            await trio.lowlevel.checkpoint()
        assert isinstance(failures[0], ConnectionLost)
        await ping(one, contact)
        connection = one.get(target.peer_id)
        assert connection is not None and second.peer_id in connection.remote_addr


async def run_until(dead: trio.Event, *, task_status) -> None:
    async with peer(1) as network:
        task_status.started(network)
        await dead.wait()


async def test_check_relay_says_how_it_went():
    async with swarm(listen=[]) as (relay, target, one):
        gone = f"/ip4/127.0.0.1/tcp/1/p2p/{get_identity(8).peer_id}/p2p-circuit/p2p/{target.peer_id}"
        contact = Contact(peer_id=target.peer_id, addrs=["/ip4/127.0.0.1/tcp/1", *get_contact(target).addrs, gone])
        good, bad = await check_relay(one, contact)
        assert (good.how, good.error, good.relay) == ("circuit", None, relay.peer_id)
        assert bad.how == "" and bad.error is not None and "not met through the relay" in bad.error.message
    async with swarm() as (_, target, one):
        assert [check.how for check in await check_relay(one, get_contact(target))] == ["dialled"]
        assert await check_relay(one, Contact(peer_id=target.peer_id, addrs=[])) == []
