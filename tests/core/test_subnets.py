"""Which network an address counts for."""

from __future__ import annotations

import pytest

from daaswarm.core.subnets import get_subnet, get_subnets

CASES = {
    "/ip4/8.8.8.8/tcp/4001": "8.8.8.0/24",
    "/ip4/8.8.8.9/tcp/1/p2p/12D3": "8.8.8.0/24",
    "/ip6/2001:4860:4860::8888/tcp/1": "2001:4860:4860::/64",
    "/ip6/::ffff:8.8.8.8/tcp/1": "8.8.8.0/24",
    "/dns4/a.b.Example.net/tcp/1": "example.net",
    "/dns/host./tcp/1": "host",
    "/ip4/127.0.0.1/tcp/1": "",
    "/ip4/10.1.2.3/tcp/1": "",
    "/ip4/192.168.0.7/tcp/1": "",
    "/ip4/100.64.0.1/tcp/1": "",
    "/ip4/169.254.1.1/tcp/1": "",
    "/ip6/::1/tcp/1": "",
    "/ip6/fd00::1/tcp/1": "",
    "/ip6/fe80::1/tcp/1": "",
    "/ip4/8.8.8/tcp/1": "",
    "/ip4": "",
    "": "",
    "8.8.8.8:1": "",
    "/unix/8.8.8.8": "",
}


@pytest.mark.parametrize("addr", CASES)
def test_an_address_counts_for_its_public_network(addr: str) -> None:
    assert get_subnet(addr) == CASES[addr]


def test_a_contact_counts_once_for_each_network() -> None:
    assert get_subnets(CASES) == ("8.8.8.0/24", "2001:4860:4860::/64", "example.net", "host")
