"""Being reachable: a node finds out whether others can dial it, has itself met through relays where they can't, relays
for others where they can, and tells the swarm when its addresses change."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Iterable

import msgspec
import trio

from daaswarm.config import NetworkConfig
from daaswarm.core.reachability import Reachability, Sight, get_sight
from daaswarm.errors import Busy, DaaswarmError
from daaswarm.messages import CheckReach, Contact, Moved, Reached, Reserve, Reserved
from daaswarm.net.addresses import MAX_CHARS, get_host_address, get_origin, is_ip, is_loopback, parse_address
from daaswarm.net.circuits import is_circuit
from daaswarm.net.connection import Connection
from daaswarm.net.dataplane import TcpNetwork, get_host
from daaswarm.net.discovery import Discovery
from daaswarm.net.interfaces import read_own_hosts
from daaswarm.node.reporting import Event
from daaswarm.node.rounds import Rounds
from daaswarm.types import PeerId

LOOK_S = 2.0  # between two looks; a lost relay is replaced that soon
ADDRESSES_S = 15.0  # between two looks at this machine's own addresses
CHECK_S = 8.0  # for an answer to CheckReach: the peer dials for 4 s at most
RESERVE_S = 5.0  # for an answer to Reserve
RELAYS = 2  # one may die; more would only cost others
TRIED = 3  # peers that are asked for a reservation, or connected for it, in one look
REFUSED_S = 300.0  # a peer that refused is not asked again
LOST_S = 60.0  # nor one that was lost sooner than this, for as long: each change of relays is told to the whole swarm
REFUSED = 256  # such peers that are remembered
TELL_S = 5.0  # for telling a peer the new contact; it hears it at its next handshake otherwise
TELL_AT_ONCE = 16
PORTS = 4  # of own ports that others are asked to dial
IMPROVE_S = 600.0  # between two attempts to do without a relay; routers and networks change seldom
IMPROVED = 8  # connections that are tried to be improved in one round
ADDRS = 8  # in a contact (messages.py)
VERIFIED = 2  # addresses in it that only others know of; they leave room for this machine's own
SETTLE_S = 8.0  # a start waits so long for its addresses to be known: a check and a reservation

logger = logging.getLogger(__name__)


class _Held(msgspec.Struct):
    """A reservation. ``since``, ``renew_at``: s, trio's clock."""

    connection: Connection
    since: float
    renew_at: float


class Reaching:
    """One node's upkeep. ``settled``: its first addresses are announced."""

    def __init__(self, config: NetworkConfig, network: TcpNetwork, discovery: Discovery) -> None:
        self.reach = Reachability()
        self.settled = trio.Event()
        self._is_running = False
        self._config = config
        self._network = network
        self._discovery = discovery
        self._held: dict[PeerId, _Held] = {}
        self._refused: dict[PeerId, float] = {}  # until when
        self._looked_at = float("-inf")
        self._improved_at = trio.current_time()
        self._own_hosts: set[str] = set()  # this machine's IP addresses
        self._is_local = all(is_loopback(address.host) for address in network.listen_addresses)
        self._set_relaying()

    async def keep(self) -> None:
        """Until cancelled."""
        self._is_running = True
        rounds = Rounds("looking at who can reach this node", logger)
        async with trio.open_nursery() as nursery:
            while True:
                with rounds.round():
                    await self.look(nursery)
                self.settled.set()
                await trio.sleep(LOOK_S)

    async def wait_settled(self) -> None:
        """Until the first addresses are announced; at once where nothing is kept up, as in a node for one answer."""
        if self._is_running:
            with trio.move_on_after(SETTLE_S):
                await self.settled.wait()

    async def look(self, nursery: trio.Nursery) -> None:
        """One look at everything, and what follows from it. ``nursery``: for telling others, which may take long."""
        if self._is_local:
            return
        now = trio.current_time()
        if now - self._looked_at >= ADDRESSES_S:
            if self._looked_at != float("-inf") and self._network.get_own_addrs() != self._network.direct_addrs:
                logger.info("this machine's addresses changed: %s", ", ".join(self._network.get_own_addrs()))
                self._network.direct_addrs = self._network.get_own_addrs()
                self.reach.clear()
                self._refused.clear()
                await self._return()  # first: a check over dead connections would only wait
            self._looked_at = now
            self._own_hosts = read_own_hosts() | {parse_address(addr).host for addr in self._network.direct_addrs}
        if self.reach.is_due(now):
            await self.check()
        self._set_relaying()
        await self._keep_reservations()
        if self._announce():
            nursery.start_soon(self._tell)
        if now - self._improved_at >= IMPROVE_S:
            self._improved_at = now
            nursery.start_soon(self._improve)

    async def _return(self) -> None:
        """After a change: what went over old addresses ends where it is dead, and the swarm hears of the new ones."""
        await self._network.check_connections()
        self._discovery.rejoin()

    # -- finding out --------------------------------------------------------------------------------------------

    async def check(self) -> None:
        """Have some peers dial this node."""
        own = self._own_hosts
        peers: dict[str, PeerId] = {}
        sights: list[tuple[str, Sight | None]] = []
        for connection in self._get_direct():
            origin = get_origin(get_host(connection))
            peers.setdefault(origin, connection.peer_id)
            sights.append((origin, _get_sight(connection, own)))
        now = trio.current_time()
        chosen = self.reach.choose(sights, now)
        ports = list(dict.fromkeys(parse_address(addr).port for addr in self._network.direct_addrs))[:PORTS]
        if not chosen or not ports:
            return
        self.reach.note_round(now)

        async def ask(origin: str) -> None:
            contact = Contact(peer_id=peers[origin], addrs=[])
            try:
                reply, _ = await self._network.call(contact, CheckReach(ports=ports), deadline_s=CHECK_S)
            except DaaswarmError as error:  # it may know no such request; nothing was learnt
                logger.debug("%s does not dial back: %s", peers[origin], error)
                return
            # With a zone it would be no address of others', and a zone may be any text.
            if isinstance(reply, Reached) and is_ip(reply.host) and "%" not in reply.host:
                host = str(ipaddress.ip_address(reply.host))
                self.reach.note(origin, host, set(reply.ports) & set(ports), own, trio.current_time())

        before = self.reach.get_verdict(now)
        async with trio.open_nursery() as nursery:
            for origin in chosen:
                nursery.start_soon(ask, origin)
        verdict = self.reach.get_verdict(trio.current_time())
        if verdict != before:
            logger.info("others find this node %s at %s", verdict, ", ".join(self.reach.get_hosts(now)) or "?")

    def _get_direct(self) -> list[Connection]:
        return [c for c in self._network.connections if c.is_open and not c.is_relayed]

    def _set_relaying(self) -> None:
        """Relays for others unless nobody can dial this node. Where that isn't known, whoever asks has just done it."""
        listens = bool(self._network.listen_addresses)
        is_needy = self._needs_relay() or bool(self._held)
        self._network.meetings.relay.is_on = self._config.relay and listens and not is_needy
        self._network.circuits.is_dialable = listens and not self._needs_relay()

    def _needs_relay(self) -> bool:
        now = trio.current_time()
        verdict = self.reach.get_verdict(now)
        return verdict == "unreachable" or (verdict == "unknown" and self.reach.is_beyond_nat(now))

    # -- being met ----------------------------------------------------------------------------------------------

    async def _keep_reservations(self) -> None:
        now = trio.current_time()
        for relay, held in list(self._held.items()):
            if not held.connection.is_open:
                logger.info("the relay %s is gone", relay)
                self._give_up(relay)
                if now - held.since < LOST_S:
                    self._refuse(relay, LOST_S)
        if self.reach.get_verdict(now) == "reachable":
            for relay in list(self._held):
                self._give_up(relay)
        for held in list(self._held.values()):
            if now >= held.renew_at:
                await self._reserve(held.connection)
        if not self._needs_relay():
            return
        if len(self._held) < RELAYS:
            for connection in self._get_candidates()[:TRIED]:
                if len(self._held) < RELAYS:
                    await self._reserve(connection)
        if len(self._held) < RELAYS:
            await self._connect_more()

    async def _improve(self) -> None:
        """Relayed connections that this node asked for are replaced by direct ones where that works by now."""
        relayed = [c for c in self._network.connections if c.is_open and c.is_relayed and c.is_client]
        for connection in relayed[:IMPROVED]:
            try:
                await self._network.circuits.improve(connection)
            except DaaswarmError as error:
                logger.debug("%s is still met through a relay: %s", connection.peer_id, error)

    def _get_candidates(self) -> list[Connection]:
        """Peers that may relay: dialled by this node at an address that others can dial too, as far as can be told."""
        now, own = trio.current_time(), self._own_hosts
        is_beyond = self.reach.is_beyond_nat(now)
        found: dict[PeerId, Connection] = {}
        for connection in self._get_direct():
            peer = connection.peer_id
            if not connection.is_client or peer in self._held or self._refused.get(peer, 0.0) > now:
                continue
            if not is_beyond or _get_sight(connection, own) is Sight.BEYOND_NAT:
                found[peer] = connection
        taken = {get_host(held.connection) for held in self._held.values()}  # two relays on one machine die together
        return sorted(found.values(), key=lambda connection: get_host(connection) in taken)

    async def _connect_more(self) -> None:
        """Connections with known peers that may relay."""
        now = trio.current_time()
        tried = 0
        for contact in self._discovery.get_known():
            peer = PeerId(contact.peer_id)
            direct = [addr for addr in contact.addrs if not is_circuit(addr)]
            if tried >= TRIED or not direct or self._network.is_connected(peer) or self._refused.get(peer, 0.0) > now:
                continue
            tried += 1
            try:
                await self._network.connect(Contact(peer_id=peer, addrs=direct))
            except DaaswarmError:
                self._refuse(peer, REFUSED_S)

    async def _reserve(self, connection: Connection) -> None:
        relay = connection.peer_id
        try:
            reply, _ = await connection.call(Reserve(), deadline_s=RESERVE_S)
            if not isinstance(reply, Reserved):
                raise Busy("no answer to the question", retry_after_s=REFUSED_S)
        except DaaswarmError as error:
            logger.debug("no reservation at %s: %s", relay, error)
            self._give_up(relay)
            self._refuse(relay, error.retry_after_s if isinstance(error, Busy) else REFUSED_S)
            return
        if relay not in self._held:
            logger.info("others meet this node through the relay %s at %s", relay, connection.remote_addr)
        connection.is_kept = True
        now = trio.current_time()
        since = self._held[relay].since if relay in self._held else now
        self._held[relay] = _Held(connection, since, now + max(reply.ttl_s / 2, LOOK_S))
        addr = str(parse_address(connection.remote_addr)._replace(peer_id=relay))
        if len(self._network.circuits.get_addr(addr)) > MAX_CHARS:  # a long name; nobody could read this node's contact
            addr = connection.peer.reached_at
        self._network.circuits.relays[relay] = addr

    def _give_up(self, relay: PeerId) -> None:
        held = self._held.pop(relay, None)
        self._network.circuits.relays.pop(relay, None)
        if held is not None:
            held.connection.is_kept = False

    def _refuse(self, peer: PeerId, seconds: float) -> None:
        self._refused.pop(peer, None)
        self._refused[peer] = trio.current_time() + seconds
        while len(self._refused) > REFUSED:
            del self._refused[next(iter(self._refused))]

    # -- telling ------------------------------------------------------------------------------------------------

    def _announce(self) -> bool:
        """Whether the contact changed: then everything that this node publishes says so."""
        network = self._network
        if network.contact is None:
            return False
        verified = self.reach.get_verified(trio.current_time())
        public = [str(get_host_address(host, port, network.peer_id)) for host, port in verified[:VERIFIED]]
        circuits = network.circuits.get_addrs()[:RELAYS]
        direct = list(dict.fromkeys([*public, *network.direct_addrs]))[: ADDRS - len(circuits)]
        if network.contact.addrs == direct + circuits:
            return False
        network.contact = Contact(peer_id=network.peer_id, addrs=direct + circuits)
        self._discovery.set_contact(network.contact)
        return True

    async def _tell(self) -> None:
        """Those who are connected hear of the new addresses; the rest find them in adverts and pointers."""
        contact = self._network.contact
        assert contact is not None
        waiting = iter({c.peer_id: c for c in self._network.connections if c.is_open}.values())

        async def tell_some(connections: Iterable[Connection]) -> None:
            for connection in connections:
                try:
                    await connection.call(Moved(contact=contact), deadline_s=TELL_S)
                except DaaswarmError as error:
                    logger.debug("%s does not hear of the new addresses: %s", connection.peer_id, error)

        async with trio.open_nursery() as nursery:
            for _ in range(TELL_AT_ONCE):
                nursery.start_soon(tell_some, waiting)

    def get_lines(self) -> list[str]:
        """What the operator should know of it at a start; mostly nothing."""
        if not self._needs_relay():
            return []
        relays = len(self._held)
        how = f"it is met through {relays} relay{'s' * (relays > 1)}" if relays else "and no peer relays for it yet"
        return [f"others can't dial this node (a NAT or firewall): {how}"]

    def describe(self) -> Event:
        """What ``status`` shows.

        ``verdict``: ``reachable``, ``unreachable`` (behind a NAT or firewall), ``unknown`` (nobody could say yet),
        ``local`` (listens to this machine only) or ``not_listening``.
        """
        now = trio.current_time()
        relay = self._network.meetings.relay
        verdict: str = self.reach.get_verdict(now)
        if not self._network.listen_addresses:
            verdict = "not_listening"
        elif self._is_local:
            verdict = "local"
        return {
            "verdict": verdict,
            "seen_at": self.reach.get_hosts(now),
            "relays": [{"peer_id": peer, "addr": addr} for peer, addr in self._network.circuits.relays.items()],
            "dialled_back": self._network.circuits.dialled_back,
            "is_relay": relay.is_on,
            "reservations": len(relay.desk.reservations),
            "circuits": relay.desk.circuits,
            "bytes_passed": relay.bytes_passed,
        }


def _get_sight(connection: Connection, own: set[str]) -> Sight | None:
    """How the peer stands to this node, if it has said where it sees it: only those that were dialled do."""
    try:
        return get_sight(parse_address(connection.peer.observed_addr).host, own)
    except DaaswarmError:
        return None
