"""Multiaddresses: ``/ip4/192.0.2.7/tcp/4001/p2p/12D3Koo...`` ↔ host, port, PeerId."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import NamedTuple

from daaswarm.core.signing import get_public_key
from daaswarm.errors import ConfigError
from daaswarm.messages import Contact
from daaswarm.types import PeerId

DEFAULT_LISTEN = "/ip4/127.0.0.1/tcp/0"
MAX_CHARS = 256
EXAMPLE = "write it like /ip4/192.0.2.7/tcp/4001/p2p/12D3Koo..."

_HOST_PROTOCOLS = ("ip4", "ip6", "dns", "dns4", "dns6")


class Address(NamedTuple):
    protocol: str  # ip4, ip6, dns, dns4 or dns6
    host: str
    port: int
    peer_id: PeerId | None

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
        raise ConfigError(f"{shown} is not a multiaddress: {error}", hint=EXAMPLE) from error
    names = [name for name, _ in parts]
    if not names or names[0] not in _HOST_PROTOCOLS:
        raise ConfigError(f"{shown} names no host", hint=f"begin with /ip4/, /ip6/ or /dns4/; {EXAMPLE}")
    if len(names) < 2 or names[1] != "tcp":
        raise ConfigError(f"{shown} names no TCP port", hint=EXAMPLE)
    if names[2:] not in ([], ["p2p"]):
        raise ConfigError(f"{shown}: /{names[2]} is not supported", hint=EXAMPLE)
    peer_id = None
    if len(parts) == 3:
        get_public_key(parts[2][1])  # refuses what isn't an Ed25519 PeerId
        peer_id = PeerId(parts[2][1])
    return Address(names[0], str(parts[0][1]), int(parts[1][1]), peer_id)


def format_address(address: Address) -> str:
    text = f"/{address.protocol}/{address.host}/tcp/{address.port}"
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


def get_announce_addrs(listen: Sequence[Address], announce: Sequence[str], peer_id: PeerId) -> list[str]:
    """What others are told to dial: ``announce`` if given, else the bound addresses; each with ``/p2p/ID``.

    An unspecified address (0.0.0.0, ::) is replaced by this machine's own addresses.

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
            addresses.extend(_get_reachable(address))
    unique = dict.fromkeys(str(address._replace(peer_id=peer_id)) for address in addresses)
    return list(unique)[:8]


def _get_reachable(address: Address) -> list[Address]:
    if not address.protocol.startswith("ip") or not ipaddress.ip_address(address.host).is_unspecified:
        return [address]
    return [address._replace(host=host) for host in _get_own_hosts(address.protocol)]


def _get_own_hosts(protocol: str) -> list[str]:
    """The address of the interface that leads outside, then loopback. Nothing is sent: connecting UDP only asks the
    routing table."""
    import socket

    loopback, family, probe = "127.0.0.1", socket.AF_INET, ("192.0.2.1", 9)
    if protocol == "ip6":
        loopback, family, probe = "::1", socket.AF_INET6, ("2001:db8::1", 9)
    hosts = [loopback]
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(probe)
            hosts.insert(0, sock.getsockname()[0])
    except OSError:
        pass  # no route outside: loopback is all there is
    return list(dict.fromkeys(hosts))
