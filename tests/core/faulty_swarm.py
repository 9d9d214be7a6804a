"""Kademlia machines on a network with a nemesis: one seeded heap of events, virtual time, no sockets."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

from swarm_driver import NOW, SWARM, make_key, make_peer

from daaswarm.core.kademlia import Kademlia
from daaswarm.core.kademlia_events import (
    Effect,
    LookupDone,
    PublishDone,
    RecordsFound,
    Reply,
    ReplyReceived,
    RequestFailed,
    RequestLate,
    RequestReceived,
    SendRequest,
)
from daaswarm.core.signing import MAX_TTL_S
from daaswarm.messages import Contact, Pointer
from daaswarm.types import PeerId

TICK_S = 5.0
QUICK_S = 0.05  # one way, in good times


class FaultySwarm:
    """Nodes 0..count-1. ``records`` is the plain model: what is published now, by key and node number."""

    def __init__(self, seed: int, count: int, k: int) -> None:
        self.rng = random.Random(seed)
        self.now = NOW
        self.k = k
        self.loss = self.twice = 0.0  # share of messages that are lost, that come twice
        self.slow_s = 0.0  # longest delay one way on top of QUICK_S: also what reorders
        self.cut: set[PeerId] = set()  # cannot talk to the others, but to each other
        self.nodes: dict[int, Kademlia] = {}
        self.saved: dict[int, list[Contact]] = {}  # what a killed node had on disk
        self.starts: dict[int, int] = {}
        self.records: set[tuple[bytes, int]] = set()
        self.ever: set[tuple[bytes, str, str]] = set()  # key, peer, address that was published at some time
        self.running: dict[tuple[int, str], float] = {}  # lookups that have not ended: since when
        self.told: dict[tuple[int, str], list[Pointer]] = {}  # by lookups that have not ended
        self.ended: list[tuple[int, LookupDone]] = []
        self.published: list[PublishDone] = []
        self._numbers = {make_peer(n + 1): n for n in range(count)}
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        for n in range(count):
            self.start(n, [self.nodes[0].contact] if n else [])  # type: ignore[list-item]
            self.run(1.0)

    # -- what happens to nodes ----------------------------------------------------------------------------------

    def start(self, n: int, seeds: list[Contact]) -> None:
        """A process: for the first time with seeds, later with what it had saved."""
        generation = self.starts[n] = self.starts.get(n, 0) + 1
        contact = Contact(peer_id=make_peer(n + 1), addrs=[f"/ip4/10.0.{generation}.{n}/tcp/1"])
        node = Kademlia(make_key(n + 1), SWARM, contact, random.Random(n * 1000 + generation), k=self.k)
        self.nodes[n] = node
        self._take(n, node.join(self.now, seeds) if generation == 1 else node.restore(self.saved[n], self.now))
        self._at(TICK_S * self.rng.random(), lambda: self._tick(n, generation))

    def kill(self, n: int) -> None:
        node = self.nodes.pop(n)
        self.saved[n] = node.export_contacts()
        self.records = {(key, m) for key, m in self.records if m != n}
        self.running = {(m, lookup): at for (m, lookup), at in self.running.items() if m != n}

    def publish(self, n: int, keys: list[bytes]) -> None:
        node = self.nodes[n]
        assert node.contact is not None
        self.records |= {(key, n) for key in keys}
        self.ever |= {(key, node.peer_id, node.contact.addrs[0]) for key in keys}
        self._take(n, node.publish_all(keys, self.now))

    def unpublish(self, n: int, key: bytes) -> None:
        self.records.discard((key, n))
        self._take(n, self.nodes[n].unpublish(key, self.now))

    def look_up(self, n: int, key: bytes) -> str:
        self._count += 1
        lookup_id = f"lookup-{self._count}"
        self.running[n, lookup_id] = self.now
        self._take(n, self.nodes[n].start_lookup(lookup_id, key, self.now, "records"))
        return lookup_id

    def find(self, n: int, key: bytes) -> set[int]:
        """One lookup, to its end: whose records it found."""
        lookup_id = self.look_up(n, key)
        while (n, lookup_id) in self.running:
            self.run(0.1)
        (done,) = [done for m, done in self.ended if m == n and done.lookup_id == lookup_id]
        return {self._numbers[PeerId(pointer.peer_id)] for pointer in done.records}

    def calm(self) -> None:
        """No more faults from now on."""
        self.loss = self.twice = self.slow_s = 0.0
        self.cut.clear()

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end:
            self.now, _, act = heapq.heappop(self._heap)
            act()
        self.now = end

    def validate(self) -> None:
        """What holds at every moment, whatever the nemesis does."""
        for node in self.nodes.values():
            node.validate()
            for key in node.store.get_keys():
                for pointer, _ in node.store.get(key, self.now):
                    self._check(key, pointer)
        for (n, lookup_id), since in self.running.items():
            assert self.now - since < 120, f"{lookup_id} of node {n} does not end"

    # -- the network --------------------------------------------------------------------------------------------

    def _check(self, key: bytes, pointer: Pointer) -> None:
        assert pointer.key == key and self.now < pointer.expires_at <= self.now + MAX_TTL_S
        assert not pointer.addrs or (key, pointer.peer_id, pointer.addrs[0]) in self.ever

    def _at(self, seconds: float, act: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + seconds, self._count, act))

    def _tick(self, n: int, generation: int) -> None:
        if n in self.nodes and self.starts[n] == generation:
            self._take(n, self.nodes[n].tick(self.now))
            self._at(TICK_S, lambda: self._tick(n, generation))

    def _take(self, n: int, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, SendRequest):
                self._send(n, effect)
            elif isinstance(effect, RecordsFound):
                for pointer in effect.records:
                    assert pointer.addrs
                    self._check(pointer.key, pointer)
                self.told.setdefault((n, effect.lookup_id), []).extend(effect.records)
            elif isinstance(effect, LookupDone):
                del self.running[n, effect.lookup_id]
                self.ended.append((n, effect))
                told = self.told.pop((n, effect.lookup_id), [])
                assert all(pointer in told for pointer in effect.records)
            else:
                assert isinstance(effect, PublishDone), effect
                self.published.append(effect)

    def _send(self, n: int, request: SendRequest) -> None:
        generation, asker = self.starts[n], self.nodes[n]
        target = self._numbers[PeerId(request.contact.peer_id)]
        is_over = False

        def tell(event: ReplyReceived | RequestFailed | RequestLate) -> None:
            nonlocal is_over
            # A shell tells the end of a request once; that the core stands more is what "twice" tries.
            if n in self.nodes and self.starts[n] == generation and not (is_over and isinstance(event, RequestLate)):
                is_over = is_over or not isinstance(event, RequestLate)
                self._take(n, asker.handle(event, self.now))

        def arrive() -> None:
            there = self.nodes.get(target)
            # Another process may be at the address by now; its certificate tells.
            if there is None or there.contact is None or there.contact.addrs != request.contact.addrs:
                return
            event = RequestReceived(request_id=1, peer=asker.peer_id, contact=asker.contact, message=request.message)
            (reply,) = there.handle(event, self.now)
            assert isinstance(reply, Reply)
            for _ in range(self._carry(target, n)):
                self._at(self._delay(), lambda: tell(ReplyReceived(rpc_id=request.rpc_id, message=reply.message)))

        for _ in range(self._carry(n, target)):
            self._at(self._delay(), arrive)
        if request.late_s is not None:
            self._at(request.late_s, lambda: tell(RequestLate(rpc_id=request.rpc_id)))
        self._at(request.deadline_s, lambda: tell(RequestFailed(rpc_id=request.rpc_id)))

    def _carry(self, a: int, b: int) -> int:
        """How many times a message arrives."""
        if (make_peer(a + 1) in self.cut) != (make_peer(b + 1) in self.cut) or self.rng.random() < self.loss:
            return 0
        return 2 if self.rng.random() < self.twice else 1

    def _delay(self) -> float:
        return QUICK_S + self.slow_s * self.rng.random()
