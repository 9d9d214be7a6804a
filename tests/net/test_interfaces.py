"""Which addresses others are told."""

from __future__ import annotations

import ipaddress

import pytest

from daaswarm.net.interfaces import (
    OUTSIDE,
    Interface,
    choose,
    choose_own,
    read_interfaces,
    read_networks,
    read_own_hosts,
)

LOOPBACK = Interface("lo", "127.0.0.1")
LAN = Interface("eth0", "192.168.1.7")
PUBLIC = Interface("eth1", "203.0.113.9")
TUNNEL = Interface("wg0", "10.8.0.2")
DOCKER = Interface("docker0", "172.17.0.1")


def test_public_addresses_come_first_and_loopback_not_at_all() -> None:
    choice = choose([LOOPBACK, LAN, PUBLIC], 4)
    assert choice.hosts == ["203.0.113.9", "192.168.1.7"] and not choice.left_out


def test_loopback_where_there_is_nothing_else() -> None:
    assert choose([LOOPBACK, DOCKER], 4).hosts == ["127.0.0.1"]
    assert choose([], 4).hosts == []


def test_of_the_private_ones_that_which_leads_outside_comes_first() -> None:
    other = Interface("eth2", "10.0.0.5")
    assert choose([other, LAN], 4, outside="192.168.1.7").hosts == ["192.168.1.7", "10.0.0.5"]


@pytest.mark.parametrize(
    ("interface", "reason"),
    [
        (DOCKER, "a bridge of containers"),
        (Interface("br-51f2c0a1b2c3", "172.18.0.1"), "a bridge of containers"),
        (Interface("veth12ab", "10.1.1.1"), "one end of a virtual cable"),
        (Interface("virbr0", "192.168.122.1"), "a bridge of virtual machines"),
        (TUNNEL, "a tunnel"),
        (Interface("tailscale0", "100.101.102.103"), "a tunnel"),
        (Interface("utun3", "10.9.0.1"), "a tunnel"),
        (Interface("eth0", "169.254.3.4"), "means nothing beyond its cable"),
        (Interface("eth0", "192.168.1.8", is_up=False), "down"),
    ],
)
def test_what_is_left_out_and_why(interface: Interface, reason: str) -> None:
    choice = choose([interface, LOOPBACK, PUBLIC], 4)
    assert choice.hosts == [PUBLIC.host]
    assert [left.reason for left in choice.left_out] == [reason]


@pytest.mark.parametrize("name", ["br-lan", "ppp0", "veth0"])
def test_what_leads_outside_is_told_whatever_its_name(name: str) -> None:
    found = Interface(name, "10.0.0.5")
    assert choose([LOOPBACK, found], 4, outside=found.host).hosts == [found.host]
    assert choose([LOOPBACK, LAN, found], 4, outside=LAN.host).hosts == [LAN.host]


def test_a_tunnel_that_all_goes_through_is_not_told() -> None:
    choice = choose([LOOPBACK, LAN, TUNNEL], 4, outside=TUNNEL.host)
    assert choice.hosts == [LAN.host] and [left.host for left in choice.left_out] == [TUNNEL.host]


def test_the_owner_has_the_last_word() -> None:
    choice = choose([LOOPBACK, LAN, PUBLIC, TUNNEL, DOCKER], 4, wanted=["wg*"])
    assert choice.hosts == [TUNNEL.host]
    assert {left.reason for left in choice.left_out} == {"not in network.interfaces"}


def test_versions_are_not_mixed() -> None:
    six = Interface("eth0", "2001:db8::5")
    assert choose([LAN, six, Interface("eth0", "fe80::1")], 6).hosts == ["2001:db8::5"]
    assert choose([LAN, six], 4).hosts == [LAN.host]


def test_this_machine() -> None:
    assert any(interface.host == "127.0.0.1" for interface in read_interfaces())
    (*_, host) = choose_own(4).hosts
    assert ipaddress.ip_address(host).version == 4


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> list[Interface]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("daaswarm.net.interfaces.read_interfaces", refuse)
    monkeypatch.setattr("daaswarm.net.interfaces.find_source", lambda host: "192.0.2.9")
    assert choose_own(4).hosts == ["192.0.2.9"]
    monkeypatch.setattr("daaswarm.net.interfaces.find_source", lambda host: "")
    assert choose_own(4).hosts == ["127.0.0.1"] and choose_own(6).hosts == ["::1"]


def test_a_system_that_tells_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> dict[str, object]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("psutil.net_if_addrs", refuse)
    monkeypatch.setattr("daaswarm.net.interfaces.find_source", lambda host: "192.0.2.9" if host in OUTSIDE[4] else "")
    assert read_networks() == [] and read_own_hosts() == {"192.0.2.9"}
