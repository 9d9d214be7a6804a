"""Reaching one address with the node's own code, and looking at each step: what ``network diagnose`` does.

The verdicts are :mod:`daaswarm.core.diagnosis`'s. Every step has a deadline, so all of them end within about a minute.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable

import msgspec
import trio

from daaswarm.core.diagnosis import (
    Step,
    get_skipped,
    judge_announced,
    judge_clock,
    judge_error,
    judge_way,
)
from daaswarm.core.notary import Notary
from daaswarm.core.routing_table import get_node_id
from daaswarm.errors import DaaswarmError, RemoteProtocolError
from daaswarm.messages import PROTOCOL_VERSION, Adverts, Contact, FindNode, Found, GetAdverts, Ping, Pong
from daaswarm.net.addresses import Address, parse_address
from daaswarm.net.circuits import check_relay
from daaswarm.net.connection import Connection
from daaswarm.net.dataplane import TcpNetwork
from daaswarm.net.interfaces import find_source, read_networks
from daaswarm.net.serving import ECHO_BYTES
from daaswarm.net.sockets import close, connect, look_up

CONNECT_S = 4.0  # for TCP: two packets lost on the way fit in
CALL_S = 5.0  # for one answer
SHOWN = 3  # models or relays in a line

Tell = Callable[[Step], Awaitable[None]]


class Examiner:
    """Examines addresses from one node.

    Args:
        tell: hears each step as it ends.
        connect_s: for TCP, and for what a peer announces.
    """

    def __init__(self, network: TcpNetwork, notary: Notary, tell: Tell, *, connect_s: float = CONNECT_S) -> None:
        self._network = network
        self._notary = notary
        self._tell = tell
        self._connect_s = connect_s
        self._steps: list[Step] = []

    async def examine(self, addr: str) -> tuple[list[Step], Contact | None]:
        """All steps of one address, and the peer's contact if it was reached.

        Raises:
            ConfigError: not an address.
        """
        self._steps = []
        address = parse_address(addr)
        connection = await (self._meet(address, addr) if address.relay is not None else self._dial(address, addr))
        contact = None
        if connection is not None:
            contact = connection.peer.contact or Contact(peer_id=connection.peer_id, addrs=[addr])
            await self._look_at_clock(connection)
            await self._look_at_dht(connection)
            await self._look_at_adverts(connection, contact, addr)
            await self._look_at_data(connection, contact, address, addr)
            if address.relay is None:
                await self._look_at_relays(contact)
        for step in get_skipped(self._steps) if connection is None else ():
            await self._add(step)
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
        if way.verdict == "failed":
            await self._add(way, began)
            return None
        timings: dict[str, float] = {}
        try:
            connection = await self._network.dial_anew(addr, timings, self._connect_s)
        except DaaswarmError as error:
            step = judge_error(error, way)
            if step.name != "interface":
                await self._add(way)
                await self._add_reached(timings, step.name)
            await self._add(step, began)
            return None
        await self._add(way)
        await self._add_reached(timings, "")
        return connection

    async def _add_reached(self, timings: dict[str, float], failed: str) -> None:
        """What must have gone well for ``failed`` to come up; all if it's empty."""
        has_key = self._network.identity.swarm_key is not None
        passed = (
            ("tcp", "connected", timings.get("tcp")),
            ("tls", "TLS 1.3", timings.get("tls")),
            ("peer id", "the one that the address names, if it names one", None),
            ("version", f"protocol version {PROTOCOL_VERSION}", timings.get("handshake")),
            ("swarm", "the same", None),
            ("swarm key", "proven by both sides" if has_key else "the swarm has none", None),
        )
        for name, seen, seconds in passed:
            if name == failed:
                return
            await self._add(_ok(name, seen), seconds=seconds)

    async def _meet(self, address: Address, addr: str) -> Connection | None:
        """Through the relay that the address names."""
        assert address.peer_id is not None
        contact = Contact(peer_id=address.peer_id, addrs=[addr])
        began = trio.current_time()
        try:
            await self._network.connect(contact)
        except DaaswarmError as error:
            hint = error.hint or "is the peer running? Its relays may have changed: daaswarm status, there, says them"
            await self._add(Step(name="relay", verdict="failed", seen=error.message, next=hint), began)
            return None
        connection = self._network.get(address.peer_id)
        if connection is None:
            await self._add(Step(name="relay", verdict="failed", seen="the connection ended at once"), began)
            return None
        way = "through the relay" if connection.is_relayed else "it dialled this node, as the relay asked it to"
        await self._add(_ok("relay", way), began)
        return connection

    # -- once there ---------------------------------------------------------------------------------------------

    async def _look_at_clock(self, connection: Connection) -> None:
        began, asked = trio.current_time(), time.time()
        try:
            reply, _ = await connection.call(Ping(), deadline_s=CALL_S)
        except DaaswarmError as error:
            await self._add(Step(name="clock", verdict="failed", seen=error.message, next=error.hint), began)
            return
        took = time.time() - asked
        if isinstance(reply, Pong) and reply.time:
            await self._add(judge_clock(reply.time - (asked + took / 2), took / 2), began)
        else:
            await self._add(Step(name="clock", verdict="skipped", seen="the peer doesn't tell its time"), began)

    async def _look_at_dht(self, connection: Connection) -> None:
        began = trio.current_time()
        try:
            reply, _ = await connection.call(FindNode(target=get_node_id(self._network.peer_id)), deadline_s=CALL_S)
        except DaaswarmError as error:
            text = f"it answers no lookup: {error.message}"
            await self._add(Step(name="dht", verdict="failed", seen=text, next="its log says why"), began)
            return
        others = len(reply.contacts) if isinstance(reply, Found) else 0
        await self._add(_ok("dht", f"answers lookups, and names {others} other peer{'s' * (others != 1)}"), began)

    async def _look_at_adverts(self, connection: Connection, contact: Contact, addr: str) -> None:
        began = trio.current_time()
        served: list[str] = []
        try:
            reply, _ = await connection.call(GetAdverts(), deadline_s=CALL_S)
            for signed in reply.adverts if isinstance(reply, Adverts) else ():
                known = self._notary.open_advert(signed, time.time())
                served.append(f"{known.advert.model_name} ({len(known.advert.held)} layers)")
        except RemoteProtocolError as error:
            text = f"what it serves is refused: {error.message}"
            await self._add(Step(name="advert", verdict="failed", seen=text, next="compare the clocks"), began)
            return
        except DaaswarmError as error:
            text = f"it doesn't say what it serves: {error.message}"
            await self._add(Step(name="advert", verdict="failed", seen=text, next=error.hint), began)
            return
        shown = ", ".join(served[:SHOWN]) + f" and {len(served) - SHOWN} more" * (len(served) > SHOWN)
        seen = f"serves {shown}" if served else "serves no model"
        bare = {parse_address(each)._replace(peer_id=None) for each in contact.addrs}
        if contact.addrs and parse_address(addr)._replace(peer_id=None) not in bare:
            told = ", ".join(contact.addrs[:SHOWN])
            hint = "others are told those, not the one that you gave"
            await self._add(
                Step(name="advert", verdict="warning", seen=f"{seen}; it announces {told}", next=hint), began
            )
            return
        await self._add(_ok("advert", seen), began)

    async def _look_at_data(self, connection: Connection, contact: Contact, address: Address, addr: str) -> None:
        """Whether what it announces can be dialled, and whether more than small messages pass."""
        began = trio.current_time()
        tried: dict[str, str] = {}

        async def knock(announced: Address, text: str) -> None:
            tried[text] = f"no answer within {self._connect_s:g} s"
            with trio.move_on_after(self._connect_s):
                try:
                    close(await connect(announced, text, self._network.lookups))
                except DaaswarmError as error:
                    tried[text] = error.message.removeprefix(f"{text}: ")
                else:
                    tried[text] = ""

        async with trio.open_nursery() as nursery:
            for text in contact.addrs:
                announced = parse_address(text)
                own = _is_loopback(announced) and not _is_loopback(address)  # means the peer itself
                if announced.relay is None and not own:
                    nursery.start_soon(knock, announced, text)
        step = judge_announced(addr, tried)
        if step.verdict == "ok":
            body = os.urandom(ECHO_BYTES)
            try:
                _, echo = await connection.call(Ping(echo=True), [body], deadline_s=CALL_S)
                if bytes(echo) != body:
                    raise RemoteProtocolError("it came back otherwise")
            except DaaswarmError as error:
                step = Step(
                    name="data",
                    verdict="failed",
                    seen=f"small messages pass, {ECHO_BYTES // 1024} KiB there and back don't: {error.message}",
                    next="a tunnel or firewall drops large packets: lower the MTU of the interface, 1280 always passes",
                )
            else:
                step = msgspec.structs.replace(step, seen=f"{step.seen}; {ECHO_BYTES // 1024} KiB there and back")
        await self._add(step, began)

    async def _look_at_relays(self, contact: Contact) -> None:
        began = trio.current_time()
        checks = await check_relay(self._network, contact)
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

    async def _add(self, step: Step, began: float | None = None, *, seconds: float | None = None) -> None:
        if began is not None:
            seconds = trio.current_time() - began
        step = msgspec.structs.replace(step, seconds=seconds or 0.0)
        self._steps.append(step)
        await self._tell(step)


def _ok(name: str, seen: str) -> Step:
    return Step(name=name, verdict="ok", seen=seen)


def _is_loopback(address: Address) -> bool:
    return address.host.startswith("127.") or address.host in ("::1", "localhost")
