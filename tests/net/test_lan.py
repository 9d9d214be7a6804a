"""Peers of the local network: what is said, what is believed, and two real processes that find each other."""

from __future__ import annotations

import ipaddress
import socket
from typing import cast

import pytest
import trio
import trio.testing
from nacl.signing import SigningKey
from zeroconf import DNSOutgoing, DNSPointer, ServiceInfo, Zeroconf

from daaswarm.core.signing import get_peer_id
from daaswarm.messages import Contact
from daaswarm.net.lan import ADDRESSES, MEET_PER_S, SERVICE, Lan, get_said, read_service

SWARM = bytes(range(32))
PEER = get_peer_id(bytes(SigningKey(bytes(32)).verify_key))
OTHER = get_peer_id(bytes(SigningKey(bytes([1]) * 32).verify_key))


def make(*addrs: str, peer: str = PEER) -> Contact:
    return Contact(peer_id=peer, addrs=[f"{addr}/p2p/{peer}" for addr in addrs])


def test_only_addresses_of_a_local_network_are_said() -> None:
    contact = make(
        "/ip4/192.0.2.7/tcp/4001",
        "/ip4/127.0.0.1/tcp/4001",
        "/ip6/2001:db8::1/tcp/4001",
        "/dns4/example.net/tcp/4001",
        f"/ip4/198.51.100.1/tcp/4001/p2p/{OTHER}/p2p-circuit",
    )
    own = {"192.0.2.7", "127.0.0.1", "2001:db8::1", "198.51.100.1"}
    assert get_said(contact, own) == [("192.0.2.7", 4001)]
    assert get_said(make("/ip4/127.0.0.1/tcp/4001"), own) == get_said(None, own) == []


def test_the_routers_address_is_not_said() -> None:
    routers = [f"/ip4/203.0.113.{number}/tcp/4001" for number in range(ADDRESSES)]
    assert get_said(make(*routers, "/ip4/192.0.2.7/tcp/4001"), {"192.0.2.7"}) == [("192.0.2.7", 4001)]


def describe(name: str = PEER, *, hosts: int = 1, port: int = 4001, **properties: str) -> tuple[str, ServiceInfo]:
    said = {"swarm": SWARM[:8].hex(), "version": "1", **properties}
    addresses = [ipaddress.ip_address(f"192.0.2.{n}").packed for n in range(1, hosts + 1)]
    service = f"{name}.{SERVICE}"
    return service, ServiceInfo(SERVICE, service, port=port, addresses=addresses, properties=said, server="x.local.")


def test_a_service_is_a_contact() -> None:
    name, info = describe()
    assert read_service(name, info, SWARM[:8].hex()) == make("/ip4/192.0.2.1/tcp/4001")


@pytest.mark.parametrize(
    "service",
    [
        describe("no-peer-id"),
        describe(swarm="00" * 8),
        describe(version="99"),
        describe(port=0),
        describe(hosts=0),
    ],
)
def test_what_makes_no_sense_is_passed_over(service: tuple[str, ServiceInfo]) -> None:
    assert read_service(*service, SWARM[:8].hex()) is None


def test_few_addresses_are_taken() -> None:
    name, info = describe(hosts=200)
    contact = read_service(name, info, SWARM[:8].hex())
    assert contact is not None and len(contact.addrs) == ADDRESSES


def find_host() -> str:
    """This machine's own address where multicast leads."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("224.0.0.251", 5353))
        except OSError:
            pytest.skip("no network interface takes multicast here")
        return sock.getsockname()[0]


async def test_two_find_each_other_and_others_do_not() -> None:
    host = find_host()
    mine, theirs, strange = (
        make(f"/ip4/{host}/tcp/{port}", peer=peer)
        for port, peer in ((4001, PEER), (4002, OTHER), (4003, get_peer_id(bytes(SigningKey(b"s" * 32).verify_key))))
    )
    found: dict[str, list[Contact]] = {PEER: [], OTHER: [], strange.peer_id: []}
    done = trio.Event()

    def note(own: Contact) -> Lan:
        async def on_found(contact: Contact) -> None:
            found[own.peer_id].append(contact)
            if found[PEER] and found[OTHER]:
                done.set()

        return Lan(bytes(32) if own is strange else SWARM, lambda: own, on_found)

    with trio.move_on_after(20) as scope:
        async with trio.open_nursery() as nursery:
            for own in (strange, mine, theirs):
                nursery.start_soon(note(own).run)
            await done.wait()
            nursery.cancel_scope.cancel()
    if scope.cancelled_caught:
        pytest.skip("multicast doesn't come back on this machine")
    assert found == {PEER: [theirs], OTHER: [mine], strange.peer_id: []}


async def test_a_network_without_multicast_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    own = make("/ip4/203.0.113.77/tcp/4001")  # not an address of this machine: it can't be bound
    monkeypatch.setattr("daaswarm.net.lan.read_own_hosts", lambda: {"203.0.113.77"})

    async def on_found(contact: Contact) -> None:
        raise AssertionError(contact)

    with trio.move_on_after(2) as scope:
        await Lan(SWARM, lambda: own, on_found).run()
    assert scope.cancelled_caught


def say(host: str, *names: str) -> None:
    """What anybody on a local network can say, whether it makes sense or not."""
    out = DNSOutgoing(0x8400)
    for name in names:
        out.add_answer_at_time(DNSPointer(SERVICE, 12, 1, 4500, f"{name}.{SERVICE}"), 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(host))
        for packet in out.packets():
            sock.sendto(packet, ("224.0.0.251", 5353))


async def test_made_up_names_cost_nothing(caplog: pytest.LogCaptureFixture) -> None:
    host = find_host()
    mine, theirs = make(f"/ip4/{host}/tcp/4001"), make(f"/ip4/{host}/tcp/4002", peer=OTHER)
    done = trio.Event()

    async def on_found(contact: Contact) -> None:
        assert contact == theirs
        done.set()

    async def keep_quiet(contact: Contact) -> None:
        """The other's view."""

    with trio.move_on_after(20) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Lan(SWARM, lambda: mine, on_found).run)
            while not scope.cancel_called:
                say(host, "a\x01b", "x.y", "", PEER, "12D3KooW" + "1" * 44)
                await trio.sleep(0.2)
                if len(nursery.child_tasks) == 1:
                    nursery.start_soon(Lan(SWARM, lambda: theirs, keep_quiet).run)
                if done.is_set():
                    break
            nursery.cancel_scope.cancel()
    if scope.cancelled_caught:
        pytest.skip("multicast doesn't come back on this machine")
    assert "failed" not in caplog.text


async def test_a_flood_of_peers_is_paced(autojump_clock: trio.testing.MockClock) -> None:
    met: list[float] = []

    async def on_found(contact: Contact) -> None:
        met.append(trio.current_time())

    lan = Lan(SWARM, lambda: None, on_found)
    names_in, names_out = trio.open_memory_channel[str](100)
    for number in range(100):
        names_in.send_nowait(f"{get_peer_id(bytes(SigningKey(bytes([number]) * 32).verify_key))}.{SERVICE}")
    names_in.close()

    def resolve(zeroconf: Zeroconf, name: str) -> ServiceInfo:
        return describe(name.removesuffix(f".{SERVICE}"))[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("daaswarm.net.lan._resolve", resolve)
        await lan._ask(cast("Zeroconf", None), names_out)
    assert len(met) == 100 and met[-1] - met[0] >= 100 / MEET_PER_S - 2
