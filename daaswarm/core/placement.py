"""Which experts a host should take: those the swarm has fewest of, in whole layers where it can.

Each host decides for itself, from what the others say they hold; nobody is in charge. At its start it fills its memory
(:func:`choose_experts`), which keeps replicas even to within one by itself. When hosts leave, :class:`Placement` evens
out what is left, slowly: an expert is exchanged only for one with two replicas fewer, so every exchange makes the
swarm more even and there is nothing to swing back and forth between.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from daaswarm.core.rng import Rng
from daaswarm.errors import ConfigError
from daaswarm.types import ExpertId, PeerId, format_bytes

REVIEW_S = 60.0  # between two looks at who holds what; each asks every host for its adverts
REVIEW_SPREAD = 0.5  # of that, at random, so that hosts that started together don't look together
LOST_S = 30.0  # an expert without a host waits so long, and at random up to twice that: its host may be back
UNEVEN_S = 600.0  # any other; a host that is started anew, or replaced, is back by then and nothing has moved
SURPLUS = 2  # replicas that one expert must have more than another to make room for it
TURN_S = 60.0  # an expert's holders take turns in being the one who may give it up
CHANGE_SHARE = 0.25  # of a host's memory that changes at once; the rest after another wait

Held = Mapping[int, Collection[int]]
"""``{layer: experts}``."""


def choose_experts(
    layers: Mapping[int, int],
    expert_bytes: Callable[[int], int],
    memory_bytes: int,
    live_hosts: Mapping[ExpertId, int],
    rng: Rng,
) -> dict[int, list[int]]:
    """Fills ``memory_bytes`` with the experts that have the fewest live hosts.

    Among equals, layers are taken whole and in order from a random first one: a host with whole layers is called
    for few layers of a token, and hosts that start together don't all take the same ones.

    Args:
        layers: how many experts (or slices) each layer has.
        expert_bytes: the size of one expert of a layer.
        live_hosts: hosts per expert; absent means none.

    Returns:
        ``{layer: [experts]}``, both ascending; deterministic given ``rng``.

    Raises:
        ConfigError: not even the smallest expert fits, or the model has none.
    """
    sizes = {layer: expert_bytes(layer) for layer, count in layers.items() if count}
    smallest = min(sizes.values(), default=0)
    if not sizes or smallest > memory_bytes:
        raise ConfigError(
            f"not one expert fits: the smallest takes {format_bytes(smallest)}, {format_bytes(memory_bytes)} are given"
            if sizes
            else "this model has no experts to host",
            hint=f"give at least {format_bytes(smallest)}, or host a smaller model" if sizes else "host another model",
        )
    # Scarcity first; {hosts: {layer: [experts]}}.
    levels: dict[int, dict[int, list[int]]] = {}
    for layer in sorted(sizes):
        for expert in range(layers[layer]):
            hosts = live_hosts.get(ExpertId(layer, expert), 0)
            levels.setdefault(hosts, {}).setdefault(layer, []).append(expert)
    chosen: dict[int, list[int]] = {}
    left = memory_bytes
    for hosts in sorted(levels):
        level = levels[hosts]
        order = sorted(level)
        first = int(rng.random() * len(order))
        rotated = order[first:] + order[:first]
        # Whole layers before parts of layers; what is left over then takes single experts.
        taken: set[int] = set()
        for layer in rotated:
            if len(level[layer]) * sizes[layer] <= left:
                chosen.setdefault(layer, []).extend(level[layer])
                left -= len(level[layer]) * sizes[layer]
                taken.add(layer)
        for layer in rotated:
            if layer not in taken and (fitting := level[layer][: left // sizes[layer] if sizes[layer] else None]):
                chosen.setdefault(layer, []).extend(fitting)
                left -= len(fitting) * sizes[layer]
        if left < smallest:
            break
    return {layer: sorted(chosen[layer]) for layer in sorted(chosen)}


class Change(NamedTuple):
    """What a host should give up and take, both ``{layer: [experts]}``, ascending. Giving up comes first."""

    drop: dict[int, list[int]]
    add: dict[int, list[int]]


class Placement:
    """One host's choice of the experts of one model, as others come and go.

    Args:
        own: this host.
        layers: how many experts (or slices) each layer has.
        expert_bytes: the size of one expert of a layer.
        memory_bytes: what all of them together may take.
    """

    def __init__(
        self,
        own: PeerId,
        layers: Mapping[int, int],
        expert_bytes: Callable[[int], int],
        memory_bytes: int,
        rng: Rng,
    ) -> None:
        self._own = own
        self._layers = dict(sorted(layers.items()))
        self._sizes = {layer: expert_bytes(layer) for layer in self._layers}
        self._memory_bytes = memory_bytes
        self._rng = rng
        self._since: dict[ExpertId, float] = {}  # when it was first seen that this host should rather hold it
        self._patience = rng.random()

    def get_pause_s(self) -> float:
        """Until the next :meth:`review`; another each time."""
        return REVIEW_S * (1 + REVIEW_SPREAD * (2 * self._rng.random() - 1))

    def review(
        self,
        held: Held,
        holders: Mapping[ExpertId, Collection[PeerId]],
        now: float,
        *,
        closed: Collection[int] = (),
    ) -> Change | None:
        """What to change now, if anything.

        Args:
            held: what this host holds; it counts, whatever ``holders`` says of this host.
            holders: who holds each expert, as just asked.
            closed: layers that this host serves for another reason; nothing of them is taken.
        """
        mine = {expert for expert in _list_held(held) if expert.expert < self._layers.get(expert.layer, 0)}
        counts: dict[ExpertId, int] = {}
        for layer, number in self._layers.items():
            for i in range(number):
                expert = ExpertId(layer, i)
                others = holders.get(expert, ())
                counts[expert] = len(others) - (self._own in others) + (expert in mine)
        free = self._memory_bytes - sum(self._sizes[expert.layer] for expert in mine)
        most = max((counts[expert] for expert in mine), default=0)
        wanted = [
            expert
            for expert, count in counts.items()
            if expert not in mine
            and expert.layer not in closed
            and (self._sizes[expert.layer] <= free or count <= most - SURPLUS)
        ]
        self._since = {expert: self._since.get(expert, now) for expert in wanted}
        ripe = [expert for expert in wanted if now - self._since[expert] >= self._get_wait_s(counts[expert])]
        change = self._exchange(ripe, mine, counts, holders, free, now) if ripe else None
        if change is not None:
            # What else is wanted waits anew: others may take it meanwhile.
            self._since.clear()
            self._patience = self._rng.random()
        return change

    def _get_wait_s(self, count: int) -> float:
        return (UNEVEN_S if count else LOST_S) * (1 + self._patience)

    def _exchange(
        self,
        ripe: list[ExpertId],
        mine: set[ExpertId],
        counts: dict[ExpertId, int],
        holders: Mapping[ExpertId, Collection[PeerId]],
        free: int,
        now: float,
    ) -> Change | None:
        in_layer = _count_layers(mine)
        # The fewest hosts first; then layers of which this host has the most already, so that they become whole.
        rotation = int(self._rng.random() * len(self._layers))
        place = {layer: (i - rotation) % len(self._layers) for i, layer in enumerate(self._layers)}
        wanted = sorted(ripe, key=lambda e: (counts[e], -in_layer.get(e.layer, 0), place[e.layer], e.expert))
        # The most hosts first; then layers of which this host has the least.
        spare = sorted(
            (expert for expert in mine if self._may_drop(expert, holders, now)),
            key=lambda e: (-counts[e], in_layer[e.layer], place[e.layer], e.expert),
        )
        budget = int(self._memory_bytes * CHANGE_SHARE)
        drop: list[ExpertId] = []
        add: list[ExpertId] = []
        for expert in wanted:
            size = self._sizes[expert.layer]
            if add and size > budget:
                break
            made_room = 0
            leaving: list[ExpertId] = []
            for other in spare[len(drop) :]:
                if free + made_room >= size or counts[other] < counts[expert] + SURPLUS:
                    break
                leaving.append(other)
                made_room += self._sizes[other.layer]
            if free + made_room >= size:
                free += made_room - size
                budget -= size
                drop += leaving
                add.append(expert)
        return Change(_group(drop), _group(add)) if add else None

    def _may_drop(self, expert: ExpertId, holders: Mapping[ExpertId, Collection[PeerId]], now: float) -> bool:
        """Whether it is this host's turn among those who hold the expert: two of two must not give it up at once."""
        peers = sorted({*holders.get(expert, ()), self._own})
        return peers[(int(now // TURN_S) + expert.layer + expert.expert) % len(peers)] == self._own


def _list_held(held: Held) -> Iterable[ExpertId]:
    return (ExpertId(layer, expert) for layer in sorted(held) for expert in sorted(held[layer]))


def _count_layers(experts: Iterable[ExpertId]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for expert in experts:
        counts[expert.layer] = counts.get(expert.layer, 0) + 1
    return counts


def _group(experts: Iterable[ExpertId]) -> dict[int, list[int]]:
    grouped: dict[int, list[int]] = {}
    for layer, expert in sorted(experts):
        grouped.setdefault(layer, []).append(expert)
    return grouped
