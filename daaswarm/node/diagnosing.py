"""What ``daaswarm network diagnose`` says: of one peer, or of this node and those through which it joins."""

from __future__ import annotations

from typing import Any

import msgspec
import trio

from daaswarm.core.diagnosis import Step, get_worst
from daaswarm.core.notary import Notary
from daaswarm.core.routing_table import get_node_id
from daaswarm.core.signing import get_public_key
from daaswarm.errors import ConfigError, DaaswarmError
from daaswarm.messages import Contact
from daaswarm.net.addresses import parse_address
from daaswarm.net.dataplane import TcpNetwork
from daaswarm.net.discovery import Discovery
from daaswarm.net.examining import Examiner
from daaswarm.node.reporting import Emit, Event
from daaswarm.types import PeerId

ADDRESSES = 4  # of one peer that are examined
BOOTSTRAPS = 8  # of the settings


class Diagnosing:
    """One node's examinations."""

    def __init__(self, network: TcpNetwork, discovery: Discovery, notary: Notary) -> None:
        self._network = network
        self._discovery = discovery
        self._notary = notary

    async def diagnose(self, peer: str | None, bootstrap: list[str], emit: Emit) -> Event:
        """``peer``: a multiaddress, a PeerId, or ``None`` for this node itself and its ``bootstrap`` addresses.

        Returns ``targets`` (``addr``, ``steps``, ``verdict``, ``step``, ``next``), and their worst ``verdict``.

        Raises:
            ConfigError: ``peer`` is neither, or a PeerId that nobody knows.
        """
        if peer is None:
            addrs = bootstrap[:BOOTSTRAPS]
        elif peer.startswith("/"):
            parse_address(peer)
            addrs = [peer]
        else:
            addrs = (await self._find(peer, bootstrap)).addrs[:ADDRESSES]
        targets = [await self._examine(addr, emit) for addr in addrs]
        verdicts = [target["verdict"] for target in targets]
        if peer is not None and not peer.startswith("/") and "ok" in verdicts:
            verdict = "ok"  # a peer needs one address that works
        else:
            verdict = next((v for v in ("failed", "warning") if v in verdicts), "ok")
        return {"targets": targets, "verdict": verdict}

    async def _examine(self, addr: str, emit: Emit) -> Event:
        async def tell(step: Step) -> None:
            await emit({"event": "step", "addr": addr, **_describe(step)})

        await emit({"event": "target", "addr": addr})
        steps, contact = await Examiner(self._network, self._notary, tell).examine(addr)
        worst = get_worst(steps)
        if contact is not None and contact.addrs:
            self._discovery.join([contact])
        return {
            "addr": addr,
            "peer_id": contact.peer_id if contact is not None else None,
            "verdict": worst.verdict if worst is not None else "ok",
            "step": worst.name if worst is not None else None,
            "next": worst.next if worst is not None else "",
            "steps": [_describe(step) for step in steps],
        }

    async def _find(self, peer: str, bootstrap: list[str]) -> Contact:
        try:
            get_public_key(peer)
        except ConfigError as error:
            text = f"{peer!r} is neither a multiaddress nor a PeerId"
            raise ConfigError(text, hint="write it like /ip4/192.0.2.7/tcp/4001/p2p/12D3Koo… or 12D3Koo…") from error
        peer_id = PeerId(peer)
        if peer_id == self._network.peer_id:
            raise ConfigError("that is this node itself", hint="leave it away to examine this node")
        known = next((contact for contact in self._discovery.get_known() if contact.peer_id == peer), None)
        if known is None:
            async with trio.open_nursery() as nursery:
                for addr in bootstrap[:BOOTSTRAPS]:
                    nursery.start_soon(self._try, addr)
            found = await self._discovery.lookup(get_node_id(peer_id), "nodes")
            known = next((contact for contact in found.contacts if contact.peer_id == peer), None)
        if known is None or not known.addrs:
            hint = "ask its owner for an address: daaswarm status, there, says it; then give that instead"
            raise ConfigError(f"nobody that this node knows has heard of {peer}", hint=hint)
        return known

    async def _try(self, addr: str) -> None:
        try:
            self._discovery.join([await self._network.connect_addr(addr)])
        except DaaswarmError:
            return


def _describe(step: Step) -> dict[str, Any]:
    found = msgspec.to_builtins(step)
    found["ms"] = round(found.pop("seconds") * 1000, 1)
    return found
