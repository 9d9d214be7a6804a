"""A caller process of ``bench load``: calls at a rate that doesn't wait for answers (an open loop)."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec
import torch
import trio

from daaswarm.bench.expert_calls import ROOT
from daaswarm.config import Config
from daaswarm.errors import Busy, DaaswarmError
from daaswarm.inference.swarm_experts import as_bytes
from daaswarm.limits import CALLS_PER_PEER
from daaswarm.messages import Contact, ExpertCall
from daaswarm.net.network import Network
from daaswarm.node.life import open_node
from daaswarm.node.reporting import Emit
from daaswarm.store.data_dir import DataDir

LEAST_S = 1e-5  # times up to here are one bin
GROWTH = 1.02  # from bin to bin: times are kept to two percent, in memory that doesn't grow
LINE_BYTES = 64 * 1024  # of an order


class Times:
    """Many durations as counts by size. Merges, and travels as JSON."""

    def __init__(self, counts: dict[Any, int] | None = None) -> None:
        self.counts = Counter({int(place): count for place, count in (counts or {}).items()})

    def add(self, seconds: float) -> None:
        self.counts[max(0, math.ceil(math.log(max(seconds, LEAST_S) / LEAST_S, GROWTH)))] += 1

    def get_ms(self, share: float) -> float | None:
        """The time that ``share`` of them don't exceed; ``None`` if there are none."""
        left = math.ceil(share * self.counts.total())
        for place in sorted(self.counts):
            left -= self.counts[place]
            if left <= 0:
                return round(LEAST_S * GROWTH**place * 1000, 2)
        return None


class Step(msgspec.Struct, frozen=True):
    """An order. ``rate``: calls a second, Poisson; 0: ``in_flight`` calls at any time instead, for the capacity. What
    happens in the first ``deadline_s``, in which queues fill, isn't counted; then come ``seconds`` that are.
    """

    rate: float
    seconds: float
    deadline_s: float
    in_flight: int = 0


class Outcome(msgspec.Struct):
    """What came of it. ``served``: answered meanwhile, whenever it was asked; ``held_back``: not sent, since
    :data:`daaswarm.limits.CALLS_PER_PEER` were in flight; ``busy``: refused by the host.
    """

    asked: int = 0
    served: int = 0
    busy: int = 0
    held_back: int = 0
    errors: dict[str, int] = {}
    answer_s: dict[int, int] = {}
    busy_s: dict[int, int] = {}


class Caller:
    """Calls the benchmark's expert at ``contact`` with ``batch`` rows."""

    def __init__(self, network: Network, contact: Contact, *, dim: int, batch: int, seed: int) -> None:
        self._network = network
        self._contact = contact
        self._call = ExpertCall(model_root=ROOT, layer=0, experts=[0], dtype="f32", rows=batch, hidden=dim)
        self._body = [as_bytes(torch.randn(batch, dim, generator=torch.Generator().manual_seed(seed)))]
        self._rng = random.Random(seed)
        self._flying = 0

    async def run(self, step: Step) -> Outcome:
        outcome, answers, refusals = Outcome(), Times(), Times()
        counts_at = time.perf_counter() + step.deadline_s
        ends_at = counts_at + step.seconds

        async def one() -> float:
            """How long to wait before another one, if that matters (s)."""
            started = time.perf_counter()
            counts = started >= counts_at
            outcome.asked += counts
            if self._flying >= CALLS_PER_PEER:
                outcome.held_back += counts
                return 0.0
            self._flying += 1
            try:
                await self._network.call(self._contact, self._call, self._body, deadline_s=step.deadline_s)
            except Busy as error:
                if counts:
                    outcome.busy += 1
                    refusals.add(time.perf_counter() - started)
                return error.retry_after_s
            except DaaswarmError as error:
                if counts:
                    outcome.errors[error.code] = outcome.errors.get(error.code, 0) + 1
            else:
                ended = time.perf_counter()
                outcome.served += counts_at <= ended <= ends_at
                if counts:
                    answers.add(ended - started)
            finally:
                self._flying -= 1
            return 0.0

        async def repeat() -> None:
            while time.perf_counter() < ends_at:
                wait_s = await one()
                await trio.sleep(min(wait_s, max(0.0, ends_at - time.perf_counter())))

        async with trio.open_nursery() as nursery:
            for _ in range(step.in_flight):
                nursery.start_soon(repeat)
            due = time.perf_counter()
            while step.rate:
                due += self._rng.expovariate(step.rate)
                if due >= ends_at:
                    break
                await trio.sleep(max(0.0, due - time.perf_counter()))
                if time.perf_counter() >= ends_at:  # the machine is too slow to ask for so much
                    break
                nursery.start_soon(one)
        outcome.answer_s, outcome.busy_s = dict(answers.counts), dict(refusals.counts)
        return outcome


async def call_on_orders(
    data_dir: DataDir,
    config: Config,
    contact: Contact,
    *,
    dim: int,
    batch: int,
    seed: int,
    orders: trio.abc.ReceiveStream,
    emit: Emit,
) -> None:
    """A :class:`Step` a line comes in, its :class:`Outcome` a line goes out, until the orders end."""
    async with open_node(data_dir, config, listen=False, libp2p=False) as node:
        await node.network.connect(contact)
        caller = Caller(node.network, contact, dim=dim, batch=batch, seed=seed)
        await emit({"event": "ready", "peer_id": node.peer_id, "addrs": []})
        data = bytearray()
        while piece := await orders.receive_some(4096):
            data += piece
            if len(data) > LINE_BYTES:
                return
            while b"\n" in data:
                line, _, rest = bytes(data).partition(b"\n")
                data = bytearray(rest)
                outcome = await caller.run(msgspec.json.decode(line, type=Step))
                await emit({"event": "outcome", **msgspec.to_builtins(outcome, str_keys=True)})


def merge(times: Iterable[dict[int, int]]) -> Times:
    """Those of several callers together."""
    together = Times()
    for each in times:
        together.counts.update(each)
    return together
