"""Everything there is in a simulation, and what happens to it from outside: births, deaths, cuts and users' wishes."""

from __future__ import annotations

import hashlib
import random
from bisect import bisect
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

from nacl.signing import SigningKey

from daaswarm.core.kademlia_events import LookupDone
from daaswarm.core.routing_table import get_node_number
from daaswarm.core.signing import get_peer_id
from daaswarm.messages import Contact
from daaswarm.sim.carrying import Carrier
from daaswarm.sim.figures import GRACE_S, STEP_S, Figures
from daaswarm.sim.healing import Healing
from daaswarm.sim.heap import START, Heap
from daaswarm.sim.hostile import Gang
from daaswarm.sim.node import SimNode
from daaswarm.sim.notary import Registry
from daaswarm.sim.requesting import Requesting
from daaswarm.sim.scenario import Scenario
from daaswarm.sim.sizes import get_contact_bytes
from daaswarm.sim.warm import warm_up
from daaswarm.sim.wires import Wires
from daaswarm.types import ModelRoot, PeerId

SEEDS = 3  # peers that a newcomer is given
LOAD_S = 5.0  # from a newcomer's first contact until it hosts: its weights are read meanwhile
REPLACE_S = 5.0  # from a node's death until another takes its place

Progress = Callable[[float, float], None]
"""``(simulated s done, simulated s in all)``."""


class World:
    """A scenario, ready to run.

    Attributes:
        slots: who lives where now, dead or alive; hostile ones come last, but for those of storms.
        favourites: by slot, the experts that its users ask for.
        died_at: when those died who did.
    """

    def __init__(self, scenario: Scenario) -> None:
        seed = scenario.seed
        self.scenario = scenario
        self._rng = random.Random(f"world-{seed}")
        self.effects = random.Random(f"effects-{seed}")  # what hosts' devices do
        self._users = random.Random(f"users-{seed}")
        self.heap = Heap()
        self.figures = Figures()
        self.registry = Registry()
        self.requesting = Requesting(self)
        self.healing = Healing(self)
        self.roots = [ModelRoot(hashlib.sha256(f"expert-{i}".encode()).hexdigest()) for i in range(scenario.experts)]
        self._hosts: dict[ModelRoot, dict[int, SimNode]] = {root: {} for root in self.roots}
        weights = [1 / (rank + 1) ** scenario.popularity for rank in range(scenario.experts)]
        self._popular = list(accumulate(weights))
        self._deaths = round(scenario.churn * scenario.nodes)
        size = scenario.nodes + self._deaths + sum(storm.nodes for storm in scenario.storms)
        self.wires = Wires(scenario, random.Random(f"wires-{seed}"), size)
        sample = Contact(peer_id="1" * 52, addrs=[_make_addr(12_345)])
        self.carrier = Carrier(self.heap, self.wires, get_contact_bytes(sample))
        self.slots: list[SimNode] = []
        self.served: list[int] = []  # by slot, by those who are gone
        self._count = 0
        self.favourites: list[list[ModelRoot]] = []
        self.died_at: dict[PeerId, float] = {}
        self.honest = scenario.nodes - round(scenario.hostile * scenario.nodes)

    # -- before it begins -------------------------------------------------------------------------------------------

    def populate(self) -> None:
        """Everybody who is there from the start, warm (:mod:`daaswarm.sim.warm`), and what is to happen."""
        scenario, rng = self.scenario, self._rng
        for slot in range(self.honest):
            self.add(self._make(slot, SigningKey(rng.randbytes(32)), slot % scenario.experts))
        gang = Gang(scenario.lies, rng)
        keys = [bytes.fromhex(root) for root in self.roots]
        for key in gang.choose_keys(keys, scenario.nodes - self.honest):
            node = self._make(len(self.slots), key, -1, gang)
            gang.add(node)
            self.add(node)
        for _ in range(self.honest):
            self.favourites.append([self._draw() for _ in range(scenario.favourites)])
        warm_up(self, self.slots, rng)
        for node in self.slots:
            if node.liar is None:
                node.start_ticking(rng)
        self._plan()

    def _plan(self) -> None:
        scenario, rng, heap = self.scenario, self._rng, self.heap
        for _ in range(self._deaths):
            heap.at(START + scenario.duration_s * rng.random(), self._replace)
        for storm in scenario.storms:
            for i in range(storm.nodes):
                heap.at(START + storm.at_s + storm.for_s * i / storm.nodes, self._join_storm)
        for cut in scenario.cuts:
            heap.at(START + cut.at_s, self._cut, cut.share)
            heap.at(START + cut.at_s + cut.for_s, self._heal)
        for i in range(scenario.probes):
            heap.at(START + scenario.duration_s * (i + rng.random()) / scenario.probes, self._probe)
        period_s = 60 / scenario.calls_per_minute
        for user in range(scenario.users):
            heap.at(START + period_s * self._users.random(), self._wish, user % self.honest)

    # -- while it runs -----------------------------------------------------------------------------------------------

    def run(self, progress: Progress) -> None:
        """To its end."""
        total = self.scenario.duration_s
        minute, elapsed, stepped = 0, 0.0, 0.0
        while elapsed < total:
            elapsed = min(elapsed + 1.0, total)
            self.heap.run(START + elapsed)
            self.healing.look(elapsed)
            if elapsed - stepped >= STEP_S:
                stepped = elapsed
                self.figures.note_step(elapsed)
            if int(elapsed / 60) != minute:
                minute = int(elapsed / 60)
                self.wires.set_minute(minute)
                self.registry.forget_expired(self.heap.now)
            progress(elapsed, total)

    def get_hosts(self, root: ModelRoot) -> Iterable[SimNode]:
        """Who hosts an expert and lives, in the order in which they came."""
        return self._hosts[root].values()

    def get_expert(self, slot: int) -> ModelRoot:
        """What a user at this place asks for next."""
        if self._users.random() < self.scenario.wander:
            return self._draw()
        favourites = self.favourites[slot]
        return favourites[int(self._users.random() * len(favourites))]

    def get_served(self) -> list[int]:
        """Calls computed at each place of an honest node, by all who had it."""
        nodes = zip(self.served, self.slots, strict=True)
        return [before + node.served for before, node in nodes if node.liar is None]

    def validate(self) -> None:
        """Asserts the invariants of every core."""
        for node in self.slots:
            if node.is_alive and node.liar is None:
                node.kademlia.validate()
                node.membership.validate()

    # -- births and deaths -------------------------------------------------------------------------------------------

    def _make(self, slot: int, key: SigningKey, expert: int, liar: Gang | None = None) -> SimNode:
        number = self._count
        self._count += 1
        contact = Contact(peer_id=get_peer_id(bytes(key.verify_key)), addrs=[_make_addr(number)])
        rng = random.Random(f"node-{self.scenario.seed}-{number}")
        return SimNode(self, number, slot, key, contact, rng, expert=expert, liar=liar)

    def add(self, node: SimNode) -> None:
        """It is there from now on, at its slot, which may have been another's."""
        self.carrier.peers[node.peer_id] = node
        self.wires.place(node.number)
        if node.slot < len(self.slots):
            self.served[node.slot] += self.slots[node.slot].served
            self.wires.copy_side(node.number, self.slots[node.slot].number)
            self.slots[node.slot] = node
        else:
            self.slots.append(node)
            self.served.append(0)
        if node.root is not None:
            self._hosts[node.root][node.number] = node

    def kill(self, node: SimNode) -> None:
        """It falls silent; nobody is told."""
        node.is_alive = False
        self.died_at[node.peer_id] = self.heap.now
        if node.root is not None:
            del self._hosts[node.root][node.number]
        self.served[node.slot] += node.served
        node.served = 0

    def _replace(self, _: Any, __: Any) -> None:
        """A random honest node dies, and another begins in its place."""
        for _ in range(100):  # those that just died aren't there to die
            node = self.slots[int(self._rng.random() * self.honest)]
            if node.is_alive:
                self.kill(node)
                self.heap.at(self.heap.now + REPLACE_S, self._start, node.slot, node.expert)
                return

    def _join_storm(self, _: Any, __: Any) -> None:
        self._start(len(self.slots), len(self.slots) % self.scenario.experts)

    def _start(self, slot: int, expert: int) -> None:
        node = self._make(slot, SigningKey(self._rng.randbytes(32)), expert)
        seeds = self._pick_seeds()
        self.add(node)
        node.start_ticking(self._rng)
        node.join(seeds)
        self.heap.at(self.heap.now + LOAD_S, node.advertise)

    def _pick_seeds(self) -> list[Contact]:
        seeds: list[Contact] = []
        for _ in range(100):
            node = self.slots[int(self._rng.random() * self.honest)]
            if node.is_alive and node.contact not in seeds:
                seeds.append(node.contact)
            if len(seeds) == SEEDS:
                break
        return seeds

    def _cut(self, share: float, _: Any) -> None:
        for slot, node in enumerate(self.slots):
            self.wires.set_side(node.number, int(slot < share * len(self.slots)))
        self.healing.note_cut()

    def _heal(self, _: Any, __: Any) -> None:
        for node in self.slots:
            self.wires.set_side(node.number, 0)
        self.healing.note_healed()

    # -- wishes ------------------------------------------------------------------------------------------------------

    def _draw(self) -> ModelRoot:
        """An expert, the popular ones more often (Zipf)."""
        return self.roots[bisect(self._popular, self._users.random() * self._popular[-1])]

    def _wish(self, slot: int, _: Any) -> None:
        """A user asks; and again a period later."""
        node, now = self.slots[slot], self.heap.now
        if node.is_alive:
            self.requesting.call(node, self.get_expert(slot))
        else:
            self.figures.abandoned += 1
        elapsed, factor = now - START, 1.0
        for surge in self.scenario.surges:
            if surge.at_s <= elapsed < surge.at_s + surge.for_s:
                factor *= surge.factor
        self.heap.at(now + 60 / (self.scenario.calls_per_minute * factor), self._wish, slot)

    def _probe(self, _: Any, __: Any) -> None:
        """A random node looks a random id up."""
        node = self.slots[int(self._rng.random() * self.honest)]
        target = self._rng.randbytes(32)
        if not node.is_alive:
            return
        goal = int.from_bytes(target, "big")

        def judge(done: LookupDone) -> None:
            now = self.heap.now
            known = (
                other
                for other in self.slots
                if other.is_alive
                and other is not node
                and now - other.known_since >= GRACE_S
                and not self.wires.is_cut(node.number, other.number)
            )
            nearest = min((get_node_number(other.peer_id) ^ goal for other in known), default=None)
            found = get_node_number(done.contacts[0].peer_id) ^ goal if done.contacts else None
            is_right = nearest is None or (found is not None and found <= nearest)
            self.figures.note_probe(done.hops, is_right=is_right)

        node.look_up(target, "nodes", judge)


def _make_addr(number: int) -> str:
    """Private addresses: limits per network don't count them."""
    return f"/ip4/10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}/tcp/4001"
