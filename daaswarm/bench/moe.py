"""``bench moe``: requests to a mixture of experts on many host processes, before and after a part of them is gone.

Each request is what a layer of an answer is: a gate chooses k experts for each row, and their weighted sum comes back.
The hosts are told to the requester, not found by it. Killed hosts reset their connections, stopped ones say nothing.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import trio

from daaswarm.bench.child import Child, start_process
from daaswarm.bench.expert_calls import ROOT, START_S, FfnLayer
from daaswarm.config import Config
from daaswarm.errors import DaaswarmError, NoPeerCouldServe
from daaswarm.experts.service import HostedModel
from daaswarm.inference.plan import HostPlan
from daaswarm.inference.requester import SharedRouter
from daaswarm.inference.swarm_experts import SwarmExperts
from daaswarm.messages import Contact
from daaswarm.models.trunk import ExpertsFn
from daaswarm.net.network import connect_all
from daaswarm.node.life import open_node
from daaswarm.node.reporting import Emit
from daaswarm.store.data_dir import DataDir
from daaswarm.types import ExpertId, PeerId

NAME = "bench-moe"
WAVE = 4  # processes started at the same time
WARM_CALLS = 20
CHECKED = 32  # answers of a phase that are compared with the same computed here
TOLERANCE = 1e-3  # relative to the largest number of an answer

How = Literal["kill", "stop"]


class MoeLayer:
    """Some experts of one layer; those with the same number are the same on every host."""

    def __init__(self, dim: int, ids: list[int]) -> None:
        self.ids = sorted(ids)
        self._experts = {expert: FfnLayer(dim, seed=expert) for expert in self.ids}
        self.nbytes = sum(expert.nbytes for expert in self._experts.values())

    def compute_pairs(
        self, rows: torch.Tensor, row_index: torch.Tensor, expert_index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """(n, dim) f32: each pair adds ``weight * expert(row)`` to its row."""
        sums = torch.zeros(rows.shape, dtype=torch.float32)
        for expert in expert_index.unique().tolist():
            chosen = (expert_index == expert).nonzero()[:, 0]
            at = row_index[chosen]
            sums.index_add_(0, at, self._experts[expert].compute_slices(rows[at], [0]) * weights[chosen, None])
        return sums

    def compute_slices(self, rows: torch.Tensor, slices: list[int]) -> torch.Tensor:
        raise DaaswarmError("this benchmark's experts are a mixture's")


@dataclass
class Phase:
    """What requests of one phase came to."""

    latencies_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    regated: int = 0
    kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def describe(self, check: MoeLayer) -> dict[str, Any]:
        times = sorted(self.latencies_s)
        return {
            "calls": len(times),
            "failed": self.errors.total(),
            "errors": dict(self.errors),
            "wrong": sum(not _is_right(check, *each) for each in self.kept),
            "regated": self.regated,
            "calls_per_s": round(len(times) / sum(times), 1),
            "first_ms": round(self.latencies_s[0] * 1000, 3),
            "p50_ms": round(statistics.median(times) * 1000, 3),
            "p99_ms": round(times[min(len(times) - 1, int(len(times) * 0.99))] * 1000, 3),
            "max_ms": round(times[-1] * 1000, 3),
        }


class Requests:
    """A gate, and the experts behind it (``swarm``). Lives in the thread that makes the requests.

    An expert that no live host has is left out of the choice from then on, and the choice made again.
    """

    def __init__(self, swarm: ExpertsFn, *, dim: int, experts: int, k: int, batch: int, seed: int) -> None:
        self._swarm = swarm
        self._generator = torch.Generator().manual_seed(seed)
        self._gate = torch.randn(dim, experts, generator=self._generator) / dim**0.5
        self._gone = torch.zeros(experts, dtype=torch.bool)
        self._shape = (batch, dim)
        self._k = k

    def run(self, *, seconds: float = 0.0, calls: int = 0) -> Phase:
        """One request after the other, for so long or so many."""
        phase = Phase()
        ends_at = time.perf_counter() + seconds
        while len(phase.latencies_s) < calls or time.perf_counter() < ends_at:
            rows = torch.randn(self._shape, generator=self._generator)
            started = time.perf_counter()
            try:
                index, weights, sums = self._ask(rows, phase)
                if len(phase.kept) < CHECKED:
                    phase.kept.append((rows, index, weights, sums))
            except DaaswarmError as error:
                phase.errors[error.code] += 1
            phase.latencies_s.append(time.perf_counter() - started)
        return phase

    def _ask(self, rows: torch.Tensor, phase: Phase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        while True:
            scores, index = (rows @ self._gate).masked_fill(self._gone, -torch.inf).topk(self._k)
            weights = scores.softmax(-1)
            try:
                return index, weights, self._swarm(0, rows, index, weights)
            except NoPeerCouldServe as error:
                self._gone[error.missing[0]] = True
                if int((~self._gone).sum()) < self._k:
                    raise
                phase.regated += 1


def _is_right(
    check: MoeLayer, rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, sums: torch.Tensor
) -> bool:
    pairs = torch.arange(len(rows)).repeat_interleave(index.shape[1])
    wanted = check.compute_pairs(rows, pairs, index.reshape(-1), weights.reshape(-1))
    return float((wanted - sums).abs().max()) <= TOLERANCE * float(wanted.abs().max())


async def serve(data_dir: DataDir, config: Config, dim: int, experts: list[int], emit: Emit) -> None:
    """One host's side, until cancelled."""
    async with open_node(data_dir, config, listen=True, libp2p=False) as node:
        layer = MoeLayer(dim, experts)
        node.hosting.get_service().add(HostedModel(ROOT, NAME, "moe", dim, "f32", {0: layer}))
        await emit({"event": "ready", "peer_id": node.peer_id, "addrs": node.addrs})
        await trio.sleep_forever()


def place(experts: int, hosts: int, replicas: int) -> list[list[int]]:
    """The experts of each host: each is on ``replicas`` hosts in a row."""
    return [sorted(e for e in range(experts) if (host - e) % hosts < replicas) for host in range(hosts)]


async def run_moe(
    data_dir: DataDir,
    config: Config,
    *,
    hosts: int,
    experts: int,
    replicas: int,
    k: int,
    dim: int,
    batch: int,
    dead: float,
    how: How,
    seconds: float,
    seed: int,
    folder: Path,
    emit: Emit,
) -> dict[str, Any]:
    """Requests for ``seconds`` to all hosts, then again with a share ``dead`` of them killed or stopped.

    Raises:
        DaaswarmError: a host process didn't start.
    """
    rng = random.Random(seed)
    placed = place(experts, hosts, replicas)
    async with open_hosts(placed, dim, folder, emit) as running:
        contacts = {PeerId(contact.peer_id): contact for _, contact in running}
        holders: dict[ExpertId, list[PeerId]] = {}
        for held, peer in zip(placed, contacts, strict=True):
            for expert in held:
                holders.setdefault(ExpertId(0, expert), []).append(peer)
        plan = HostPlan(ROOT, "f32", {0: experts}, holders, contacts, kind="moe")
        async with open_node(data_dir, config, listen=False, libp2p=False) as node:
            await connect_all(node.network, contacts.values())
            swarm = SwarmExperts(
                plan,
                node.network,
                SharedRouter(rng),
                refresh=lambda: plan,
                call_timeout_s=config.infer.call_timeout_s,
                model_name=NAME,
            )
            requests = Requests(swarm, dim=dim, experts=experts, k=k, batch=batch, seed=seed)

            def measure() -> Phase:
                return requests.run(seconds=seconds)

            try:
                await trio.to_thread.run_sync(lambda: requests.run(calls=WARM_CALLS), abandon_on_cancel=True)
                await emit({"event": "progress", "what": "all hosts are there", "done": 1, "total": 2})
                healthy = await trio.to_thread.run_sync(measure, abandon_on_cancel=True)
                victims = rng.sample(running, round(dead * hosts))
                for child, _ in victims:
                    if how == "kill":
                        child.process.kill()
                    else:
                        psutil.Process(child.process.pid).suspend()
                await emit({"event": "progress", "what": f"{len(victims)} hosts are gone", "done": 2, "total": 2})
                after = await trio.to_thread.run_sync(measure, abandon_on_cancel=True) if victims else None
            finally:
                swarm.cancel()
    check = MoeLayer(dim, list(range(experts)))
    result: dict[str, Any] = {
        "hosts": hosts,
        "experts": experts,
        "replicas": replicas,
        "k": k,
        "dim": dim,
        "batch": batch,
        "how": how,
        "gone": len(victims),
        "healthy": healthy.describe(check),
    }
    return result if after is None else {**result, "after": after.describe(check)}


@asynccontextmanager
async def open_hosts(
    placed: list[list[int]], dim: int, folder: Path, emit: Emit
) -> AsyncIterator[list[tuple[Child, Contact]]]:
    """Starts them in waves; kills them at the end.

    Raises:
        DaaswarmError: a process didn't start.
    """
    children: list[Child] = []
    running: list[tuple[Child, Contact]] = []
    failure = DaaswarmError("a host's process did not start", hint="its messages are above; try fewer --hosts")
    try:
        while len(running) < len(placed):
            for number in range(len(children), min(len(children) + WAVE, len(placed))):
                held = ",".join(map(str, placed[number]))
                options = ["--experts", held, "--dim", f"{dim}", "--data-dir", f"{folder / str(number)}"]
                children.append(Child(await start_process("bench", "serve-moe", *options)))
            for child in children[len(running) :]:
                running.append((child, await child.wait_ready(START_S, failure)))
                await emit({"event": "progress", "what": "starting hosts", "done": len(running), "total": len(placed)})
        yield running
    finally:
        for child in children:  # all at once, before any is waited for
            child.process.kill()
        for child in children:
            await child.close()
