"""Hosts that don't compute what they should, for ``bench byzantine``: real nodes, each with its own key and socket."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import torch
import trio
from torch import Tensor

from daaswarm.bench.expert_calls import ROOT
from daaswarm.config import Config
from daaswarm.errors import DaaswarmError, ExpertError
from daaswarm.experts.service import HostedModel
from daaswarm.models.dense import DenseSlices
from daaswarm.models.experts import LayerExperts
from daaswarm.node.life import open_node
from daaswarm.node.reporting import Emit
from daaswarm.store.data_dir import DataDir

NAME = "bench-byzantine"
ACTIVATION = "silu"
HONEST = "honest"
SLEEP_CALLS = 100  # that a sleeper answers rightly
RARE = 0.01  # of its answers that a rare liar falsifies
SLOW_S = 0.02  # that a slow host takes longer; it blocks what else runs in its process, as an overloaded one does

Weights = tuple[Tensor, Tensor, Tensor]
"""Gate, up (width, dim), down (dim, width)."""


def make_weights(dim: int, width: int, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(width, dim, generator=generator) / dim**0.5 for _ in range(2))
    return gate, up, torch.randn(dim, width, generator=generator) / width**0.5


def make_layer(weights: Weights) -> LayerExperts:
    nbytes = sum(weight.nbytes for weight in weights)
    return LayerExperts([0], nbytes, moe=None, dense=DenseSlices([0], ACTIVATION, *weights))


class HostileLayer:
    """An FFN whose host follows a strategy.

    Args:
        layer: what it should compute.
        quantised: the same in int8, for hosts that save memory so.
        rng: this host's own.
    """

    can_open = True

    def __init__(self, strategy: str, layer: LayerExperts, quantised: LayerExperts, rng: random.Random) -> None:
        self.ids = [0]
        self.nbytes = layer.nbytes
        self._layer = quantised if strategy == "quantised" else layer
        self._lie = STRATEGIES[strategy]
        self._strategy = strategy
        self.rng = rng
        self.calls = 0
        self.last: Tensor | None = None

    def compute_pairs(self, rows: Any, row_index: Any, expert_index: Any, weights: Any) -> Tensor:
        raise DaaswarmError("this benchmark's expert is dense")

    def open_pairs(self, rows: Any, row_index: Any, expert_index: Any, weights: Any) -> tuple[Tensor, list[Tensor]]:
        raise DaaswarmError("this benchmark's expert is dense")

    def compute_slices(self, rows: Tensor, slices: list[int]) -> Tensor:
        return self._falsify(self._layer.compute_slices(rows, slices), is_opened=False)

    def open_slices(self, rows: Tensor, slices: list[int]) -> tuple[Tensor, list[Tensor]]:
        if self._strategy == "refuse":
            raise ExpertError("these experts can't be opened")
        sums, opened = self._layer.open_slices(rows, slices)
        return self._falsify(sums, is_opened=True), opened

    def _falsify(self, sums: Tensor, *, is_opened: bool) -> Tensor:
        self.calls += 1
        return self._lie(self, sums, is_opened)


def _honest(host: HostileLayer, sums: Tensor, is_opened: bool) -> Tensor:
    return sums


def _independent(host: HostileLayer, sums: Tensor, is_opened: bool) -> Tensor:
    noise = torch.randn(sums.shape, generator=torch.Generator().manual_seed(host.rng.getrandbits(60)))
    return sums + 0.1 * sums.std() * noise


def _colluding(host: HostileLayer, sums: Tensor, is_opened: bool) -> Tensor:
    """All tell the same lie, so that they agree."""
    sums = sums.clone()
    sums[:, 7 % sums.shape[1]] += 0.5 * sums.norm(dim=1)
    return sums


def _evasive(host: HostileLayer, sums: Tensor, is_opened: bool) -> Tensor:
    return sums if is_opened else _colluding(host, sums, is_opened)


def _sleeper(host: HostileLayer, sums: Tensor, is_opened: bool) -> Tensor:
    return sums if is_opened or host.calls <= SLEEP_CALLS else _independent(host, sums, is_opened)


def _rare(host: HostileLayer, sums: Tensor, is_opened: bool) -> Tensor:
    return _independent(host, sums, is_opened) if host.rng.random() < RARE else sums


def _replay(host: HostileLayer, sums: Tensor, is_opened: bool) -> Tensor:
    if host.last is None or host.last.shape != sums.shape:
        host.last = sums.clone()
    return host.last


def _slow(host: HostileLayer, sums: Tensor, is_opened: bool) -> Tensor:
    time.sleep(SLOW_S)
    return sums


STRATEGIES: dict[str, Callable[[HostileLayer, Tensor, bool], Tensor]] = {
    HONEST: _honest,
    "independent": _independent,
    "colluding": _colluding,
    "evasive": _evasive,
    "sleeper": _sleeper,
    "rare": _rare,
    "replay": _replay,
    "quantised": _honest,
    "slow": _slow,
    "refuse": _honest,
}
"""What a host does; ``slow`` ones are honest, and must not be banned."""

LIARS = tuple(name for name in STRATEGIES if name not in (HONEST, "slow"))


def quantise(weights: Weights) -> Weights:
    """In int8, a scale for each row."""
    done = []
    for weight in weights:
        scale = weight.abs().amax(1, keepdim=True) / 127
        done.append((weight / scale).round() * scale)
    return done[0], done[1], done[2]


async def serve(
    folder: Path, config: Config, strategies: list[str], dim: int, width: int, seed: int, emit: Emit
) -> None:
    """Hosts in this process, one for each strategy, until cancelled. They share the weights in memory."""
    weights = make_weights(dim, width, seed)
    layer, quantised = make_layer(weights), make_layer(quantise(weights))
    hosts: list[dict[str, Any]] = []
    async with AsyncExitStack() as stack:
        for number, strategy in enumerate(strategies):
            opened = open_node(DataDir(folder / f"{number}"), config, listen=True, libp2p=False)
            node = await stack.enter_async_context(opened)
            hostile = HostileLayer(strategy, layer, quantised, random.Random(f"{seed} {number}"))
            node.hosting.get_service().add(HostedModel(ROOT, NAME, "dense", dim, "f32", {0: hostile}))
            hosts.append({"peer_id": node.peer_id, "addrs": node.addrs, "strategy": strategy})
        await emit({"event": "ready", "hosts": hosts})
        await trio.sleep_forever()
