"""Multiaddresses: ``/ip4/192.0.2.7/tcp/4001/p2p/12D3Koo...`` ↔ host, port, PeerId."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import NamedTuple

from daaswarm.core.signing import get_public_key
from daaswarm.errors import ConfigError
from daaswarm.messages import Contact
from daaswarm.net.interfaces import LeftOut, choose_own
from daaswarm.types import PeerId

DEFAULT_LISTEN = "/ip4/127.0.0.1/tcp/0"
MAX_CHARS = 256
CIRCUIT = "/p2p-circuit"  # between a relay and the peer that is reached through it
EXAMPLE = "write it like /ip4/192.0.2.7/tcp/4001/p2p/12D3Koo..."

_HOST_PROTOCOLS = ("ip4", "ip6", "dns", "dns4", "dns6")


class Address(NamedTuple):
    protocol: str  # ip4, ip6, dns, dns4 or dns6
    host: str
    port: int
    peer_id: PeerId | None
    relay: PeerId | None = None  # then host and port are the relay's, through which ``peer_id`` is reached

    def __str__(self) -> str:
        return format_address(self)


def parse_address(text: str) -> Address:
    """Raises:
    ConfigError: not a multiaddress of a TCP port, with the reason.
    """
    from multiaddr import Multiaddr
    from multiaddr.exceptions import Error as MultiaddrError

    shown = repr(text[:MAX_CHARS])
    if len(text) > MAX_CHARS or not text.startswith("/"):
        raise ConfigError(f"{shown} is not a multiaddress", hint=EXAMPLE)
    try:
        parts = [(protocol.name, value or "") for protocol, value in Multiaddr(text).items()]
    except (MultiaddrError, ValueError, LookupError, TypeError) as error:
        reason = str(error).removeprefix(f"Invalid MultiAddr {text!r}: ").removesuffix(f" (string: {text})")
        raise ConfigError(f"{shown} is not a multiaddress: {reason}", hint=EXAMPLE) from error
    names = [name for name, _ in parts]
    if not names or names[0] not in _HOST_PROTOCOLS:
        raise ConfigError(f"{shown} names no host", hint=f"begin with /ip4/, /ip6/ or /dns4/; {EXAMPLE}")
    if len(names) < 2 or names[1] != "tcp":
        raise ConfigError(f"{shown} names no TCP port", hint=EXAMPLE)
    if names[2:] not in ([], ["p2p"], ["p2p", "p2p-circuit", "p2p"]):
        raise ConfigError(f"{shown}: /{'/'.join(names[2:])} is not supported", hint=EXAMPLE)
    peers = [PeerId(value) for name, value in parts if name == "p2p"]
    for peer in peers:
        get_public_key(peer)  # refuses what isn't an Ed25519 PeerId
    relay = peers[0] if len(peers) == 2 else None
    return Address(names[0], str(parts[0][1]), int(parts[1][1]), peers[-1] if peers else None, relay)


def format_address(address: Address) -> str:
    text = f"/{address.protocol}/{address.host}/tcp/{address.port}"
    if address.relay:
        text += f"/p2p/{address.relay}{CIRCUIT}"
    return f"{text}/p2p/{address.peer_id}" if address.peer_id else text


def get_host_address(host: str, port: int, peer_id: PeerId | None = None) -> Address:
    """The address of an IP address or name as sockets give it."""
    host = host.partition("%")[0]  # an IPv6 zone is of no use to others
    try:
        protocol = f"ip{ipaddress.ip_address(host).version}"
    except ValueError:
        protocol = "dns4"
    return Address(protocol, host, port, peer_id)


def get_origin(host: str) -> str:
    """Whom to count an IP address under: itself, or its /64 for IPv6, where one machine has all of them."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.version == 4:
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address.packed[:8] + bytes(8), 64)))


def parse_contact(text: str) -> Contact:
    """``/ip4/.../tcp/.../p2p/ID`` → the contact it names.

    Raises:
        ConfigError: not a multiaddress, or one without a PeerId.
    """
    address = parse_address(text)
    if address.peer_id is None:
        raise ConfigError(f"{text!r} names no peer", hint="end it with /p2p/ and the peer's id, as its node printed it")
    return Contact(peer_id=address.peer_id, addrs=[text])


def get_announce_addrs(
    listen: Sequence[Address], announce: Sequence[str], peer_id: PeerId, interfaces: Sequence[str] = ()
) -> list[str]:
    """What others are told to dial: ``announce`` if given, else the bound addresses; each with ``/p2p/ID``.

    An unspecified address (0.0.0.0, ::) is replaced by this machine's own addresses that mean something to others
    (:mod:`daaswarm.net.interfaces`).

    Raises:
        ConfigError: an address to announce is bad, or names another peer.
    """
    addresses: list[Address] = []
    for text in announce:
        address = parse_address(text)
        if address.peer_id not in (None, peer_id):
            raise ConfigError(
                f"cannot announce {text!r}: this node is {peer_id}", hint="leave /p2p/... away; it's added"
            )
        addresses.append(address)
    if not addresses:
        for address in listen:
            addresses.extend(_get_reachable(address, interfaces))
    unique = dict.fromkeys(str(address._replace(peer_id=peer_id)) for address in addresses)
    for text in unique:
        if len(text) > MAX_CHARS:
            raise ConfigError(f"{text!r} is longer than {MAX_CHARS} letters", hint="announce a shorter name")
    return list(unique)[:8]


def find_left_out(listen: Sequence[Address], interfaces: Sequence[str] = ()) -> list[LeftOut]:
    """Own addresses that others aren't told, and why, where a node listens on all that the machine has."""
    versions = {int(each.protocol[2]) for each in listen if is_unspecified(each)}
    return [left for version in sorted(versions) for left in choose_own(version, interfaces).left_out]


def is_ip(host: str) -> bool:
    """Whether it is an IP address, and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether it means the machine that asks, whichever that is."""
    return host == "localhost" or (is_ip(host) and ipaddress.ip_address(host).is_loopback)


def is_unspecified(address: Address) -> bool:
    """Whether it stands for all addresses of the machine."""
    return address.protocol.startswith("ip") and ipaddress.ip_address(address.host).is_unspecified


def _get_reachable(address: Address, interfaces: Sequence[str]) -> list[Address]:
    if not is_unspecified(address):
        return [address]
    return [address._replace(host=host) for host in choose_own(int(address.protocol[2]), interfaces).hosts]
