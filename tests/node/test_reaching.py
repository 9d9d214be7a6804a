"""Nodes that others can't dial: their listeners refuse whoever comes, as a NAT does."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from daaswarm.cli.status import describe_reachability
from daaswarm.config import Config, HostConfig, NetworkConfig
from daaswarm.core.kademlia_events import LookupDone
from daaswarm.core.routing_table import get_node_id
from daaswarm.errors import Busy, ConnectionLost, DaaswarmError, RelayRefused, RemoteProtocolError, Unreachable
from daaswarm.messages import CheckReach, Contact, Moved, Ping, Pong, Reached, Reserve
from daaswarm.net.addresses import parse_address
from daaswarm.net.circuits import is_circuit
from daaswarm.net.dataplane import TcpNetwork
from daaswarm.node.coordinator import SwarmCoordinator
from daaswarm.node.life import open_node
from daaswarm.node.reaching import ADDRESSES_S, LOST_S
from daaswarm.store.data_dir import DataDir
from daaswarm.types import ModelRoot, PeerId
from tests.node.node_helpers import deploy


@contextlib.asynccontextmanager
async def node(
    folder: Path, bootstrap: SwarmCoordinator | None = None, *, refuses: bool = False, relay: bool = True
) -> AsyncIterator[SwarmCoordinator]:
    config = Config(network=NetworkConfig(libp2p=False, relay=relay), host=HostConfig(threads=1))
    async with open_node(DataDir(folder), config, listen=True, libp2p=False, is_owner=True) as opened:
        opened.reaching._is_local = False  # loopback stands for the world here
        if refuses:
            opened.network._serve_socket = refuse  # type: ignore[method-assign]
        if bootstrap is not None:
            await opened.bootstrap(bootstrap.addrs)
        yield opened


async def refuse(sock: socket.socket) -> None:
    trio.lowlevel.notify_closing(sock.fileno())
    sock.close()


async def look(*nodes: SwarmCoordinator) -> None:
    """One look of each, and until everybody it tells has heard."""
    for one in nodes:
        async with trio.open_nursery() as nursery:
            await one.reaching.look(nursery)


def get_circuits(one: SwarmCoordinator) -> list[str]:
    return [addr for addr in one.addrs if is_circuit(addr)]


async def ping(one: SwarmCoordinator, other: SwarmCoordinator) -> None:
    contact = Contact(peer_id=other.peer_id, addrs=other.addrs)
    assert isinstance((await one.network.call(contact, Ping(), deadline_s=5))[0], Pong)


async def test_who_can_be_dialled_knows_it_and_relays(tmp_path: Path) -> None:
    async with node(tmp_path / "a") as a, node(tmp_path / "b", a) as b:
        await look(a, b)
        for one in (a, b):
            found = one.reaching.describe()
            assert (found["verdict"], found["relays"], found["is_relay"]) == ("reachable", [], True)
            assert found["seen_at"] == ["127.0.0.1"] and get_circuits(one) == []
        assert describe_reachability(b.reaching.describe()) == ["yes, seen at 127.0.0.1"]


async def test_who_cannot_be_dialled_is_found_and_met_through_relays(tmp_path: Path, moe: Path) -> None:
    async with (
        node(tmp_path / "a") as a,
        node(tmp_path / "b", a) as b,
        node(tmp_path / "hidden", a, refuses=True) as hidden,
    ):
        root = ModelRoot((await deploy(hidden, moe, layers="0"))["model_root"])
        await look(a, b, hidden)
        await look(hidden)  # the second relay was only connected with
        found = hidden.reaching.describe()
        assert found["verdict"] == "unreachable" and not found["is_relay"]
        assert {r["peer_id"] for r in found["relays"]} == {a.peer_id, b.peer_id}
        assert len(get_circuits(hidden)) == 2
        assert hidden.reaching.get_lines()[0].endswith("it is met through 2 relays") and a.reaching.get_lines() == []
        assert "no: behind a NAT or firewall" in describe_reachability(found)[0]
        assert describe_reachability(a.reaching.describe())[1].startswith("relays for 1 peers")

        # Those who are connected hear it, and so does who looks.
        assert any(c.addrs == hidden.addrs for c in a.discovery.get_known())
        async with node(tmp_path / "asker", b) as asker:
            done: LookupDone = await asker.discovery.lookup(get_node_id(hidden.peer_id), "nodes")
            assert any(c.addrs == hidden.addrs for c in done.contacts)
            [known] = await asker.discovery.find_adverts(root)
            assert known.advert.addrs == hidden.addrs
            assert not asker.network.get_direct(hidden.peer_id).is_client  # it dialled the asker, who can be
            assert hidden.reaching.describe()["dialled_back"] == 1
        async with node(tmp_path / "other", refuses=True) as other:
            other.network.circuits.is_dialable = False
            await ping(other, hidden)
            connection = other.network.get(hidden.peer_id)
            assert connection is not None and connection.is_relayed
            peers = (await other.control("peers", {}, quiet))["peers"]
            assert [p["relayed"] for p in peers if p["peer_id"] == hidden.peer_id] == [True]

            # Once it can be dialled, a connection without the relay takes the other's place.
            del hidden.network._serve_socket
            await other.network.circuits.improve(connection)
            assert not other.network.get(hidden.peer_id).is_relayed and not connection.is_open
            await other.network.disconnect(hidden.peer_id, "again")
            circuits = Contact(peer_id=hidden.peer_id, addrs=get_circuits(hidden))
            await other.network.connect(circuits)
            other.network.note_contact(circuits)
            with pytest.raises(Unreachable, match="neither"):
                await other.network.circuits.improve(other.network.get(hidden.peer_id))


async def quiet(event: object) -> None:
    """Nobody listens."""


async def test_a_lost_relay_is_replaced_and_a_refusal_remembered(tmp_path: Path) -> None:
    async with (
        node(tmp_path / "a") as a,
        node(tmp_path / "b", a) as b,
        node(tmp_path / "no", a, relay=False) as no,
        node(tmp_path / "hidden", a, refuses=True) as hidden,
    ):
        await look(a, b, no, hidden)
        await look(hidden)
        assert set(hidden.network.circuits.relays) == {a.peer_id, b.peer_id}
        assert not no.reaching.describe()["is_relay"]
        with pytest.raises(RelayRefused):
            await hidden.network.call(Contact(peer_id=no.peer_id, addrs=no.addrs), Reserve(), deadline_s=5)
        await a.network.disconnect(hidden.peer_id, "gone")
        a.network._serve_socket = refuse  # type: ignore[method-assign]
        while hidden.network.is_connected(a.peer_id):
            await trio.lowlevel.checkpoint()
        await look(hidden)
        assert set(hidden.network.circuits.relays) == {b.peer_id}
        assert len(get_circuits(hidden)) == 1 and str(b.peer_id) in get_circuits(hidden)[0]
        assert hidden.peer_id in a.network.meetings.relay.desk.reservations
        # When it can be dialled after all, it gives the other up too.
        del hidden.network._serve_socket
        hidden.reaching.reach.clear()
        await look(hidden)
        assert hidden.reaching.describe()["verdict"] == "reachable" and get_circuits(hidden) == []
        assert not hidden.network.circuits.relays and hidden.network.circuits.is_dialable


async def test_a_relay_that_comes_and_goes_is_not_announced_each_time(tmp_path: Path) -> None:
    async with node(tmp_path / "a") as a, node(tmp_path / "hidden", a, refuses=True) as hidden:
        await look(a, hidden)
        told = 0
        for _ in range(6):
            before = hidden.addrs
            for connection in a.network.connections:
                connection.close(ConnectionLost("a whim"))
            while hidden.network.is_connected(a.peer_id):
                await trio.lowlevel.checkpoint()
            for _ in range(2):
                await look(hidden)
                told += hidden.addrs != before
                before = hidden.addrs
        assert told == 1 and get_circuits(hidden) == []
        hidden.reaching._refused[a.peer_id] = trio.current_time()  # a minute later
        await look(hidden)
        await look(hidden)
        assert len(get_circuits(hidden)) == 1
        for held in hidden.reaching._held.values():  # one that was held for long is asked again at once
            held.since -= LOST_S
        await a.network.disconnect(hidden.peer_id, "gone")
        while hidden.network.is_connected(a.peer_id):
            await trio.lowlevel.checkpoint()
        await look(hidden)
        await look(hidden)
        assert len(get_circuits(hidden)) == 1


async def test_what_the_local_network_says_of_a_peer_is_not_passed_on(tmp_path: Path) -> None:
    async with node(tmp_path / "a") as a, node(tmp_path / "b", a) as b:
        evil = "/ip4/192.0.2.66/tcp/666"
        for addrs in ([evil], [evil, *b.addrs]):
            await a.meet(Contact(peer_id=b.peer_id, addrs=addrs))
            assert [contact.addrs for contact in a.discovery.kademlia._met] == [b.addrs]
            a.discovery.kademlia._met.clear()
            await a.network.disconnect(b.peer_id, "once more")


async def test_reservations_are_renewed_and_kept_open(tmp_path: Path) -> None:
    async with node(tmp_path / "a") as a, node(tmp_path / "hidden", a, refuses=True) as hidden:
        await look(a, hidden)
        [held] = hidden.reaching._held.values()
        assert held.connection.is_kept and a.network.get_direct(hidden.peer_id).is_kept
        due = held.renew_at
        held.renew_at = 0.0
        await look(hidden)
        [renewed] = hidden.reaching._held.values()
        assert renewed.renew_at >= due
        a.network.meetings.relay.is_on = False
        renewed.renew_at = 0.0
        await look(hidden)
        assert get_circuits(hidden) == [] and not held.connection.is_kept


async def test_a_relay_with_a_long_name_does_not_cut_a_node_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No peer reads a contact with an address beyond its limit: not in a handshake, a pointer or an advert."""
    name = ".".join(["a" * 30] * 5) + ".example.net"
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest: real("127.0.0.1" if host == name else host, *rest))
    async with node(tmp_path / "a") as a, node(tmp_path / "hidden", refuses=True) as hidden:
        port = parse_address(a.addrs[0]).port
        await hidden.bootstrap([f"/dns4/{name}/tcp/{port}/p2p/{a.peer_id}"])
        await look(hidden)
        assert get_circuits(hidden) == [f"{a.addrs[0]}/p2p-circuit/p2p/{hidden.peer_id}"]
        async with node(tmp_path / "b", a) as b:
            await ping(hidden, b)
            await ping(b, hidden)


@pytest.mark.parametrize("host", ["2001:db8::1%\x1b[2J", "::1%\n"])
async def test_what_a_peer_calls_an_address_reaches_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    async with node(tmp_path / "a") as a, node(tmp_path / "b", a) as b:

        async def lie(self: object, peer: PeerId, message: CheckReach) -> Reached:
            return Reached(host=host, ports=message.ports)

        monkeypatch.setattr("daaswarm.net.dialling_back.DialBack.answer", lie)
        await look(b)
        assert b.reaching.describe()["seen_at"] == []


async def test_dialling_back_dials_nobody_else(tmp_path: Path) -> None:
    async with node(tmp_path / "a") as a, node(tmp_path / "b", a) as b:
        contact = Contact(peer_id=a.peer_id, addrs=a.addrs)
        own, others = (parse_address(one.addrs[0]).port for one in (b, a))
        with socket.create_server(("127.0.0.1", 0)) as silent:
            before = len(b.network.connections)
            ask = CheckReach(ports=[own, others, silent.getsockname()[1]])
            reply, _ = await b.network.call(contact, ask, deadline_s=10)
            # Another node answers at its own port, but isn't who asked.
            assert reply == Reached(host="127.0.0.1", ports=[own])
            while len(b.network.connections) > before:
                await trio.lowlevel.checkpoint()
        with pytest.raises(Busy) as caught:
            for _ in range(5):
                await b.network.call(contact, CheckReach(ports=[1]), deadline_s=10)
        assert caught.value.retry_after_s > 1


async def test_what_needs_a_direct_connection_is_refused_through_a_relay(tmp_path: Path) -> None:
    async with (
        node(tmp_path / "a") as a,
        node(tmp_path / "hidden", a, refuses=True) as hidden,
        node(tmp_path / "other", refuses=True) as other,
    ):
        await look(a, hidden)
        other.network.circuits.is_dialable = False
        await ping(other, hidden)
        contact = Contact(peer_id=hidden.peer_id, addrs=[])
        with pytest.raises(RemoteProtocolError, match="direct connection"):
            await other.network.call(contact, CheckReach(ports=[80]), deadline_s=5)
        hidden.network.meetings.relay.is_on = True
        with pytest.raises(RelayRefused, match="direct connection"):
            await other.network.call(contact, Reserve(), deadline_s=5)


async def test_new_addresses_are_told(tmp_path: Path, moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []

    async def check(self: TcpNetwork) -> None:
        checked.append(len(self.connections))

    monkeypatch.setattr(TcpNetwork, "check_connections", check)
    async with node(tmp_path / "a") as a, node(tmp_path / "b", a) as b:
        root = ModelRoot((await deploy(b, moe, layers="0"))["model_root"])
        await look(b)
        assert checked == []
        new = [*b.addrs, f"/ip4/127.0.0.2/tcp/{parse_address(b.addrs[0]).port}/p2p/{b.peer_id}"]
        b.network.get_own_addrs = lambda: new
        b.reaching._looked_at -= ADDRESSES_S
        await look(b)
        assert checked == [1] and b.addrs == new
        assert [c.addrs for c in a.discovery.get_known()] == [new]
        assert a.network.get(b.peer_id).peer.contact.addrs == new
        [known] = await a.discovery.find_adverts(root)
        assert known.advert.addrs == new


async def test_a_forwarded_port_is_announced_when_two_have_reached_it(tmp_path: Path) -> None:
    async with node(tmp_path / "a") as a:
        reach = a.reaching.reach
        now = trio.current_time()
        reach.note("one", "203.0.113.7", [4001], {"127.0.0.1"}, now)
        reach.note_round(now)
        before = a.addrs
        await look(a)
        assert a.addrs == before and a.reaching._needs_relay()
        reach.note("two", "203.0.113.7", [4001], {"127.0.0.1"}, now)
        await look(a)
        assert a.addrs == [f"/ip4/203.0.113.7/tcp/4001/p2p/{a.peer_id}", *before]
        assert not a.reaching._needs_relay()


async def test_two_liars_neither_fill_a_contact_nor_put_nonsense_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(tmp_path / "a") as a, node(tmp_path / "b", a) as b:
        for origin in ("one", "two"):
            b.reaching.reach.note(origin, "203.0.113.7", range(1, 9), {"127.0.0.1"}, trio.current_time())
        b.reaching.reach.note_round(trio.current_time())
        own = b.addrs
        await look(b)
        assert b.addrs[2:] == own and b.addrs[0].startswith("/ip4/203.0.113.7/")
        b.reaching.reach.clear()

        async def lie(self: object, peer: PeerId, message: CheckReach) -> Reached:
            return Reached(host="evil.example/tcp/1", ports=message.ports)

        monkeypatch.setattr("daaswarm.net.dialling_back.DialBack.answer", lie)
        await look(b)
        assert b.reaching.describe()["seen_at"] == [] and b.addrs == own


async def test_nobody_moves_another_peer(tmp_path: Path) -> None:
    async with node(tmp_path / "a") as a, node(tmp_path / "b", a) as b:
        contact = Contact(peer_id=a.peer_id, addrs=a.addrs)
        victim = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
        with pytest.raises(DaaswarmError):
            await b.network.call(contact, Moved(contact=Contact(peer_id=victim, addrs=[])), deadline_s=5)
        assert PeerId(victim) not in {c.peer_id for c in a.discovery.get_known()}


async def test_a_node_of_this_machine_only_asks_nobody(tmp_path: Path) -> None:
    config = Config(network=NetworkConfig(libp2p=False))
    async with open_node(DataDir(tmp_path / "a"), config, listen=True, libp2p=False, is_owner=True) as a:
        await look(a)
        assert a.reaching.describe()["verdict"] == "local"
        assert describe_reachability(a.reaching.describe()) == ["from this machine only"]
    async with open_node(DataDir(tmp_path / "b"), config, listen=False, libp2p=False) as b:
        assert b.reaching.describe()["verdict"] == "not_listening" and not b.reaching.describe()["is_relay"]
