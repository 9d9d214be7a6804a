"""What a node finds out about others: whom it knows, what they serve, and whether they compute it rightly."""

from __future__ import annotations

import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

import trio

from daaswarm.config import get_cache_dir
from daaswarm.core.adverts import Known, has_tag
from daaswarm.errors import Busy, DaaswarmError, NoPeerCouldServe
from daaswarm.messages import Advert, Contact, ExpertReply, Ping
from daaswarm.models.sources import DEFAULT_NAMES, LocalModel, list_models
from daaswarm.net.dataplane import TcpNetwork
from daaswarm.net.discovery import Discovery
from daaswarm.node.hosting import Hosting
from daaswarm.node.reporting import Emit, Event, get_model
from daaswarm.node.trusting import Trusting, describe_trust
from daaswarm.store.node_store import NodeStore
from daaswarm.types import Dtype, ModelRoot, PeerId

if TYPE_CHECKING:
    from daaswarm.experts.verifying import Sample

PING_S = 3.0  # for a round trip; a peer that needs longer is as good as gone
PINGS_AT_ONCE = 32
VERIFY_CALL_S = 10.0  # of one call: four rows through one expert
BUSY_RETRIES = 5  # of one sample
LOOKED_UP = 64  # models whose hosts are looked up where none is named; more than a cache holds
LOOKUPS_AT_ONCE = 8
LOOKUPS_S = 30.0  # for all of them together: one where every host is dead takes as long

RANK = {"wrong": 0, "refused": 1, "unreachable": 2, "busy": 3, "paused": 4, "ok": 5}  # what stands first in the table


class Surveying:
    """The asking about others of one node."""

    def __init__(
        self, network: TcpNetwork, discovery: Discovery, hosting: Hosting, store: NodeStore, trusting: Trusting
    ) -> None:
        self._trusting = trusting
        self._network = network
        self._discovery = discovery
        self._hosting = hosting
        self._store = store

    async def list_peers(self) -> Event:
        """What ``peers list`` shows: everybody known, nearest first by round trip."""
        found: dict[str, Event] = {}
        for record in await self._store.get_peers(limit=1_024):
            found[record.peer_id] = describe_peer(record.peer_id, record.addrs, record.agent, record.last_seen)
        for entry in self._discovery.kademlia.table.get_entries():
            contact = entry.contact
            agent = found.get(contact.peer_id, {}).get("agent", "")
            found[contact.peer_id] = describe_peer(contact.peer_id, contact.addrs, agent, entry.seen_at)
        for connection in self._network.connections:
            peer = connection.peer
            addrs = list(peer.contact.addrs) if peer.contact is not None else []
            known = found.setdefault(peer.peer_id, describe_peer(peer.peer_id, addrs, peer.agent, time.time()))
            known |= {"connected": True, "agent": peer.agent, "last_seen": time.time()}
            known["relayed"] = self._network.get_direct(peer.peer_id) is None
        waiting = iter([peer for peer in found.values() if peer["connected"]])

        async def ping_some() -> None:
            for peer in waiting:
                peer["rtt_ms"] = await self._ping(Contact(peer_id=peer["peer_id"], addrs=peer["addrs"]))

        async with trio.open_nursery() as nursery:
            for _ in range(PINGS_AT_ONCE):
                nursery.start_soon(ping_some)
        trust = describe_trust(await self._trusting.get_standings())
        for peer_id, peer in found.items():
            peer["trust"] = trust.get(PeerId(peer_id))
        order = sorted(found.values(), key=lambda p: (not p["connected"], p["rtt_ms"] or 1e9, -p["last_seen"]))
        return {"running": True, "peers": order}

    async def _ping(self, contact: Contact) -> float | None:
        """The round trip in ms."""
        began = trio.current_time()
        try:
            await self._network.call(contact, Ping(), deadline_s=PING_S)
        except DaaswarmError:
            return None
        return round((trio.current_time() - began) * 1e3, 2)

    async def list_available(self, params: Event, emit: Emit) -> Event:
        """What ``expert list --available`` shows: who serves what.

        The swarm can only be asked about a model. Where none is named, that is the default one and those in the cache;
        of others, what the peers that this node knows serve is shown, and what these tell of theirs.

        Raises:
            NoPeerCouldServe: nobody serves the model, or the tag, that was named.
        """
        wanted, tag = params["model"], params["tag"] or ""
        found = await self._discovery.finder.find_all(tag=tag)
        known = {(k.advert.peer_id, k.advert.model_root): k for k in found}
        if wanted is None:
            roots = sorted(await trio.to_thread.run_sync(list_own_roots, abandon_on_cancel=True))
        else:
            root = await find_root(wanted)
            known = {key: k for key, k in known.items() if is_meant(k.advert, wanted, root)}
            # What the name means here comes first: others can make up any number of models of that name.
            others = sorted({ModelRoot(model_root) for _, model_root in known} - {root})
            roots = [root, *others] if root is not None else others
        for k in await self._look_up(roots):
            known[k.advert.peer_id, k.advert.model_root] = k
        if tag:
            known = {key: k for key, k in known.items() if has_tag(k.advert, tag)}
        if (wanted is not None or tag) and not known:
            what = " with the tag ".join(filter(None, [wanted or "a model", tag]))
            raise NoPeerCouldServe(
                f"nobody in the swarm serves {what}",
                hint="serve it: daaswarm host-expert, or look at all: daaswarm expert list --available",
            )
        hosts = [self._describe_host(k) for k in known.values()]
        return {"hosts": sorted(hosts, key=lambda h: (h["model"], h["model_root"], h["peer_id"]))}

    async def _look_up(self, roots: list[ModelRoot]) -> list[Known]:
        """The adverts of all live hosts of these models, in this order as far as :data:`LOOKUPS_S` allows."""
        waiting = iter(roots)
        found: list[Known] = []

        async def look_up_some() -> None:
            for root in waiting:
                found.extend(await self._discovery.find_adverts(root))

        with trio.move_on_after(LOOKUPS_S):
            async with trio.open_nursery() as nursery:
                for _ in range(min(LOOKUPS_AT_ONCE, len(roots))):
                    nursery.start_soon(look_up_some)
        return found

    def _describe_host(self, known: Known) -> Event:
        advert = known.advert
        return {
            "peer_id": advert.peer_id,
            "self": advert.peer_id == self._network.peer_id,
            "model": advert.model_name,
            "model_root": advert.model_root,
            "kind": advert.kind,
            "dtype": advert.dtype,
            "held": {str(layer): experts for layer, experts in known.experts.items()},
            "paused": advert.paused,
            "load": advert.load,
            "price": advert.price,
            "tags": list(advert.tags),
            "addrs": list(advert.addrs),
            "connected": self._network.is_connected(PeerId(advert.peer_id)),
        }

    # -- verifying ----------------------------------------------------------------------------------------------

    async def verify(self, params: Event, emit: Emit) -> Event:
        """What ``expert verify`` does: ask each live host of a model what this node can compute itself.

        Raises:
            ModelError: a bad model, or the checkpoint here was altered, so that nothing can be compared.
            NoPeerCouldServe: nobody serves it, or not the peer that was named.
        """
        model = await get_model(params["model"], emit)
        await trio.to_thread.run_sync(import_module, "daaswarm.experts.verifying", abandon_on_cancel=True)
        known = [k for k in await self._discovery.find_adverts(model.root) if k.advert.kind == model.kind]
        peer = params["peer"]
        if peer is not None:
            known = [k for k in known if k.advert.peer_id == peer]
        if not known:
            who = f"peer {peer} serves no {model.name}" if peer else f"nobody in the swarm serves {model.name}"
            raise NoPeerCouldServe(who, hint="who serves what: daaswarm expert list --available")
        verdicts: list[Event] = []
        total = len(known) * params["samples"]
        for host in known:
            done = len(verdicts) * params["samples"]
            verdicts.append(await self._verify_host(model, host, params["samples"], emit, done, total))
        await emit({"event": "progress", "what": "verifying", "done": total, "total": total, "unit": "samples"})
        wrong = [v["peer_id"] for v in verdicts if v["verdict"] == "wrong"]
        return {
            "model": model.name,
            "model_root": model.root,
            "samples": params["samples"],
            "hosts": sorted(verdicts, key=lambda v: (RANK[v["verdict"]], v["peer_id"])),
            "wrong": wrong,
        }

    async def _verify_host(
        self, model: LocalModel, known: Known, count: int, emit: Emit, done: int, total: int
    ) -> Event:
        from daaswarm.experts.verifying import TOLERANCES, choose_samples, make_sample

        advert = known.advert
        dtype: Dtype = advert.dtype  # type: ignore[assignment]
        held = {
            layer: [e for e in experts if e < model.layers[layer]]
            for layer, experts in known.experts.items()
            if layer in model.layers
        }
        verdict: Event = {
            "peer_id": advert.peer_id,
            "addrs": list(advert.addrs),
            "dtype": dtype,
            "verdict": "refused",
            "samples": 0,
            "worst_error": 0.0,
            "tolerance": TOLERANCES[dtype],
            "wrong_experts": [],
            "reason": "" if any(held.values()) else "it serves none of the model's experts",
        }
        if not any(held.values()):
            return verdict
        for number, expert in enumerate(choose_samples(held, count)):
            progress = {"event": "progress", "what": "verifying", "done": done + number, "total": total}
            await emit({**progress, "unit": "samples"})
            sample = await trio.to_thread.run_sync(make_sample, model, expert, dtype, abandon_on_cancel=True)
            try:
                error = await self._ask(advert, sample)
            except Busy as busy:
                verdict |= {"verdict": "paused" if advert.paused else "busy", "reason": busy.message}
                break
            except DaaswarmError as failure:
                lost = failure.code in ("unreachable", "connection_lost", "deadline_exceeded")
                verdict |= {"verdict": "unreachable" if lost else "refused", "reason": failure.message}
                break
            verdict["samples"] += 1
            verdict["worst_error"] = max(verdict["worst_error"], min(error, 1e300))  # JSON has no infinity
            if not error <= TOLERANCES[dtype]:
                verdict["wrong_experts"].append([expert.layer, expert.expert])
        else:
            verdict["verdict"] = "ok"
        if verdict["wrong_experts"]:
            layer, number = verdict["wrong_experts"][0]
            verdict |= {"verdict": "wrong", "reason": f"layer {layer}, expert {number}: not what the checkpoint gives"}
        return verdict

    async def _ask(self, advert: Advert, sample: Sample) -> float:
        """The relative error of one host's answer."""
        from daaswarm.experts.verifying import compare

        body = memoryview(sample.body)
        if advert.peer_id == self._network.peer_id:
            reply, parts = self._hosting.get_service().compute(sample.call, body)
            return compare(sample, reply, memoryview(b"".join(parts)))
        contact = Contact(peer_id=advert.peer_id, addrs=advert.addrs)
        for attempt in range(BUSY_RETRIES):
            try:
                answer, data = await self._network.call(contact, sample.call, [body], deadline_s=VERIFY_CALL_S)
            except Busy as busy:
                if advert.paused or attempt == BUSY_RETRIES - 1:
                    raise
                await trio.sleep(min(busy.retry_after_s, 2.0))
                continue
            if not isinstance(answer, ExpertReply):
                return float("inf")
            return compare(sample, answer, data)
        raise AssertionError("the last attempt returns or raises")


def describe_peer(peer_id: str, addrs: list[str], agent: str, last_seen: float) -> dict[str, Any]:
    """One row of ``peers list``; ``last_seen`` is Unix time, s."""
    return {
        "peer_id": peer_id,
        "addrs": list(addrs),
        "connected": False,
        "relayed": False,  # connected, and only through a relay
        "agent": agent,
        "last_seen": last_seen,
        "rtt_ms": None,
        "trust": None,  # never checked
    }


async def find_root(name: str) -> ModelRoot | None:
    """The root of the default model, or of one that is on this machine; None for another. Nothing is fetched."""
    if len(name) == 64 and all(c in "0123456789abcdef" for c in name):
        return ModelRoot(name)
    if name.lower() in DEFAULT_NAMES:
        return await trio.to_thread.run_sync(get_default_root, abandon_on_cancel=True)
    path = trio.Path(name)
    if await path.is_dir():
        return (await get_model(name, _be_quiet)).root
    for model in await trio.to_thread.run_sync(list_models, get_cache_dir(), abandon_on_cancel=True):
        if model.name == name:
            return model.root
    return None


def list_own_roots() -> list[ModelRoot]:
    """Of the default model and of those in the cache, :data:`LOOKED_UP` at most. Reads the disk."""
    return [get_default_root(), *(model.root for model in list_models(get_cache_dir()))][:LOOKED_UP]


def get_default_root() -> ModelRoot:
    """Imports what makes the default model, which takes a moment."""
    from daaswarm.models.default import ROOT

    return ModelRoot(ROOT)


async def _be_quiet(event: Event) -> None:
    """For what has nothing to say."""


def is_meant(advert: Advert, name: str, root: str | None) -> bool:
    """Whether a user who says ``name`` may mean this model. A host names its model as it likes; a root can't lie."""
    return (
        advert.model_root == root
        or advert.model_name == name
        or (len(name) >= 6 and advert.model_root.startswith(name))
    )
