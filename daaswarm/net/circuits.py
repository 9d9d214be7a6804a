"""Peers that can't be dialled: met through a relay, by a connection of theirs or a circuit of TLS through the relay.

:meth:`Circuits.dial` is the asker's side, :meth:`Circuits.answer` the target's. :func:`check_relay` says whether, and
why not, a peer can be met through its relays. The relay's own part is ``relaying.py``.
"""

from __future__ import annotations

import ipaddress
import logging
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec
import trio

from daaswarm.core.quotas import Quotas
from daaswarm.core.relay_desk import CIRCUITS_PER_PEER
from daaswarm.errors import Busy, ConfigError, ConnectionLost, DaaswarmError, RelayRefused, Unreachable
from daaswarm.messages import Arranged, Contact, Invite, Meet
from daaswarm.net.addresses import CIRCUIT, Address, parse_address
from daaswarm.net.connection import Connection
from daaswarm.net.interfaces import PRIVATE
from daaswarm.net.pool import ShakenHands
from daaswarm.net.relaying import CIRCUIT_BYTE, check_token
from daaswarm.types import PeerId

if TYPE_CHECKING:
    from daaswarm.net.dataplane import TcpNetwork

log = logging.getLogger(__name__)

MEET_S = 6.0  # the relay's INVITE_S and two round trips
REVERSE_S = 2.0  # for dialling the asker back: it's a round trip or two, or a firewall that drops it
REVERSE_ADDRS = 4  # of the asker's that are tried
DIALLED_PER_HOST = 32  # connections with one IP address; who asks from there beyond is met by circuit
INVITES_AT_ONCE = 32  # each dials; a relay that makes up askers gets no more of this node than that
INVITES_PER_S, INVITE_BURST = 4.0, 32.0  # of one relay
RELAYED = 2 * CIRCUITS_PER_PEER  # connections through one relay: more than an honest one makes, or it could fill a node
_LOCAL = ("169.254.0.0/16", "fe80::/10", "127.0.0.0/8", "::1/128")  # link-local, loopback
INTERNAL = (*PRIVATE, *map(ipaddress.ip_network, _LOCAL))  # what means another machine on every network
NAT64 = ipaddress.IPv6Network("64:ff9b::/32")  # RFC 6052 and 8215
LAN_PREFIX_V4, LAN_PREFIX_V6 = 24, 64  # what is taken for this machine's own network


class RelayCheck(msgspec.Struct, frozen=True, kw_only=True):
    """What came of meeting a peer through one relay.

    how: ``circuit`` or ``dialled`` (the peer dialled this node); empty if it failed.
    """

    addr: str
    relay: PeerId
    how: str = ""
    seconds: float = 0.0
    error: DaaswarmError | None = None


async def check_relay(network: TcpNetwork, contact: Contact) -> list[RelayCheck]:
    """Meet a peer through each of its relays, one after the other, as :meth:`Circuits.dial` does, and hang up again.

    Returns one result for each circuit address of ``contact``; none if it has none. Takes at most
    ``MEET_S + HANDSHAKE_S`` for each. Raises nothing of the network's.
    """
    results: list[RelayCheck] = []
    for addr in contact.addrs:
        try:
            address = parse_address(addr)
        except ConfigError:
            continue
        if address.relay is None:
            continue
        began = trio.current_time()
        check = RelayCheck(addr=addr, relay=address.relay)
        try:
            if address.peer_id != contact.peer_id:
                raise Unreachable(f"{addr} is not an address of {contact.peer_id}")
            hands = await network.circuits.dial(address, addr)
        except DaaswarmError as error:
            check = msgspec.structs.replace(check, error=error)
        else:
            if hands is not None:
                hands.carrier.shut_down()
                hands.carrier.close()
            check = msgspec.structs.replace(check, how="dialled" if hands is None else "circuit")
        results.append(msgspec.structs.replace(check, seconds=trio.current_time() - began))
    return results


class Circuits:
    """Both ends' part of one node.

    ``relays``: where this node holds reservations, and the address (of the relay) by which it does.
    ``is_dialable``: others may try to dial this node; they aren't asked to where it's known to be vain.
    """

    def __init__(self, network: TcpNetwork) -> None:
        self.relays: dict[PeerId, str] = {}
        self.is_dialable = True
        self._network = network
        self._invites = Quotas(INVITES_PER_S, INVITE_BURST)
        self._knocking: dict[PeerId, trio.Lock] = {}  # relays that are being dialled
        self._answering = 0
        self.dialled_back = 0  # askers
        self.came = 0  # to a relay, for an asker

    def get_addrs(self) -> list[str]:
        """The addresses at which this node is met through its relays."""
        return [self.get_addr(addr) for addr in self.relays.values()]

    def get_addr(self, relay: str) -> str:
        """Where this node is met through the relay at that address."""
        return f"{relay}{CIRCUIT}/p2p/{self._network.peer_id}"

    async def dial(self, address: Address, addr: str) -> ShakenHands | None:
        """Meet ``address.peer_id`` through ``address.relay``; ``None``: it dialled this node, and is connected.

        Raises:
            Unreachable: no relay there, it refuses, or the peer doesn't come.
            PeerIdMismatch: another peer came.
            RemoteProtocolError: whoever came doesn't speak daaswarm.
        """
        network, relay, target = self._network, address.relay, address.peer_id
        assert relay is not None and target is not None
        if target == network.peer_id:
            raise Unreachable(f"{addr} is this node itself")
        if relay == network.peer_id:
            raise Unreachable(f"{target} is met through this node, but has no connection with it", hint="it is gone")
        door = str(address._replace(peer_id=relay, relay=None))
        direct = network.direct_addrs if self.is_dialable else []
        meet = Meet(target=target, addrs=direct[:REVERSE_ADDRS])
        reply = None
        try:
            with trio.move_on_after(MEET_S):
                connection = network.get_direct(relay) or await self._knock(relay, door)
                reply, _ = await connection.call(meet, deadline_s=MEET_S)
            if reply is None:
                raise Unreachable(f"no answer within {MEET_S:g} s")
        except DaaswarmError as error:
            hint = "it may have another relay by now: its address is looked up again"
            raise Unreachable(f"not met through the relay {relay}: {error.message}", hint=hint) from error
        if not isinstance(reply, Arranged):
            raise Unreachable(f"the relay {relay} answered with {type(reply).__name__}")
        if reply.dialled:
            if not network.is_connected(target):
                raise Unreachable(f"{target} is said to have dialled this node, but did not come")
            return None
        token = check_token(reply.token)
        return await network.dial_through(get_door(await self._knock(relay, door)), token, addr, target)

    async def _knock(self, relay: PeerId, addr: str) -> Connection:
        """A connection with a relay that this node has dialled, at ``addr`` if there is none yet."""
        network = self._network
        lock = self._knocking.setdefault(relay, trio.Lock())
        try:
            async with lock:
                connection = network.get_dialled(relay)
                if connection is None and not network.is_connected(relay):
                    await network.connect(Contact(peer_id=relay, addrs=[addr]))
                    connection = network.get_dialled(relay)
                return connection or await network.dial_anew(addr)
        finally:
            if not lock.locked():
                self._knocking.pop(relay, None)

    async def improve(self, connection: Connection) -> None:
        """Have a direct connection with the peer of a relayed one, if there is a way by now; the relayed one then ends
        as soon as it is idle.

        Raises:
            DaaswarmError: there is none.
        """
        network, peer = self._network, connection.peer
        direct = [addr for addr in (peer.contact.addrs if peer.contact else []) if not is_circuit(addr)]
        if network.get_direct(peer.peer_id) is None and not (
            direct and await self._dial_back(peer.peer_id, direct[:REVERSE_ADDRS])
        ):
            if not self.is_dialable or not network.direct_addrs:
                raise Unreachable(f"neither {peer.peer_id} nor this node can be dialled")
            hands = await self.dial(parse_address(connection.remote_addr), connection.remote_addr)
            if hands is not None:  # another circuit, which is no gain
                hands.carrier.shut_down()
                hands.carrier.close()
                raise Unreachable(f"{peer.peer_id} can't dial this node")
        if connection.is_idle:
            connection.close(ConnectionLost("there is a direct connection now"))

    async def answer(self, relay: PeerId, invite: Invite) -> Arranged:
        """Dial the asker, or come to the relay for it.

        Raises:
            RelayRefused: this node holds no reservation there.
            Busy: too many invitations.
        """
        addr = self.relays.get(relay)
        connection = self._network.get_dialled(relay)
        peer = PeerId(invite.peer)
        if addr is None or connection is None or peer in (relay, self._network.peer_id):
            raise RelayRefused(f"{self._network.peer_id} holds no reservation at {relay}")
        wait_s = self._invites.take(relay, trio.current_time())
        through = f"{addr}{CIRCUIT}"
        relayed = sum(c.remote_addr.startswith(through) for c in self._network.connections if not c.is_client)
        if wait_s or self._answering >= INVITES_AT_ONCE or relayed >= RELAYED:
            raise Busy("too many peers want to meet", retry_after_s=wait_s or 1.0)
        self._answering += 1
        try:
            dialable = get_dialable(invite, addr, self._network.direct_addrs)
            if await self._dial_back(peer, self._leave_out_crowds(dialable)):
                self.dialled_back += 1
                return Arranged(dialled=True)
        finally:
            self._answering -= 1
        self.came += 1
        self._network.start(self._come, get_door(connection), invite.token, f"{through}/p2p/{peer}", peer)
        return Arranged()

    def _leave_out_crowds(self, addrs: list[str]) -> list[str]:
        """Without machines to which this node has many connections of its own: those are pushed out by nobody else's,
        and PeerIds cost nothing."""
        own = [c for c in self._network.connections if c.is_client and not c.is_relayed]
        hosts = Counter(get_door(connection).host for connection in own)
        return [addr for addr in addrs if hosts[parse_address(addr).host] < DIALLED_PER_HOST]

    async def _dial_back(self, peer: PeerId, addrs: list[str]) -> bool:
        if not addrs:
            return False
        with trio.move_on_after(REVERSE_S):
            try:
                hands = await self._network.dial_directly(Contact(peer_id=peer, addrs=addrs))
                self._network.add(hands, is_client=True)
                return True
            except DaaswarmError as error:
                log.debug("%s can't be dialled back: %s", peer, error)
        return False

    async def _come(self, door: Address, token: bytes, addr: str, peer: PeerId) -> None:
        try:
            await self._network.accept_through(door, token, addr, peer)
        except trio.TooSlowError:
            log.info("%s did not come to the relay at %s", peer, door)
        except (DaaswarmError, OSError) as error:
            log.info("no circuit for %s through %s: %s", peer, door, error)
        except Exception:  # a bug of ours that a stranger's bytes brought to light
            log.exception("the circuit of %s through %s failed", peer, door)


def get_door(relay: Connection) -> Address:
    """Where a circuit is opened: where the relay has proven to be when this node dialled it. An opening has 32 bytes of
    the relay's choice, and whoever announces a circuit, or a name, could have them sent to anybody."""
    return parse_address(relay.peer.reached_at)


def get_dialable(invite: Invite, relay: str, own: Iterable[str]) -> list[str]:
    """Which of an asker's addresses are dialled back. A relay could name any victim's, so only the one at which it says
    to see the asker, and those of this machine's own networks, are. Through a relay in the internet nobody is sent to
    other machines of an internal network, and through one on another machine nobody to this one.

    Args:
        relay: its own address.
        own: this node's.
    """
    from_host = parse_address(relay).host
    networks = [network for network in map(_get_lan, own) if network is not None]
    found: list[str] = []
    for addr in invite.addrs[:REVERSE_ADDRS]:
        try:
            address = parse_address(addr)
            if address.relay is not None or address.peer_id not in (None, invite.peer):
                continue
            ip = ipaddress.ip_address(address.host)
            if isinstance(ip, ipaddress.IPv6Address) and (ip.ipv4_mapped or ip.sixtofour or ip.teredo or ip in NAT64):
                continue  # an IPv4 address in disguise, perhaps an internal one
            is_seen = ip == ipaddress.ip_address(invite.host)
        except (DaaswarmError, ValueError):
            continue
        if ip.is_loopback or ip.is_unspecified or ip.is_multicast:
            is_allowed = is_seen and ip.is_loopback and _is_internal(from_host, loopback=True)
        elif _is_internal(str(ip)):
            is_allowed = any(ip in network for network in networks) or (is_seen and _is_internal(from_host))
        else:
            is_allowed = is_seen
        if is_allowed:
            found.append(addr)
    return found


def _is_internal(host: str, *, loopback: bool = False) -> bool:
    """Whether an IP address belongs to somebody's own network; with ``loopback``, to this very machine."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False  # a name: in the internet, as far as anybody knows
    return ip.is_loopback if loopback else any(ip.version == n.version and ip in n for n in INTERNAL)


def _get_lan(addr: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        ip = ipaddress.ip_address(parse_address(addr).host)
    except (DaaswarmError, ValueError):
        return None
    prefix = LAN_PREFIX_V4 if ip.version == 4 else LAN_PREFIX_V6
    return ipaddress.ip_network((ip, prefix), strict=False)


def is_circuit(addr: str) -> bool:
    """Whether a multiaddress leads through a relay."""
    return CIRCUIT in addr


def encode_opening(token: bytes) -> bytes:
    """What either end of a circuit sends first."""
    return bytes([CIRCUIT_BYTE]) + token
