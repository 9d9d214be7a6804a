"""Reaching one address with the node's own code, and looking at each step: what ``network diagnose`` does.

The verdicts are :mod:`daaswarm.core.diagnosis`'s. Every step has a deadline, so all of them end within 80 seconds.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
import trio

from daaswarm.core.diagnosis import (
    Announced,
    Step,
    find_cause,
    get_skipped,
    is_foreign,
    judge_announced,
    judge_bulk,
    judge_clock,
    judge_error,
    judge_known,
    judge_way,
    merge,
)
from daaswarm.core.notary import Notary
from daaswarm.core.routing_table import get_node_id
from daaswarm.errors import ConfigError, ConnectionLost, DaaswarmError, RemoteProtocolError, Unreachable
from daaswarm.limits import HANDSHAKE_S
from daaswarm.messages import PROTOCOL_VERSION, Adverts, Contact, FindNode, Found, GetAdverts, Ping, Pong
from daaswarm.net.addresses import Address, is_ip, is_loopback, parse_address
from daaswarm.net.circuits import check_relay, is_circuit
from daaswarm.net.connection import Connection
from daaswarm.net.dataplane import Dialling, TcpNetwork
from daaswarm.net.interfaces import find_source, read_networks
from daaswarm.net.serving import ECHO_BYTES
from daaswarm.net.sockets import look_up

CONNECT_S = 4.0  # for TCP: two packets lost on the way fit in
CALL_S = 5.0  # for one answer
MEETING_S = 12.0  # for one relay: an invitation, TCP, TLS and the proofs
RELAYS_S = 24.0  # for all of its relays: two, which a node has, each as slow as can be
ASKED = 3  # other peers that are asked for it: those nearest to it have to know it
AT_ONCE = 2  # announced addresses that are dialled: more connections would push those in use out over there
SHOWN = 3  # models or addresses in a line
DIALLED = ("tcp", "tls", "peer id", "version", "swarm", "swarm key")  # what a dial shows, in this order

Tell = Callable[[Step], Awaitable[None]]


@dataclass(frozen=True)
class Patience:
    """Seconds: for TCP, for TLS and the proofs, for one answer."""

    connect_s: float = CONNECT_S
    handshake_s: float = HANDSHAKE_S
    call_s: float = CALL_S


class Examiner:
    """Examines addresses from one node.

    Args:
        tell: hears each step as it ends.
    """

    def __init__(self, network: TcpNetwork, notary: Notary, tell: Tell, patience: Patience | None = None) -> None:
        self._network = network
        self._notary = notary
        self._tell = tell
        self._patience = patience or Patience()
        self._steps: list[Step] = []

    async def examine(self, addr: str) -> tuple[list[Step], Contact | None]:
        """All steps of one address, and the peer's contact if it was reached.

        Raises:
            ConfigError: not an address.
        """
        self._steps = []
        address = parse_address(addr)
        others = set(self._network.connections)
        connection = await (self._meet(address, addr) if address.relay is not None else self._dial(address, addr))
        if connection is None:
            for step in get_skipped(self._steps):
                await self._add(step)
            return self._steps, None
        contact = connection.peer.contact or Contact(peer_id=connection.peer_id, addrs=[addr])
        try:
            await self._look_at_clock(connection)
            nearest = await self._look_at_dht(connection)
            await self._look_at_adverts(connection, addr, nearest)
            await self._look_at_data(connection, address, addr)
            if address.relay is None:
                await self._look_at_relays(contact)
        finally:
            if connection not in others and any(c.peer_id == connection.peer_id and c.is_open for c in others):
                connection.close(ConnectionLost("the examination is over"))  # one with this peer is enough
        return self._steps, contact

    # -- getting there ------------------------------------------------------------------------------------------

    async def _dial(self, address: Address, addr: str) -> Connection | None:
        began = trio.current_time()
        try:
            info = await look_up(address, addr, self._network.lookups)
        except DaaswarmError as error:
            error.step = "name"
            await self._add(judge_error(error), began)
            return None
        host = str(info[4][0])
        is_name = address.protocol.startswith("dns")
        await self._add(_ok("name", f"{address.host} is {host}" if is_name else "an IP address"), began)
        began = trio.current_time()
        way = judge_way(host, find_source(host), read_networks())
        if way.verdict != "warning":  # which is a failure if nobody answers
            await self._add(way, began)
        if way.verdict == "failed":
            return None
        began = trio.current_time()
        passed_s = 0.0
        send, receive = trio.open_memory_channel[tuple[str, float]](len(DIALLED))
        dialling = Dialling(
            self._patience.connect_s,
            self._patience.handshake_s,
            note=lambda step, seconds: send.send_nowait((step, seconds)),
        )
        outcome: list[Connection | DaaswarmError] = []

        async def dial() -> None:
            with send:
                try:
                    outcome.append(await self._network.dial_anew(addr, dialling))
                except DaaswarmError as error:
                    outcome.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dial)
            async for step, seconds in receive:
                passed_s += seconds
                if way.verdict == "warning" and step == "tcp":
                    await self._add(way)
                if step != "handshake":
                    await self._add_passed({"tcp": "tls", "tls": "peer id"}[step], address, seconds=seconds)
        result = outcome[0]
        if isinstance(result, Connection):
            await self._add_passed("", address, result.peer_id, seconds=seconds)
            return result
        step = judge_error(result, way)
        await self._add_passed(step.name, address)
        await self._add(step, seconds=trio.current_time() - began - passed_s)
        return None

    async def _add_passed(self, until: str, address: Address, proven: str = "", *, seconds: float = 0.0) -> None:
        """What must have gone well to get as far as ``until``, if it isn't told yet; all if that is empty."""
        has_key = self._network.identity.swarm_key is not None
        seen = {
            "tcp": "connected",
            "tls": "TLS 1.3",
            "peer id": "the one that the address names"
            if address.peer_id
            else f"{proven or 'proven'}; the address names none",
            "version": f"protocol version {PROTOCOL_VERSION}",
            "swarm": "the same",
            "swarm key": "proven by both sides" if has_key else "the swarm has none",
        }
        told = {step.name for step in self._steps}
        for name in DIALLED if until in ("", *DIALLED) else ():
            if name == until:
                return
            if name not in told:
                await self._add(_ok(name, seen[name]), seconds=seconds)
                seconds = 0.0

    async def _meet(self, address: Address, addr: str) -> Connection | None:
        """Through the relay that the address names."""
        assert address.peer_id is not None
        began = trio.current_time()
        try:
            connection = None
            with trio.move_on_after(MEETING_S):
                hands = await self._network.circuits.dial(address, addr)
                dialled = self._network.get(address.peer_id)
                connection = dialled if hands is None else self._network.add(hands, is_client=True)
            if connection is None:
                raise Unreachable(f"not met within {MEETING_S:g} s")
        except DaaswarmError as error:
            name, _ = find_cause(error)
            hint = error.hint or "is the peer running? Its relays may have changed: daaswarm status, there, says them"
            if name in DIALLED[2:]:  # the relay led to somebody
                await self._add(_ok("relay", "it led to a peer"))
                await self._add_passed(name, address)
            else:
                name = "relay"
            await self._add(Step(name=name, verdict="failed", seen=error.message, next=hint), began)
            return None
        way = "through the relay" if connection.is_relayed else "it dialled this node, as the relay asked it to"
        await self._add(_ok("relay", way), began)
        await self._add_passed("", address)
        return connection

    # -- once there ---------------------------------------------------------------------------------------------

    async def _look_at_clock(self, connection: Connection) -> None:
        began = trio.current_time()
        try:
            skew = await measure_skew(connection, self._patience.call_s)
        except DaaswarmError as error:
            await self._add(Step(name="clock", verdict="failed", seen=error.message, next=error.hint), began)
            return
        if skew is None:
            await self._add(Step(name="clock", verdict="skipped", seen="the peer doesn't tell its time"), began)
        else:
            await self._add(judge_clock(*skew), began)

    async def _look_at_dht(self, connection: Connection) -> list[Contact]:
        """Returns the peers nearest to the examined one, as it says."""
        began = trio.current_time()
        target = FindNode(target=get_node_id(connection.peer_id))
        try:
            reply, _ = await connection.call(target, deadline_s=self._patience.call_s)
        except DaaswarmError as error:
            text = f"it answers no lookup: {error.message}"
            await self._add(Step(name="dht", verdict="failed", seen=text, next="its log says why"), began)
            return []
        own = (self._network.peer_id, connection.peer_id)
        contacts = reply.contacts if isinstance(reply, Found) else []
        nearest = [contact for contact in contacts if contact.peer_id not in own]
        others = len(nearest)
        await self._add(_ok("dht", f"answers lookups, and names {others} other peer{'s' * (others != 1)}"), began)
        return nearest

    async def _look_at_adverts(self, connection: Connection, addr: str, nearest: list[Contact]) -> None:
        """What it says of itself, and what others say of it."""
        began = trio.current_time()
        served: list[str] = []
        try:
            reply, _ = await connection.call(GetAdverts(), deadline_s=self._patience.call_s)
            for signed in reply.adverts if isinstance(reply, Adverts) else ():
                known = self._notary.open_advert(signed, time.time())
                if known.advert.peer_id != connection.peer_id:
                    hint = "it shows as its own what another serves: trust nothing that it says"
                    raise RemoteProtocolError(f"an advert of {known.advert.peer_id}", hint=hint)
                served.append(f"{known.advert.model_name} ({len(known.advert.held)} layers)")
        except RemoteProtocolError as error:
            text = f"what it serves is refused: {error.message}"
            hint = error.hint or "compare the clocks"
            await self._add(Step(name="advert", verdict="failed", seen=text, next=hint), began)
            return
        except DaaswarmError as error:
            text = f"it doesn't say what it serves: {error.message}"
            hint = error.hint or "its log says why"
            await self._add(Step(name="advert", verdict="failed", seen=text, next=hint), began)
            return
        shown = ", ".join(served[:SHOWN]) + f" and {len(served) - SHOWN} more" * (len(served) > SHOWN)
        parts = [_ok("advert", f"serves {shown}" if served else "serves no model")]
        announced = connection.peer.contact.addrs if connection.peer.contact is not None else []
        if announced and _strip(addr) not in {_strip(each) for each in announced}:
            seen = f"it announces {', '.join(announced[:SHOWN])}"
            hint = "others are told those, not the one that you gave"
            parts.append(Step(name="advert", verdict="warning", seen=seen, next=hint))
        if announced:  # who only dials is known to nobody
            told = await self._ask_others(connection.peer_id, nearest)
            parts.append(judge_known(connection.peer_id, announced, told))
        await self._add(merge(parts), began)

    async def _ask_others(self, peer: str, nearest: list[Contact]) -> list[list[str] | None]:
        """At which addresses each of some other peers knows it; ``None`` for who doesn't."""
        told: list[list[str] | None] = []

        async def ask(contact: Contact) -> None:
            try:
                message = FindNode(target=get_node_id(peer))
                reply, _ = await self._network.call(contact, message, deadline_s=self._patience.call_s)
            except DaaswarmError:
                return  # that one is another examination's business
            if isinstance(reply, Found):
                told.append(next((list(known.addrs) for known in reply.contacts if known.peer_id == peer), None))

        async with trio.open_nursery() as nursery:
            for contact in nearest[:ASKED]:
                nursery.start_soon(ask, contact)
        return told

    async def _look_at_data(self, connection: Connection, address: Address, addr: str) -> None:
        """Whether more than small messages pass, and whether what it announces can be dialled."""
        began = trio.current_time()
        body = os.urandom(ECHO_BYTES)
        fault = ""
        try:
            _, echo = await connection.call(Ping(echo=True), [body], deadline_s=self._patience.call_s)
            if bytes(echo) != body:
                fault = "it came back otherwise"
        except DaaswarmError as error:
            fault = error.message
        announced = list(connection.peer.contact.addrs) if connection.peer.contact is not None else []
        tried, own = await self._try_announced(connection.peer_id, announced, address)
        relays = sum(map(is_circuit, announced))
        await self._add(merge([judge_bulk(ECHO_BYTES, fault), judge_announced(addr, tried, own, relays)]), began)

    async def _try_announced(self, peer: str, addrs: list[str], dialled: Address) -> tuple[list[Announced], int]:
        """Dial each address to the end; and how many mean the peer's own machine."""
        tried: list[Announced] = []
        networks = read_networks()
        at_once = trio.CapacityLimiter(AT_ONCE)
        own = 0

        async def dial(addr: str, host: str) -> None:
            foreign = is_ip(host) and is_foreign(host, networks)
            each = Announced(addr=addr, fault=f"no answer within {self._patience.connect_s:g} s", is_foreign=foreign)
            async with at_once:
                with trio.move_on_after(self._patience.connect_s):
                    each = msgspec.structs.replace(each, fault=await self._try_address(peer, addr))
            tried.append(each)

        async with trio.open_nursery() as nursery:
            for addr in addrs:
                announced = _strip(addr)
                if announced is None:
                    tried.append(Announced(addr=addr, fault="not an address"))
                elif announced.relay is not None:
                    continue
                elif announced == _strip(str(dialled)):
                    tried.append(Announced(addr=addr))
                elif is_loopback(announced.host) and not is_loopback(dialled.host):
                    own += 1
                else:
                    nursery.start_soon(dial, addr, announced.host)
        return tried, own

    async def _try_address(self, peer: str, addr: str) -> str:
        """Why the peer doesn't answer there; empty if it does."""
        try:
            hands = await self._network.dial_directly(Contact(peer_id=peer, addrs=[addr]))
        except DaaswarmError as error:
            return error.message.removeprefix(f"{addr}: ").removeprefix(f"{addr} ")
        hands.carrier.shut_down()
        hands.carrier.close()
        return ""

    async def _look_at_relays(self, contact: Contact) -> None:
        began = trio.current_time()
        with trio.move_on_after(RELAYS_S) as scope:
            checks = await check_relay(self._network, contact)
        if scope.cancelled_caught:
            text = f"its relays took more than {RELAYS_S:g} s"
            await self._add(Step(name="relay", verdict="failed", seen=text, next="try again later"), began)
            return
        if not checks:
            await self._add(Step(name="relay", verdict="skipped", seen="it is met without one"))
            return
        failed = [f"{check.addr}: {check.error.message}" for check in checks if check.error is not None]
        good = [f"…{check.relay[-6:]} ({check.how})" for check in checks if check.error is None]
        if good:
            seen = f"met through {', '.join(good)}" + (f"; not {'; '.join(failed)}" if failed else "")
            await self._add(Step(name="relay", verdict="warning" if failed else "ok", seen=seen), began)
        else:
            hint = "its relays went away; it finds others within half a minute, then its addresses change"
            await self._add(Step(name="relay", verdict="failed", seen="; ".join(failed), next=hint), began)

    async def _add(self, step: Step, began: float | None = None, *, seconds: float = 0.0) -> None:
        if began is not None:
            seconds = trio.current_time() - began
        step = msgspec.structs.replace(step, seconds=seconds)
        self._steps.append(step)
        await self._tell(step)


async def measure_skew(connection: Connection, deadline_s: float = CALL_S) -> tuple[float, float] | None:
    """The peer's clock less this machine's, and how far off that may be (both s); ``None`` if it doesn't tell.

    Raises:
        DaaswarmError: no answer.
    """
    began, asked = trio.current_time(), time.time()
    reply, _ = await connection.call(Ping(), deadline_s=deadline_s)
    half = (trio.current_time() - began) / 2
    if not isinstance(reply, Pong) or not reply.time or not math.isfinite(reply.time):
        return None
    return reply.time - (asked + half), half


def explain(error: DaaswarmError, addr: str) -> Step:
    """At which step a dial of ``addr`` failed, and why: without another look, apart from this machine's networks."""
    address = _strip(addr)
    if address is None or address.relay is not None or not is_ip(address.host):
        return judge_error(error)
    return judge_error(error, judge_way(address.host, find_source(address.host), read_networks()))


async def find_fault(network: TcpNetwork, addr: str, patience: Patience) -> Step | None:
    """The short form: dial once and say at which step it failed; ``None`` if it didn't."""
    try:
        await network.dial_anew(addr, Dialling(patience.connect_s, patience.handshake_s))
    except DaaswarmError as error:
        return explain(error, addr)
    return None


def _ok(name: str, seen: str) -> Step:
    return Step(name=name, verdict="ok", seen=seen)


def _strip(addr: str) -> Address | None:
    """Without the PeerId; ``None`` if a peer announces what is no address."""
    try:
        address = parse_address(addr)
    except ConfigError:
        return None
    return address._replace(peer_id=None)
