"""Wires Kademlia machines to each other by their effects, in one thread, without a network or a clock."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import msgspec
from nacl.signing import SigningKey

from daaswarm import messages
from daaswarm.core.kademlia import Kademlia
from daaswarm.core.kademlia_events import (
    Effect,
    LookupDone,
    Misbehaved,
    PublishDone,
    Reply,
    ReplyReceived,
    RequestFailed,
    RequestReceived,
    SendRequest,
)
from daaswarm.core.signing import get_peer_id, get_swarm_id
from daaswarm.messages import Contact
from daaswarm.types import PeerId

SWARM = get_swarm_id("test")
NOW = 1_800_000_000.0

Hostile = Callable[[SendRequest], object]


def make_key(n: int) -> SigningKey:
    return SigningKey(n.to_bytes(32, "big"))


def make_peer(n: int) -> PeerId:
    return get_peer_id(bytes(make_key(n).verify_key))


def make_contact(n: int) -> Contact:
    return Contact(peer_id=make_peer(n), addrs=[f"/ip4/127.0.0.1/tcp/{1000 + n}"])


class Driver:
    """``nodes`` by PeerId; a dead one fails every request; a hostile one answers with what its function returns."""

    def __init__(self, seed: int = 0) -> None:
        self.now = NOW
        self.rng = random.Random(seed)
        self.nodes: dict[PeerId, Kademlia] = {}
        self.dead: set[PeerId] = set()
        self.hostile: dict[PeerId, Hostile] = {}
        self.done: dict[PeerId, list[Effect]] = {}
        self.sent = 0
        self.loss = 0.0  # share of requests that get no answer
        self.is_checking = True  # invariants, after each event; most of the time of a large swarm
        self._queue: deque[tuple[PeerId, SendRequest]] = deque()

    def add(self, n: int, seed: Contact | None = None, *, reachable: bool = True) -> Kademlia:
        contact = make_contact(n)
        node = Kademlia(make_key(n), SWARM, contact if reachable else None, random.Random(n))
        self.nodes[node.peer_id] = node
        self.done[node.peer_id] = []
        self.perform(node, node.join(self.now, [seed] if seed else []))
        return node

    def perform(self, node: Kademlia, effects: list[Effect]) -> None:
        """Carries effects out until nothing is under way."""
        self._take(node.peer_id, effects)
        while self._queue:
            # Any order may happen on a network; the seed decides.
            self._queue.rotate(self.rng.randrange(len(self._queue)))
            asker, request = self._queue.popleft()
            if asker in self.dead:
                continue
            event = self._exchange(asker, request)
            self._take(asker, self.nodes[asker].handle(event, self.now))
            if self.is_checking:
                self.nodes[asker].validate()

    def tick(self, seconds: float) -> None:
        self.now += seconds
        for peer, node in self.nodes.items():
            if peer not in self.dead:
                self.perform(node, node.tick(self.now))
                node.validate()

    def lookup(self, node: Kademlia, target: bytes, want: str = "records") -> LookupDone:
        self.done[node.peer_id].clear()
        self.perform(node, node.start_lookup("test", target, self.now, want))  # type: ignore[arg-type]
        (found,) = [e for e in self.done[node.peer_id] if isinstance(e, LookupDone)]
        assert found.lookup_id == "test"
        return found

    def publish(self, node: Kademlia, key: bytes) -> PublishDone:
        self.done[node.peer_id].clear()
        self.perform(node, node.publish(key, self.now))
        (done,) = [e for e in self.done[node.peer_id] if isinstance(e, PublishDone)]
        assert done.key == key
        return done

    def misbehaved(self, node: Kademlia) -> list[Misbehaved]:
        return [e for e in self.done[node.peer_id] if isinstance(e, Misbehaved)]

    def _take(self, peer: PeerId, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, SendRequest):
                self.sent += 1
                self._queue.append((peer, effect))
            else:
                assert not isinstance(effect, Reply)
                self.done[peer].append(effect)

    def _exchange(self, asker: PeerId, request: SendRequest) -> ReplyReceived | RequestFailed:
        target = PeerId(request.contact.peer_id)
        assert target != asker, "a node called itself"
        if target in self.hostile:
            answer = self.hostile[target](request)
            return ReplyReceived(rpc_id=request.rpc_id, message=answer)  # type: ignore[arg-type]
        if target in self.dead or target not in self.nodes or self.rng.random() < self.loss:
            return RequestFailed(rpc_id=request.rpc_id)
        node = self.nodes[target]
        contact = self.nodes[asker].contact
        wire = messages.encode(request.message)
        message = msgspec.msgpack.decode(wire, type=messages.Request)
        event = RequestReceived(request_id=7, peer=asker, contact=contact, message=message)  # type: ignore[arg-type]
        replies = node.handle(event, self.now)
        if self.is_checking:
            node.validate()
        (reply,) = replies
        assert isinstance(reply, Reply) and reply.request_id == 7
        # Through the codec: what a machine says must be within the caps of the wire.
        answer = msgspec.msgpack.decode(messages.encode(reply.message), type=messages.Reply)
        return ReplyReceived(rpc_id=request.rpc_id, message=answer)  # type: ignore[arg-type]
