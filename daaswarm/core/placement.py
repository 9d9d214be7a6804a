"""Which experts a host should take: those the swarm has fewest of, in whole layers where it can."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from daaswarm.core.rng import Rng
from daaswarm.errors import ConfigError
from daaswarm.types import ExpertId, format_bytes


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
