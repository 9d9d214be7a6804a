"""A small swarm asks the same peers in the same order, whether it is simulated or talks over real sockets."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio
from nacl.signing import SigningKey

from daaswarm.core.kademlia import Kademlia
from daaswarm.core.kademlia_events import LookupDone, SendRequest
from daaswarm.core.lookup import Want
from daaswarm.messages import Contact, Store
from daaswarm.net import discovery as discovery_module
from daaswarm.net.dataplane import TcpNetwork, open_tcp_network
from daaswarm.net.discovery import Discovery
from daaswarm.net.handshake import Identity
from daaswarm.sim.node import SWARM, SimNode
from daaswarm.sim.scenario import Region, Scenario
from daaswarm.sim.world import World

NODES = 12
SMALL_K = 4  # with 20, everybody would know everybody
SEEDS = [bytes([n]) * 32 for n in range(1, NODES + 1)]
KEYS = [bytes([0xA0 + n]) * 32 for n in range(3)]
PUBLISHERS = {KEYS[0]: (2, 5), KEYS[1]: (7,), KEYS[2]: (0, 3, 11)}
LOOKUPS: list[tuple[int, bytes, Want]] = [
    *((node, random.Random(node).randbytes(32), "nodes") for node in range(NODES)),
    *((node, key, "records") for key in KEYS for node in (1, 4, 10)),
    (6, b"\xee" * 32, "records"),  # nobody published it
]

Request = tuple[int, int, str]
"""``(asker, asked, what)``, nodes by number."""

Path = list[Request]


def make_kademlia(seed: bytes, contact: Contact | None, **how: Any) -> Kademlia:
    rng = random.Random(seed)
    return Kademlia(SigningKey(seed), SWARM, contact, rng, k=SMALL_K, limit_subnets=False, **how)


def get_numbers(done: LookupDone, numbers: dict[str, int]) -> tuple[list[int], list[int], int, int]:
    records = sorted(numbers[pointer.peer_id] for pointer in done.records)
    return [numbers[contact.peer_id] for contact in done.contacts], records, done.hops, done.requests


# -- simulated ---------------------------------------------------------------------------------------------------------


def run_simulated() -> list[Any]:
    """What each step asked, in order, and what each lookup found."""
    here = Region(name="here", share=1.0, rtt_ms=[20.0])
    world = World(Scenario(nodes=NODES, experts=1, regions=(here,), last_mile_ms=0.0, jitter=0.0, loss=0.0))
    nodes: list[SimNode] = []
    for number, seed in enumerate(SEEDS):
        key = SigningKey(seed)
        contact = Contact(
            peer_id=Identity.from_seed(seed, SWARM, "test").peer_id, addrs=[f"/ip4/10.0.0.{number}/tcp/1"]
        )
        node = SimNode(world, number, number, key, contact, random.Random(seed))
        node.kademlia = make_kademlia(seed, contact, notary=node.notary)
        world.add(node)
        nodes.append(node)
        for other in nodes:  # no time for dialling: all answers take equally long
            world.wires.note_link(number, other.number)
    numbers = {node.peer_id: node.number for node in nodes}
    path: Path = []

    def trace(asker: str, asked: str, message: Any) -> None:
        path.append((numbers[asker], numbers[asked], describe(message, numbers)))

    world.carrier.trace = trace
    steps: list[Any] = []

    def settle() -> None:
        world.heap.run(world.heap.now + 10)
        steps.append(path.copy())
        path.clear()

    for node in nodes[1:]:
        node.join([nodes[0].contact])
        settle()
    for key, publishers in PUBLISHERS.items():
        for number in publishers:
            nodes[number].apply(nodes[number].kademlia.publish(key, world.heap.now))
            settle()
    for number, key, want in LOOKUPS:
        nodes[number].look_up(key, want, lambda done: steps.append(get_numbers(done, numbers)))
        settle()
    for node in nodes:
        node.kademlia.validate()
    return steps


def describe(message: Any, numbers: dict[str, int]) -> str:
    if isinstance(message, Store):
        return f"Store {len(message.records)}"
    target = getattr(message, "target", None) or message.key
    place = getattr(message, "place", None)
    return f"{type(message).__name__} {target.hex()[:8]} {place.hex()[:8] if place else ''}"


# -- real --------------------------------------------------------------------------------------------------------------


class RealNode:
    """A real node's network and discovery. Of several answers that are there, it takes them in the order in which it
    asked, as a network does in which all take equally long."""

    def __init__(self, path: Path, numbers: dict[str, int]) -> None:
        self.network: TcpNetwork
        self.discovery: Discovery
        self.outstanding: dict[tuple[str, int], trio.Event] = {}
        self._path = path
        self._numbers = numbers

    async def handle(self, peer: Any, contact: Any, message: Any, body: Any, deadline_s: float) -> Any:
        return self.discovery.answer(peer, contact, message), ()

    def watch(self) -> None:
        """Notes what the core wants sent, and puts the answers in that order."""
        apply, call = self.discovery._apply, self.network.call
        number = self._numbers[self.network.peer_id]

        def watching(effects: list[Any]) -> None:
            for effect in effects:
                if isinstance(effect, SendRequest):
                    asked = self._numbers[effect.contact.peer_id]
                    self._path.append((number, asked, describe(effect.message, self._numbers)))
                    self.outstanding[effect.contact.peer_id, id(effect.message)] = trio.Event()
            apply(effects)

        async def calling(contact: Contact, message: Any, body: Any = (), *, deadline_s: float) -> Any:
            mine = contact.peer_id, id(message)
            answer = await call(contact, message, body, deadline_s=deadline_s)
            while (first := next(iter(self.outstanding))) != mine:
                await self.outstanding[first].wait()
            self.outstanding.pop(mine).set()
            return answer

        self.discovery._apply = watching  # type: ignore[method-assign]
        self.network.call = calling  # type: ignore[method-assign]


@asynccontextmanager
async def open_real(path: Path, numbers: dict[str, int]) -> AsyncIterator[list[RealNode]]:
    async with AsyncExitStack() as stack:
        nodes: list[RealNode] = []
        for number, seed in enumerate(SEEDS):
            identity = Identity.from_seed(seed, SWARM, "test")
            numbers[identity.peer_id] = number
            node = RealNode(path, numbers)
            node.network = await stack.enter_async_context(open_tcp_network(identity, handler=node.handle))
            node.discovery = Discovery(node.network, identity.key, SWARM, random.Random(seed))
            node.discovery.kademlia = make_kademlia(seed, node.network.contact)
            node.watch()
            nodes.append(node)
        nursery = await stack.enter_async_context(trio.open_nursery())
        for node in nodes:
            await nursery.start(node.discovery.run)
        yield nodes
        nursery.cancel_scope.cancel()


async def run_real() -> list[Any]:
    path: Path = []
    numbers: dict[str, int] = {}
    steps: list[Any] = []

    async def settle() -> None:
        while waiting := [event for node in nodes for event in node.outstanding.values()]:
            await waiting[0].wait()
        steps.append(path.copy())
        path.clear()

    async with open_real(path, numbers) as nodes:
        assert nodes[0].network.contact is not None
        for node in nodes[1:]:
            node.discovery.join([nodes[0].network.contact])
            await settle()
        for key, publishers in PUBLISHERS.items():
            for number in publishers:
                node = nodes[number]
                node.discovery._apply(node.discovery.kademlia.publish(key, discovery_module.time.time()))
                await settle()
        for number, key, want in LOOKUPS:
            steps.append(get_numbers(await nodes[number].discovery.lookup(key, want), numbers))
            await settle()
    return steps


async def test_lookups_ask_the_same_peers_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daaswarm.core.kademlia.LATE_S", 60.0)  # a busy machine must not look like a slow peer
    monkeypatch.setattr(discovery_module, "TICK_S", 3_600.0)  # rounds come when they come
    simulated = run_simulated()
    with trio.fail_after(60):
        real = await run_real()
    assert len(simulated) == len(real)
    for number, (a, b) in enumerate(zip(simulated, real, strict=True)):
        assert a == b, f"step {number}"
    paths = [step for step in simulated if isinstance(step, list)]
    assert sum(map(len, paths)) > 300
    assert {what.split()[0] for path in paths for _, _, what in path} == {"FindNode", "FindValue", "Store"}
    assert all(len(path) < NODES * 3 for path in paths), "no lookup asks everybody on each path"
