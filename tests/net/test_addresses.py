from __future__ import annotations

import pytest
from net_helpers import get_identity

from daaswarm.errors import ConfigError
from daaswarm.net.addresses import Address, get_announce_addrs, get_origin, parse_address, parse_contact

PEER, OTHER = get_identity(1).peer_id, get_identity(2).peer_id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/ip4/192.0.2.7/tcp/4001", ("ip4", "192.0.2.7", 4001, None)),
        (f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}", ("ip4", "192.0.2.7", 4001, PEER)),
        (f"/ip6/::1/tcp/1/p2p/{PEER}", ("ip6", "::1", 1, PEER)),
        (f"/dns4/example.org/tcp/443/p2p/{PEER}", ("dns4", "example.org", 443, PEER)),
        (f"/ip4/192.0.2.7/tcp/4001/p2p/{OTHER}/p2p-circuit/p2p/{PEER}", ("ip4", "192.0.2.7", 4001, PEER, OTHER)),
    ],
)
def test_round_trip(text, expected):
    assert parse_address(text) == Address(*expected)
    assert str(Address(*expected)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "192.0.2.7:4001",
        "/",
        "/ip4/192.0.2.7",
        "/ip4/999.0.2.7/tcp/1",
        "/ip4/192.0.2.7/tcp/99999",
        "/ip4/192.0.2.7/tcp/x",
        "/ip4/192.0.2.7/udp/4001/quic-v1",
        "/ip4/192.0.2.7/tcp/4001/ws",
        "/tcp/4001",
        "/ip4/192.0.2.7/tcp/4001/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        "/ip4/192.0.2.7/tcp/4001/p2p/12D3KooWgarbage",
        "/ip4/" + "1" * 300 + "/tcp/1",
    ],
)
def test_bad_addresses_are_config_errors_with_a_hint(text):
    with pytest.raises(ConfigError) as info:
        parse_address(text)
    assert info.value.hint


def test_contact_needs_a_peer():
    assert parse_contact(f"/ip4/192.0.2.7/tcp/1/p2p/{PEER}").peer_id == PEER
    with pytest.raises(ConfigError, match="names no peer"):
        parse_contact("/ip4/192.0.2.7/tcp/1")


def test_announce():
    bound = [Address("ip4", "127.0.0.1", 4001, None)]
    assert get_announce_addrs(bound, [], PEER) == [f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}"]
    assert get_announce_addrs(bound, ["/dns4/example.org/tcp/1"], PEER) == [f"/dns4/example.org/tcp/1/p2p/{PEER}"]
    with pytest.raises(ConfigError, match="longer than"):  # with its PeerId; nobody could read the contact
        get_announce_addrs(bound, [f"/dns4/{'.'.join(['a' * 30] * 7)}/tcp/1"], PEER)
    anywhere = get_announce_addrs([Address("ip4", "0.0.0.0", 4001, None)], [], PEER)
    assert anywhere and not any("0.0.0.0" in addr for addr in anywhere)
    assert all(addr.endswith(f"/tcp/4001/p2p/{PEER}") for addr in anywhere)
    none = get_announce_addrs([Address("ip4", "0.0.0.0", 4001, None)], [], PEER, ["no such interface"])
    assert none == [f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}"]
    with pytest.raises(ConfigError, match="this node is"):
        get_announce_addrs(bound, [f"/ip4/192.0.2.7/tcp/1/p2p/{get_identity(2).peer_id}"], PEER)


def test_one_machine_is_one_origin():
    assert get_origin("192.0.2.7") == get_origin("::ffff:192.0.2.7") == "192.0.2.7"
    assert get_origin("2001:db8::1") == get_origin("2001:db8::ffff:1%eth0") != get_origin("2001:db8:0:1::1")
    assert get_origin("::1") != get_origin("2001:db8::1")
