"""What ``daaswarm network diagnose`` says: of one peer, or of this node and those through which it joins; and its short
form, of the hosts that an answer could not be had from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from daaswarm.config import Config
from daaswarm.core.diagnosis import (
    Step,
    get_worst,
    judge_listening,
    judge_own_clock,
    judge_peers,
    judge_reachable,
)
from daaswarm.core.routing_table import get_node_id
from daaswarm.core.signing import get_public_key
from daaswarm.errors import ConfigError, DaaswarmError, NoPeerCouldServe, unwrap_groups
from daaswarm.messages import Contact
from daaswarm.net.addresses import find_left_out, get_announce_addrs, is_loopback, parse_address
from daaswarm.net.circuits import is_circuit
from daaswarm.net.connection import Connection
from daaswarm.net.dataplane import TcpNetwork
from daaswarm.net.discovery import Discovery
from daaswarm.net.examining import Examiner, Patience, find_fault, measure_skew
from daaswarm.node.reporting import Emit, Event
from daaswarm.types import ModelRoot, PeerId

if TYPE_CHECKING:
    from daaswarm.node.reaching import Reaching

ADDRESSES = 4  # of one peer that are examined
BOOTSTRAPS = 8  # of the settings
CLOCKS = 5  # peers whose clocks are compared with this node's: an odd number has a middle
UNREACHED = 3  # hosts of which the short form speaks
SHORT = Patience(connect_s=2.0, handshake_s=2.0)
SHORT_S = 4.0  # for all of them: whoever waits for an answer has waited long enough


class Diagnosing:
    """One node's examinations.

    Args:
        is_running: this node runs for its own sake, not for this examination.
    """

    def __init__(
        self,
        config: Config,
        network: TcpNetwork,
        discovery: Discovery,
        reaching: Reaching,
        *,
        is_running: bool,
    ) -> None:
        self._config = config.network
        self._network = network
        self._discovery = discovery
        self._reaching = reaching
        self._is_running = is_running

    async def diagnose(
        self, peer: str | None, bootstrap: list[str], timeout_s: float | None, *, known: Iterable[Contact], emit: Emit
    ) -> Event:
        """``peer``: a multiaddress, a PeerId, or ``None`` for this node itself and its ``bootstrap`` addresses.

        Returns ``targets`` (``addr``, ``steps``, ``verdict``, ``step``, ``next``), without ``peer`` before them ``own``
        (likewise), and the worst ``verdict`` with its ``step`` and ``next``.

        Args:
            timeout_s: for one answer.
            known: peers of earlier runs.

        Raises:
            ConfigError: ``peer`` is neither, or a PeerId that nobody knows.
        """
        patience = Patience() if timeout_s is None else Patience(timeout_s, timeout_s, timeout_s)
        bootstrap = (bootstrap or self._config.bootstrap)[:BOOTSTRAPS]
        if peer is None:
            own = await self._examine_own(bool(bootstrap), emit)
            targets = [await self._examine(addr, emit, patience) for addr in bootstrap]
            return {"own": own, "targets": targets, **_get_verdict([own, *targets])}
        if peer.startswith("/"):
            parse_address(peer)
            targets = [await self._examine(peer, emit, patience)]
            return {"targets": targets, **_get_verdict(targets)}
        addrs = (await self._find(peer, bootstrap, known)).addrs[:ADDRESSES]
        targets = [await self._examine_of(PeerId(peer), addr, emit, patience) for addr in addrs]
        # A peer needs one address that works.
        good = [target for target in targets if target["verdict"] != "failed"]
        return {"targets": targets, **_get_verdict(good or targets)}

    @asynccontextmanager
    async def explaining(self, root: ModelRoot, emit: Emit) -> AsyncIterator[None]:
        """Where the block finds nobody to serve a model, say why the hosts don't answer: one line each,
        :data:`UNREACHED` at most."""
        try:
            with unwrap_groups():
                yield
        except NoPeerCouldServe:
            await self._explain(self._discovery.finder.get_unanswered(root), emit)
            raise

    async def _explain(self, hosts: Iterable[Contact], emit: Emit) -> None:
        addrs: dict[PeerId, str] = {}
        for contact in hosts:
            direct = [addr for addr in contact.addrs if not is_circuit(addr) and addr.isprintable()]
            if direct:
                addrs.setdefault(PeerId(contact.peer_id), direct[0])
        found: dict[PeerId, tuple[str, Step]] = {}

        async def look(peer: PeerId, addr: str) -> None:
            try:
                parse_address(addr)
            except ConfigError:  # in somebody's advert
                return
            step = await find_fault(self._network, addr, SHORT)
            if step is not None:
                found[peer] = addr, step

        with trio.move_on_after(SHORT_S):
            async with trio.open_nursery() as nursery:
                for peer, addr in list(addrs.items())[:UNREACHED]:
                    nursery.start_soon(look, peer, addr)
        for peer, (addr, step) in sorted(found.items()):
            why = step.next.partition(". ")[0] or step.seen
            text = f"host …{peer[-6:]} fails at {step.name}: {why}. More: daaswarm network diagnose {addr}"
            await emit({"event": "message", "text": text})

    # -- one target ---------------------------------------------------------------------------------------------

    async def _examine(self, addr: str, emit: Emit, patience: Patience) -> Event:
        async def tell(step: Step) -> None:
            await emit({"event": "step", "addr": addr, **_describe(step)})

        await emit({"event": "target", "addr": addr})
        examiner = Examiner(self._network, self._discovery.notary, tell, patience)
        steps, contact = await examiner.examine(addr)
        if contact is not None and contact.addrs:
            self._discovery.join([contact])
        peer_id = contact.peer_id if contact is not None else None
        return {"addr": addr, "peer_id": peer_id, **_conclude(steps)}

    async def _examine_of(self, peer: PeerId, addr: str, emit: Emit, patience: Patience) -> Event:
        """An address that somebody says is ``peer``'s: whoever else answers there doesn't count."""
        try:
            address = parse_address(addr)
        except ConfigError as error:
            step = Step(name="name", verdict="failed", seen=error.message, next="the peer announces what is no address")
        else:
            if address.peer_id in (None, peer):
                return await self._examine(str(address._replace(peer_id=peer)), emit, patience)
            hint = "the peer announces another's address"
            step = Step(name="peer id", verdict="failed", seen=f"an address of {address.peer_id}", next=hint)
        await emit({"event": "target", "addr": addr})
        await emit({"event": "step", "addr": addr, **_describe(step)})
        return {"addr": addr, "peer_id": None, **_conclude([step])}

    async def _examine_own(self, has_bootstrap: bool, emit: Emit) -> Event:
        await emit({"event": "target", "addr": "this node"})
        steps: list[Step] = []

        async def tell(step: Step, began: float) -> None:
            steps.append(msgspec.structs.replace(step, seconds=trio.current_time() - began))
            await emit({"event": "step", "addr": "this node", **_describe(steps[-1])})

        began = trio.current_time()
        await tell(self._look_at_listening(), began)
        connections = {connection.peer_id: connection for connection in self._network.connections if connection.is_open}
        began = trio.current_time()
        await tell(judge_own_clock(await _measure_skews(list(connections.values())[:CLOCKS])), began)
        if self._is_running:
            began = trio.current_time()
            reach = self._reaching.describe()
            await tell(judge_reachable(reach["verdict"], len(reach["relays"])), began)
            known = self._discovery.get_known()
            await tell(judge_peers(len(known), len(connections), has_bootstrap), began)
        return _conclude(steps)

    def _look_at_listening(self) -> Step:
        listening = parse_address(self._config.listen)
        addresses = self._network.listen_addresses or [listening]
        if self._is_running:
            addrs = list(self._network.contact.addrs) if self._network.contact else []
        else:
            addrs = get_announce_addrs(addresses, self._config.announce, self._network.peer_id, self._config.interfaces)
        left_out = [] if self._config.announce else find_left_out(addresses, self._config.interfaces)
        reasons = [f"{each.host} ({each.name}: {each.reason})" for each in left_out]
        is_local = is_loopback(listening.host) and not self._config.announce
        return judge_listening(addrs, self._is_running, is_local, reasons)

    # -- a peer by its id ---------------------------------------------------------------------------------------

    async def _find(self, peer: str, bootstrap: list[str], earlier: Iterable[Contact]) -> Contact:
        try:
            get_public_key(peer)
        except ConfigError as error:
            text = f"{peer!r} is neither a multiaddress nor a PeerId"
            raise ConfigError(text, hint="write it like /ip4/192.0.2.7/tcp/4001/p2p/12D3Koo… or 12D3Koo…") from error
        peer_id = PeerId(peer)
        if peer_id == self._network.peer_id:
            raise ConfigError("that is this node itself", hint="leave it away to examine this node")
        known = _pick(self._discovery.get_known(), peer)
        if known is None:
            async with trio.open_nursery() as nursery:
                for addr in bootstrap:
                    nursery.start_soon(self._try, addr)
            found = await self._discovery.lookup(get_node_id(peer_id), "nodes")
            known = _pick(found.contacts, peer) or _pick(earlier, peer)
        if known is None or not known.addrs:
            hint = "ask its owner for an address: daaswarm status, there, says it; then give that instead"
            raise ConfigError(f"nobody that this node knows has heard of {peer}", hint=hint)
        return known

    async def _try(self, addr: str) -> None:
        try:
            self._discovery.join([await self._network.connect_addr(addr)])
        except DaaswarmError:
            return


async def _measure_skews(connections: list[Connection]) -> list[tuple[float, float]]:
    skews: list[tuple[float, float]] = []

    async def measure(connection: Connection) -> None:
        try:
            skew = await measure_skew(connection)
        except DaaswarmError:
            return  # it may just have left
        if skew is not None:
            skews.append(skew)

    async with trio.open_nursery() as nursery:
        for connection in connections:
            nursery.start_soon(measure, connection)
    return skews


def _pick(contacts: Iterable[Contact], peer: str) -> Contact | None:
    return next((contact for contact in contacts if contact.peer_id == peer and contact.addrs), None)


def _conclude(steps: list[Step]) -> Event:
    worst = get_worst(steps)
    return {
        "verdict": worst.verdict if worst is not None else "ok",
        "step": worst.name if worst is not None else None,
        "next": worst.next if worst is not None else "",
        "steps": [_describe(step) for step in steps],
    }


def _get_verdict(parts: list[Event]) -> Event:
    """Of all together: the first of the worst."""
    for verdict in ("failed", "warning"):
        for part in parts:
            if part["verdict"] == verdict:
                return {key: part[key] for key in ("verdict", "step", "next")}
    return {"verdict": "ok", "step": None, "next": ""}


def _describe(step: Step) -> dict[str, Any]:
    found = msgspec.to_builtins(step)
    found["ms"] = round(found.pop("seconds") * 1000, 1)
    return found
