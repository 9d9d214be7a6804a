"""Which network an address belongs to, as far as it tells anything about who owns it.

PeerIds cost nothing, so one machine can pretend to be a thousand peers; addresses in many networks cost money. A
table that takes few contacts of one network has to be attacked from many.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from daaswarm.core.memo import memo

PREFIX_V4 = 24  # what is routed and sold as one; geth counts by the same
PREFIX_V6 = 64  # one link; limits.CONNECTIONS_PER_ADDRESS counts by the same


def get_subnets(addrs: Iterable[str]) -> tuple[str, ...]:
    """The networks that a contact with these multiaddresses counts for, each once: of every address, since it's
    reached by one of them and nobody knows by which."""
    return tuple(dict.fromkeys(subnet for subnet in map(get_subnet, addrs) if subnet))


@memo(8_192)
def get_subnet(addr: str) -> str:
    """``"/ip4/8.8.8.8/tcp/1"`` → ``"8.8.8.0/24"``; empty where the address names no network that could be counted.

    Addresses that aren't routed in the internet (loopback, private, carrier's NAT, link-local) count for nothing: they
    belong to everybody's own network, where whole swarms live in one of them. A name counts by its last two labels.
    """
    parts = addr.split("/")
    if len(parts) < 3 or parts[0]:
        return ""
    if parts[1] in ("dns", "dns4", "dns6", "dnsaddr"):
        return ".".join(parts[2].lower().rstrip(".").split(".")[-2:])
    if parts[1] not in ("ip4", "ip6"):
        return ""
    try:
        address = ipaddress.ip_address(parts[2])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if not address.is_global:
        return ""
    prefix = PREFIX_V4 if address.version == 4 else PREFIX_V6
    return str(ipaddress.ip_network((address, prefix), strict=False))
