"""Which of this machine's addresses others are told: those of a network that others are on, and no container's bridge.

:func:`choose` is a pure function of a table of interfaces; :func:`read_interfaces` makes that table.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from daaswarm.core.diagnosis import Network

# By name in lower case, as the programs and systems that make them name them.
TUNNEL = "a tunnel"  # it may well lead to the swarm: then its owner says so
VIRTUAL = (
    (("docker*", "br-*", "podman*", "cni*", "flannel*", "cali*", "kube*", "nerdctl*"), "a bridge of containers"),
    (("veth*", "ifb*", "dummy*"), "one end of a virtual cable"),
    (
        ("virbr*", "vmnet*", "vboxnet*", "lxc*", "lxdbr*", "vnet*", "vethernet*", "virtualbox*", "vmware*"),
        "a bridge of virtual machines",
    ),
    (("ppp*",), "a dial-up line or tunnel"),
    (
        (
            "tun*",
            "tap*",
            "wg*",
            "tailscale*",
            "zt*",
            "zerotier*",
            "utun*",
            "ipsec*",
            "nordlynx*",
            "proton*",
            "mullvad*",
        ),
        TUNNEL,
    ),
)
PRIVATE = tuple(  # RFC 1918, 6598 (a carrier's NAT) and 4193
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
)
OUTSIDE = {4: "192.0.2.1", 6: "2001:db8::1"}  # documentation addresses: nobody is there


class Interface(NamedTuple):
    """One address of an interface. ``host``: an IP address without a zone."""

    name: str
    host: str
    is_up: bool = True


class LeftOut(NamedTuple):
    """An address that others aren't told, and why not."""

    host: str
    name: str
    reason: str


class Choice(NamedTuple):
    """``hosts``: what others are told, the likeliest first. Loopback only where there is nothing else."""

    hosts: list[str]
    left_out: list[LeftOut]


def choose(interfaces: Iterable[Interface], version: int, *, wanted: Sequence[str] = (), outside: str = "") -> Choice:
    """Args:
    version: 4 or 6; addresses of the other aren't looked at.
    wanted: names or patterns (``wg0``, ``eth*``) of the only interfaces to tell of, whatever they are.
    outside: the address that leads to the internet; it goes before others of its kind, and what its interface is
        called doesn't matter (``br-lan``, ``ppp0``), unless it's a tunnel.
    """
    told: list[str] = []
    loopback: list[str] = []
    left_out: list[LeftOut] = []
    for interface in interfaces:
        address = ipaddress.ip_address(interface.host)
        if address.version != version:
            continue
        if address.is_loopback:
            loopback.append(interface.host)
            continue
        reason = _find_fault(interface, address, wanted, outside)
        if reason:
            left_out.append(LeftOut(interface.host, interface.name, reason))
        elif interface.host not in told:
            told.append(interface.host)
    told.sort(key=lambda host: (any(ipaddress.ip_address(host) in network for network in PRIVATE), host != outside))
    return Choice(told or loopback[:1], left_out)


def _find_fault(
    interface: Interface, address: ipaddress.IPv4Address | ipaddress.IPv6Address, wanted: Sequence[str], outside: str
) -> str:
    if not interface.is_up:
        return "down"
    if address.is_link_local:
        return "means nothing beyond its cable"
    if wanted:
        return "" if any(fnmatchcase(interface.name, pattern) for pattern in wanted) else "not in network.interfaces"
    for patterns, what in VIRTUAL:
        if any(fnmatchcase(interface.name.lower(), pattern) for pattern in patterns):
            return "" if what != TUNNEL and interface.host == outside else what
    return ""


def read_interfaces() -> list[Interface]:
    """This machine's, in the system's order."""
    import psutil

    stats = psutil.net_if_stats()
    return [Interface(name, host, name not in stats or stats[name].isup) for name, host, _ in _read_addresses()]


def read_networks() -> list[Network]:
    """The networks that this machine is on; none where the system tells no program."""
    found: list[Network] = []
    with contextlib.suppress(OSError):
        for name, host, netmask in _read_addresses():
            if netmask:
                bits = bin(int(ipaddress.ip_address(netmask.partition("/")[0]))).count("1")
                found.append(Network(interface=name, prefix=str(ipaddress.ip_network(f"{host}/{bits}", strict=False))))
    return found


def read_own_hosts() -> set[str]:
    """The IP addresses of all interfaces of this machine, told others or not; where the system tells no program, those
    from which it would dial."""
    try:
        return {host for _, host, _ in _read_addresses()}
    except OSError:
        return {host for host in map(find_source, OUTSIDE.values()) if host}


def _read_addresses() -> Iterator[tuple[str, str, str]]:
    """Name, IP address without a zone, and netmask if the system says it. Raises OSError: it tells no program."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family in (socket.AF_INET, socket.AF_INET6):
                yield name, address.address.partition("%")[0], address.netmask or ""


def find_source(host: str) -> str:
    """The own address from which ``host`` (an IP address) would be dialled, or nothing if no way leads there.

    Nothing is sent: UDP's connect asks the routing table."""
    family = socket.AF_INET if ipaddress.ip_address(host).version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((host, 9))
            return str(sock.getsockname()[0])
    except OSError:
        return ""


def choose_own(version: int, wanted: Sequence[str] = ()) -> Choice:
    """:func:`choose` of what is here now; loopback where nothing can be read."""
    outside = find_source(OUTSIDE[version])
    try:
        interfaces = read_interfaces()
    except OSError:  # some systems tell no program
        interfaces = [Interface("?", outside)] if outside else []
    choice = choose(interfaces, version, wanted=wanted, outside=outside)
    return choice if choice.hosts else Choice(["127.0.0.1" if version == 4 else "::1"], choice.left_out)
