"""Wires Membership machines to each other over a simulated network that delays, drops, duplicates, reorders, cuts."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

import msgspec
from swarm_driver import NOW, SWARM, make_contact, make_key, make_peer

from daaswarm import messages
from daaswarm.core.adverts import AdvertBook, Known, to_bitmap
from daaswarm.core.membership import TICK_S, Membership
from daaswarm.core.membership_events import (
    Doubtful,
    Effect,
    Misbehaved,
    Reply,
    ReplyReceived,
    RequestFailed,
    RequestReceived,
    SendRequest,
    WantMembers,
)
from daaswarm.core.notary import KeyNotary
from daaswarm.core.signing import MAX_TTL_S
from daaswarm.errors import RemoteProtocolError
from daaswarm.messages import Advert, Query, Signed
from daaswarm.types import ModelRoot, PeerId

ROOT, OTHER = ModelRoot("ab" * 32), ModelRoot("cd" * 32)


class PlainNotary(KeyNotary):
    """Without the arithmetic; a forgery has a signature of ones."""

    def seal_advert(self, advert: Advert) -> Signed:
        return Signed(public_key=bytes(32), signature=bytes(64), payload=messages.encode(advert))

    def open_advert(self, signed: Signed, now: float) -> Known:
        if any(signed.signature):
            raise RemoteProtocolError("forged")
        advert = self.peek_advert(signed)
        if not now < advert.expires_at <= now + MAX_TTL_S + 60:
            raise RemoteProtocolError("expired", reject=False)
        return Known(advert, signed)

    def seal_query(self, query: Query) -> Signed:
        return Signed(public_key=bytes(32), signature=bytes(64), payload=messages.encode(query))

    def open_query(self, signed: Signed, now: float) -> Query:
        if any(signed.signature):
            raise RemoteProtocolError("forged")
        return messages.decode(Query, signed.payload)  # type: ignore[return-value]


class Swarm:
    """Nodes by number. ``loss``: share of messages lost; ``delay_s``: at most, one way; ``twice``: share duplicated.

    Attributes:
        pointers: what the DHT says of each model; nobody tidies it up.
        forge: answers instead of a node, if it returns something.
    """

    def __init__(self, seed: int = 0) -> None:
        self.now = NOW
        self.seed = seed
        self.rng = random.Random(seed)
        self.nodes: dict[int, Membership] = {}
        self.numbers: dict[PeerId, int] = {}
        self.dead: set[int] = set()
        self.sides: dict[int, int] = {}
        self.cut: set[frozenset[int]] = set()
        self.loss = self.twice = 0.0
        self.delay_s = 0.02
        self.pointers: dict[ModelRoot, dict[int, None]] = {}
        self.effects: dict[int, list[Effect]] = {}
        self.sent: dict[str, int] = {}
        self.bytes = 0
        self.forge: Callable[[int, int, Any], Any] = lambda asker, target, message: None
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self._lives: dict[int, int] = {}
        self._asking: dict[tuple[int, int], Callable[[Any], None]] = {}
        self._requests = 0

    def add(self, number: int) -> Membership:
        """A node, or its next life with empty memory."""
        notary = PlainNotary(make_key(number), SWARM)
        rng = random.Random(f"{self.seed}-{number}-{self._lives.get(number, 0)}")
        self._lives[number] = self._lives.get(number, 0) + 1
        node = self.nodes[number] = Membership(notary, AdvertBook(SWARM), rng)
        self.numbers[node.peer_id] = number
        self.dead.discard(number)
        self.effects[number] = []
        self._tick(number, self._lives[number], self.rng.random() * TICK_S)
        return node

    def serve(self, number: int, held: dict[int, list[int]] | None = None, root: ModelRoot = ROOT) -> None:
        self.pointers.setdefault(root, {})[number] = None
        advert = make_advert(number, held or {0: [number]}, root)
        self.perform(number, self.nodes[number].advertise(advert, self.now))

    def withdraw(self, number: int, root: ModelRoot = ROOT) -> None:
        self.perform(number, self.nodes[number].withdraw(root, self.now))
        self.pointers.get(root, {}).pop(number, None)

    def follow(self, number: int, root: ModelRoot = ROOT) -> None:
        self.perform(number, self.nodes[number].follow(root, self.now))

    def kill(self, number: int) -> None:
        self.dead.add(number)
        self._lives[number] += 1

    def partition(self, *sides: list[int]) -> None:
        self.sides = {number: i for i, side in enumerate(sides) for number in side}

    def heal(self) -> None:
        self.sides = {}

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self._heap and self._heap[0][0] <= until:
            at, _, action = heapq.heappop(self._heap)
            self.now = max(self.now, at)
            action()
        self.now = until

    def offered(self, number: int, root: ModelRoot = ROOT) -> dict[int, dict[int, list[int]]]:
        """What a node would offer to a requester of its own."""
        found = self.nodes[number].get_adverts(root, self.now)
        return {self.numbers[PeerId(k.advert.peer_id)]: k.experts for k in found}

    def validate(self) -> None:
        for number, node in self.nodes.items():
            if number not in self.dead:
                node.validate()

    def perform(self, number: int, effects: list[Effect]) -> None:
        node, life = self.nodes[number], self._lives[number]
        for effect in effects:
            self.effects[number].append(effect)
            if isinstance(effect, SendRequest):
                self._send(number, life, effect)
            elif isinstance(effect, WantMembers):

                def introduce(root: ModelRoot = effect.root) -> None:
                    contacts = [make_contact(n) for n in self.pointers.get(root, {})]
                    self._live(number, life, lambda: node.introduce(root, contacts, self.now))

                self.at(0.2, introduce)
            elif isinstance(effect, Reply):
                self._asking.pop((number, effect.request_id))(effect.message)
            else:
                assert isinstance(effect, Doubtful | Misbehaved), effect

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._order, action))

    def _live(self, number: int, life: int, action: Callable[[], list[Effect]]) -> None:
        if number not in self.dead and self._lives[number] == life:
            self.perform(number, action())

    def _tick(self, number: int, life: int, delay_s: float) -> None:
        def tick() -> None:
            if number in self.dead or self._lives[number] != life:
                return
            self.perform(number, self.nodes[number].tick(self.now))
            self._tick(number, life, TICK_S)

        self.at(delay_s, tick)

    def _passes(self, a: int, b: int) -> bool:
        if self.sides.get(a, -1) != self.sides.get(b, -1) or frozenset((a, b)) in self.cut:
            return False
        return self.rng.random() >= self.loss

    def _send(self, asker: int, life: int, effect: SendRequest) -> None:
        target = self.numbers.get(PeerId(effect.contact.peer_id), -1)
        assert target != asker, "a node called itself"
        kind = type(effect.message).__name__
        self.sent[kind] = self.sent.get(kind, 0) + 1
        wire = messages.encode(effect.message)
        self.bytes += len(wire)
        node = self.nodes[asker]
        done: list[bool] = []

        def finish(event: ReplyReceived | RequestFailed) -> None:
            if not done:
                done.append(True)
                self._live(asker, life, lambda: node.handle(event, self.now))

        def answer(reply: Any) -> None:
            if self._passes(asker, target):
                data = messages.encode(reply)
                self.bytes += len(data)
                back = msgspec.msgpack.decode(data, type=messages.Reply)
                event = ReplyReceived(rpc_id=effect.rpc_id, message=back)  # type: ignore[arg-type]
                self.at(self.rng.random() * self.delay_s, lambda: finish(event))

        def arrive() -> None:
            if target in self.dead or target not in self.nodes:
                return
            message = msgspec.msgpack.decode(wire, type=messages.Request)
            forged = self.forge(asker, target, message)
            if forged is not None:
                answer(forged)
                return
            self._requests += 1
            request_id = self._requests
            self._asking[target, request_id] = answer
            event = RequestReceived(
                request_id=request_id,
                peer=make_peer(asker),
                contact=make_contact(asker),
                message=message,  # type: ignore[arg-type]
            )
            self.perform(target, self.nodes[target].handle(event, self.now))

        self.at(effect.deadline_s, lambda: finish(RequestFailed(rpc_id=effect.rpc_id)))
        if target in self.dead and self.rng.random() < 0.5:  # half of the dead refuse, half are silent
            self.at(self.delay_s, lambda: finish(RequestFailed(rpc_id=effect.rpc_id)))
            return
        for _ in range(2 if self.rng.random() < self.twice else 1):
            if self._passes(asker, target):
                self.at(self.rng.random() * self.delay_s, arrive)


def make_advert(number: int, held: dict[int, list[int]], root: ModelRoot = ROOT) -> Advert:
    return Advert(
        peer_id=make_peer(number),
        model_root=root,
        model_name="tiny",
        kind="moe",
        held={layer: to_bitmap(experts) for layer, experts in held.items()},
        dtype="f32",
        device="cpu",
        addrs=make_contact(number).addrs,
        seq=0,
        expires_at=0.0,
    )
