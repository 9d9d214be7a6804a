"""One simulated node: the shell that ``net/discovery.py``, ``net/spreading.py`` and ``net/finding.py`` are for a real
one. It carries out what the cores decide, and decides nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from nacl.signing import SigningKey

from daaswarm.core import kademlia_events as dht
from daaswarm.core import membership_events as spread
from daaswarm.core.adverts import AdvertBook, to_bitmap
from daaswarm.core.kademlia import TICK_S as DHT_TICK_S
from daaswarm.core.kademlia import Kademlia
from daaswarm.core.lookup import Want
from daaswarm.core.membership import TICK_S, Membership
from daaswarm.core.router import ReplicaRouter
from daaswarm.messages import (
    Advert,
    Adverts,
    Contact,
    ExpertCall,
    FindNode,
    FindValue,
    GetAdverts,
    Pointer,
    Store,
)
from daaswarm.sim.carrying import Rpc
from daaswarm.sim.notary import SimNotary
from daaswarm.sim.serving import Host
from daaswarm.types import ModelRoot, PeerId

if TYPE_CHECKING:
    from daaswarm.sim.world import World

SWARM = bytes(32)  # the swarm's id; there is only one


OnDone = Callable[[dht.LookupDone], None]
OnRecords = Callable[[list[Pointer]], None]


class Liar(Protocol):
    """Answers in place of a hostile node; ``None`` is silence."""

    def answer(self, node: SimNode, message: Any, now: float) -> Any: ...


class SimNode:
    """Args:

    number: counts all nodes there ever were.
    slot: whose place it has; its successor has the same, with its users.
    expert: the number of the expert that it hosts.
    root: the name of that expert in the swarm.
    """

    __slots__ = (
        "asked",
        "bytes_sent",
        "contact",
        "expert",
        "finding",
        "found",
        "host",
        "is_alive",
        "kademlia",
        "known_since",
        "liar",
        "lookups",
        "membership",
        "notary",
        "number",
        "peer_id",
        "root",
        "router",
        "served",
        "slot",
        "started",
        "world",
    )

    def __init__(
        self,
        world: World,
        number: int,
        slot: int,
        key: SigningKey,
        contact: Contact,
        rng: random.Random,
        *,
        expert: int = -1,
        liar: Liar | None = None,
    ) -> None:
        self.notary = notary = SimNotary(bytes(key.verify_key), world.registry)
        self.world = world
        self.number, self.slot, self.contact, self.liar = number, slot, contact, liar
        self.peer_id: PeerId = notary.peer_id
        self.expert = expert
        self.root = world.roots[expert] if expert >= 0 else None
        self.kademlia = Kademlia(key, SWARM, contact, rng, notary=notary, limit_subnets=False)
        self.membership = Membership(notary, AdvertBook(SWARM), rng)
        self.router = ReplicaRouter(rng)
        self.host = Host(self)
        self.is_alive = True
        self.known_since = float("inf")
        self.asked: dict[int, Rpc] = {}  # requests to the membership that wait for its answer
        self.lookups: dict[str, tuple[OnDone, OnRecords | None]] = {}
        self.finding: dict[ModelRoot, list[Any]] = {}  # calls that wait until the hosts of an expert are found
        self.found: set[ModelRoot] = set()  # experts whose hosts were found at some time
        self.served = self.bytes_sent = self.started = 0

    # -- what it does of itself -----------------------------------------------------------------------------------

    def start_ticking(self, rng: random.Random) -> None:
        """From now on, at times of its own."""
        heap = self.world.heap
        heap.at(heap.now + DHT_TICK_S * rng.random(), self._tick_dht)
        heap.at(heap.now + TICK_S * rng.random(), self._tick)

    def join(self, seeds: list[Contact]) -> None:
        self.apply(self.kademlia.join(self.world.heap.now, seeds))

    def advertise(self, _: Any = None, __: Any = None) -> None:
        """Tells the swarm what it hosts."""
        if self.root is not None and self.is_alive:
            now = self.world.heap.now
            self.perform(self.membership.advertise(self.make_advert(), now))
            self.apply(self.kademlia.publish(bytes.fromhex(self.root), now))
            self.known_since = now

    def make_advert(self) -> Advert:
        assert self.root is not None
        return Advert(
            peer_id=self.peer_id,
            model_root=self.root,
            model_name=f"expert-{self.expert}",
            kind="moe",
            held={0: to_bitmap([0])},
            dtype="f32",
            device="cpu",
            addrs=self.contact.addrs,
            seq=0,
            expires_at=0.0,
        )

    def look_up(self, target: bytes, want: Want, done: OnDone, on_records: OnRecords | None = None) -> None:
        self.started += 1
        lookup_id = f"lookup-{self.started}"
        self.lookups[lookup_id] = done, on_records
        self.apply(self.kademlia.start_lookup(lookup_id, target, self.world.heap.now, want))

    def _tick_dht(self, _: Any, __: Any) -> None:
        if self.is_alive:
            heap = self.world.heap
            self.apply(self.kademlia.tick(heap.now))
            heap.at(heap.now + DHT_TICK_S, self._tick_dht)

    def _tick(self, _: Any, __: Any) -> None:
        if self.is_alive:
            heap = self.world.heap
            self.perform(self.membership.tick(heap.now))
            heap.at(heap.now + TICK_S, self._tick)

    # -- what the cores want --------------------------------------------------------------------------------------

    def apply(self, effects: list[dht.Effect]) -> None:
        """Of Kademlia."""
        send = self.world.carrier.send
        for effect in effects:
            if type(effect) is dht.SendRequest:
                send(
                    self,
                    effect.contact,
                    effect.message,
                    effect.deadline_s,
                    _end_dht,
                    effect.rpc_id,
                    late_s=effect.late_s,
                    late=_tell_dht_late,
                )
            elif type(effect) is dht.RecordsFound:
                asker = self.lookups.get(effect.lookup_id)
                if asker is not None and asker[1] is not None:
                    asker[1](effect.records)
            elif type(effect) is dht.LookupDone:
                ended = self.lookups.pop(effect.lookup_id, None)
                if ended is not None:
                    ended[0](effect)
            elif type(effect) is dht.Misbehaved:
                self.world.figures.misbehaved += 1

    def perform(self, effects: list[spread.Effect]) -> None:
        """Of the membership."""
        for effect in effects:
            if type(effect) is spread.SendRequest:
                self.world.carrier.send(
                    self, effect.contact, effect.message, effect.deadline_s, _end_spread, effect.rpc_id
                )
            elif type(effect) is spread.Reply:
                rpc = self.asked.pop(effect.request_id, None)
                if rpc is not None:
                    self.world.carrier.answer(rpc, effect.message)
            elif type(effect) is spread.WantMembers:
                self.world.requesting.introduce(self, effect.root)
            elif type(effect) is spread.Misbehaved:
                self.world.figures.misbehaved += 1

    # -- what others want -----------------------------------------------------------------------------------------

    def serve(self, rpc: Rpc) -> bool:
        """Answers a request, now or later. False if there is no answer yet."""
        message = rpc.message
        if self.liar is not None:
            lie = self.liar.answer(self, message, self.world.heap.now)
            if lie is not None:
                self.world.carrier.answer(rpc, lie)
            return lie is not None
        kind = type(message)
        if kind is FindNode or kind is FindValue or kind is Store:
            return self._serve_dht(rpc)
        if kind is ExpertCall:
            return self.host.serve(rpc)
        if kind is GetAdverts:
            now = self.world.heap.now
            signed = self.membership.own.get_signed(ModelRoot(message.model_root), now)
            self.world.carrier.answer(rpc, Adverts(adverts=[] if signed is None else [signed]))
            return True
        return self._serve_spread(rpc)

    def _serve_dht(self, rpc: Rpc) -> bool:
        asker = rpc.asker
        event = dht.RequestReceived(request_id=0, peer=asker.peer_id, contact=asker.contact, message=rpc.message)
        is_answered = False
        rest: list[dht.Effect] = []
        for effect in self.kademlia.handle(event, self.world.heap.now):
            if type(effect) is dht.Reply:
                self.world.carrier.answer(rpc, effect.message)
                is_answered = True
            else:
                rest.append(effect)
        if rest:
            self.apply(rest)
        return is_answered

    def _serve_spread(self, rpc: Rpc) -> bool:
        asker = rpc.asker
        self.started += 1
        self.asked[self.started] = rpc
        event = spread.RequestReceived(
            request_id=self.started, peer=asker.peer_id, contact=asker.contact, message=rpc.message
        )
        mine = self.started
        self.perform(self.membership.handle(event, self.world.heap.now))
        return mine not in self.asked


def _end(events: Any, rpc: Rpc, answer: Any) -> Any:
    """What a core hears of the end of a request: ``events`` is the module of its events."""
    if answer is None:
        return events.RequestFailed(rpc_id=rpc.note)
    return events.ReplyReceived(rpc_id=rpc.note, message=answer)


def _end_dht(rpc: Rpc, answer: Any) -> None:
    node = rpc.asker
    node.apply(node.kademlia.handle(_end(dht, rpc, answer), node.world.heap.now))


def _tell_dht_late(rpc: Rpc) -> None:
    node = rpc.asker
    node.apply(node.kademlia.handle(dht.RequestLate(rpc_id=rpc.note), node.world.heap.now))


def _end_spread(rpc: Rpc, answer: Any) -> None:
    node = rpc.asker
    node.perform(node.membership.handle(_end(spread, rpc, answer), node.world.heap.now))
