"""Peers on the same local network, found without any setting: multicast DNS (RFC 6762, 6763) through python-zeroconf.

A node says ``PEERID._daaswarm._tcp.local`` with its port, its addresses there and the first bytes of its swarm's id.
What others say so is hearsay like any contact: it counts once a handshake has proven it. zeroconf runs an asyncio loop
in a daemon thread of its own; all that blocks goes through a worker thread here.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import trio

from daaswarm.core.pacing import TokenBucket
from daaswarm.core.signing import get_public_key
from daaswarm.errors import ConfigError
from daaswarm.messages import PROTOCOL_VERSION, Contact
from daaswarm.net.addresses import get_host_address, is_loopback, parse_address
from daaswarm.net.interfaces import read_own_hosts
from daaswarm.types import PeerId

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, Zeroconf

log = logging.getLogger(__name__)

SERVICE = "_daaswarm._tcp.local."
GROUP = "224.0.0.251"  # of multicast DNS
SWARM_BYTES = 8  # of the swarm's id: enough to pass over others, and its key isn't told
NAMES = 256  # services remembered; a flood of made-up ones on a local network costs no more than that
ADDRESSES = 4  # taken of one service
ASKED_AT_ONCE = 4  # services whose address is being asked for
ASK_S = 3.0  # for a service's address, where it didn't come along
START_S = 10.0  # to open sockets and to say who is here; zeroconf says it three times, in half a second
STOP_S = 2.0  # for the goodbye; a node that leaves must not wait longer
LOOK_S = 15.0  # between two looks whether the own addresses are still the same
RETRY_S = 60.0  # after no network that knows multicast was there
MEET_PER_S = 8.0  # services that are passed on; a flood of made-up ones must not make this node dial without end

Found = Callable[[Contact], Awaitable[None]]


class Lan:
    """Says that this node is here, and hears who else is.

    Args:
        swarm: 32 byte id; others are passed over.
        get_contact: what this node announces now.
        on_found: told of each peer once; not proven yet.
    """

    def __init__(self, swarm: bytes, get_contact: Callable[[], Contact | None], on_found: Found) -> None:
        self._swarm = swarm[:SWARM_BYTES].hex()
        self._get_contact = get_contact
        self._on_found = on_found
        self._heard: dict[str, Contact] = {}  # by name of the service; oldest first
        self._pace = TokenBucket(MEET_PER_S)

    async def run(self) -> None:
        """Until cancelled. Without a network that knows multicast it tries again now and then."""
        while True:
            try:
                said = self._get_said()
                if not said:
                    await trio.sleep(LOOK_S)
                    continue
                await self._run_with(said)
            except OSError as error:
                log.info("no multicast DNS: %s", error)
                await trio.sleep(RETRY_S)
            except Exception:  # costs the search on the local network, and not the node
                log.exception("looking for peers on the local network failed")
                await trio.sleep(RETRY_S)

    def _get_said(self) -> list[tuple[str, int]]:
        return get_said(self._get_contact(), read_own_hosts())

    async def _run_with(self, said: list[tuple[str, int]]) -> None:
        contact = self._get_contact()
        assert contact is not None
        token = trio.lowlevel.current_trio_token()
        names_in, names_out = trio.open_memory_channel[str](NAMES)

        def hear(name: str) -> None:  # in trio's thread
            if get_peer(name) in (None, contact.peer_id):
                return
            try:
                names_in.send_nowait(name)
            except (trio.WouldBlock, trio.BrokenResourceError):
                log.debug("too many services at once; %s is heard of again when it says so", name[:80])

        def forget(name: str) -> None:
            self._heard.pop(name, None)

        def note(zeroconf: Any, service_type: str, name: str, state_change: Any) -> None:  # in zeroconf's thread
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(hear if state_change.name in ("Added", "Updated") else forget, name)

        zeroconf = None
        try:
            with trio.fail_after(START_S):
                zeroconf = await trio.to_thread.run_sync(_open, [host for host, _ in said])
                info = _describe(contact.peer_id, said, self._swarm)
                await trio.to_thread.run_sync(_start, zeroconf, info, note, abandon_on_cancel=True)
            log.info("looking for peers on the local network, as %s", ", ".join(host for host, _ in said))
            async with trio.open_nursery() as nursery:
                for _ in range(ASKED_AT_ONCE):
                    nursery.start_soon(self._ask, zeroconf, names_out)
                while self._get_said() == said:  # noqa: ASYNC110 - nobody tells when that changes
                    await trio.sleep(LOOK_S)
                nursery.cancel_scope.cancel()
        except trio.TooSlowError:
            raise OSError(f"no answer of its thread within {START_S:g} s") from None
        finally:
            if zeroconf is not None:
                with trio.move_on_after(STOP_S, shield=True):  # pyright: ignore[reportCallIssue] - wrong stubs
                    await trio.to_thread.run_sync(zeroconf.close, abandon_on_cancel=True)

    async def _ask(self, zeroconf: Zeroconf, names: trio.MemoryReceiveChannel[str]) -> None:
        async for name in names:
            info = await trio.to_thread.run_sync(_resolve, zeroconf, name, abandon_on_cancel=True)
            contact = read_service(name, info, self._swarm) if info is not None else None
            own = self._get_contact()
            if contact is None or (own is not None and contact.peer_id == own.peer_id):
                continue
            if self._heard.get(name) == contact:
                continue
            self._heard.pop(name, None)
            self._heard[name] = contact
            if len(self._heard) > NAMES:
                del self._heard[next(iter(self._heard))]
            await trio.sleep(self._pace.take(1, trio.current_time()))
            log.info("on the local network: %s at %s", contact.peer_id, ", ".join(contact.addrs))
            await self._on_found(contact)


def get_said(contact: Contact | None, own: set[str]) -> list[tuple[str, int]]:
    """The IP addresses and ports of a contact that mean something on a local network: neither names, nor loopback, nor
    those of a relay or of the router. Empty for a node that listens on loopback alone.

    Args:
        own: the IP addresses of this machine's interfaces; multicast can be sent from no other.
    """
    said: list[tuple[str, int]] = []
    for text in contact.addrs if contact is not None else ():
        address = parse_address(text)
        is_local = address.relay is None and address.protocol == "ip4" and address.host in own
        if is_local and not is_loopback(address.host):
            said.append((address.host, address.port))
    return said[:ADDRESSES]


def get_peer(name: str) -> PeerId | None:
    """The peer that a service's name claims to be. Anybody on the network makes up names."""
    peer_id = name.removesuffix("." + SERVICE)
    try:
        get_public_key(peer_id)
    except ConfigError:
        return None
    return PeerId(peer_id)


def read_service(name: str, info: ServiceInfo, swarm: str) -> Contact | None:
    """The contact that a service speaks of; ``None`` if it is of another swarm or version, or makes no sense."""
    peer_id = get_peer(name)
    if peer_id is None:
        return None
    properties = info.properties
    if properties.get(b"swarm") != swarm.encode() or properties.get(b"version") != str(PROTOCOL_VERSION).encode():
        return None
    if not info.port or not 0 < info.port < 65_536:
        return None
    hosts = info.parsed_addresses()[:ADDRESSES]
    addrs = [str(get_host_address(host, info.port, peer_id)) for host in hosts]
    return Contact(peer_id=peer_id, addrs=addrs) if addrs else None


# -- what blocks: in a worker thread ------------------------------------------------------------------------------


def _open(hosts: list[str]) -> Zeroconf:
    from zeroconf import IPVersion, Zeroconf

    # It logs strangers' garbage and each packet that can't be sent, with tracebacks; what matters is logged here.
    zeroconf_log = logging.getLogger("zeroconf")
    if zeroconf_log.level in (logging.NOTSET, logging.WARNING):  # WARNING is what its import sets
        zeroconf_log.setLevel(logging.CRITICAL)
    for host in hosts:  # zeroconf leaves its sockets open where this fails
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            group = socket.inet_aton(GROUP) + socket.inet_aton(host)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
    return Zeroconf(interfaces=hosts, ip_version=IPVersion.V4Only)


def _describe(peer_id: str, said: list[tuple[str, int]], swarm: str) -> ServiceInfo:
    from zeroconf import ServiceInfo

    return ServiceInfo(
        SERVICE,
        f"{peer_id}.{SERVICE}",
        port=said[0][1],
        addresses=[ipaddress.ip_address(host).packed for host, port in said if port == said[0][1]],
        properties={"swarm": swarm, "version": str(PROTOCOL_VERSION)},
        server=f"{peer_id[-24:]}.local.",
    )


def _start(zeroconf: Zeroconf, info: ServiceInfo, note: Callable[..., None]) -> None:
    from zeroconf import Error, ServiceBrowser

    try:
        ServiceBrowser(zeroconf, SERVICE, handlers=[note])
        # Nobody is asked whether the name is free: a PeerId is nobody else's, and whoever says so could shut a node up.
        zeroconf.register_service(info, cooperating_responders=True)
    except Error as error:
        raise OSError(f"this node can't say its name: {error!r}") from error


def _resolve(zeroconf: Zeroconf, name: str) -> ServiceInfo | None:
    from zeroconf import Error

    try:
        return zeroconf.get_service_info(SERVICE, name, timeout=int(ASK_S * 1000))
    except Error as error:  # a name that it doesn't take, or it is being closed
        log.debug("%r: %r", name[:80], error)
        return None
