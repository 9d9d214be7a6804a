"""``bench expert``: how many expert calls a second go through one node, and how long one takes.

Two processes, the host's and this one, over the data plane that inference uses.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, Literal

import torch
import trio
from torch.nn import functional

from daaswarm.bench.child import Child, start_process
from daaswarm.config import Config
from daaswarm.errors import Busy, DaaswarmError
from daaswarm.experts.service import HostedModel
from daaswarm.inference.swarm_experts import as_bytes
from daaswarm.messages import ExpertCall
from daaswarm.models.kernels import fill, lay_out
from daaswarm.node.life import open_node
from daaswarm.node.reporting import Emit
from daaswarm.store.data_dir import DataDir
from daaswarm.types import ModelRoot

ROOT = ModelRoot("be" * 32)  # no manifest has this root: nobody else can be asked for it
START_S = 60.0  # for the host process to import torch
CALL_S = 10.0
FFN_RATIO = 4  # intermediate width over model width

Kind = Literal["nop", "ffn"]


class NopLayer:
    """Returns its rows: what remains is the network."""

    def __init__(self) -> None:
        self.ids = [0]
        self.nbytes = 0

    def compute_pairs(self, rows: Any, row_index: Any, expert_index: Any, weights: Any) -> torch.Tensor:
        raise DaaswarmError("the benchmark's experts are dense")

    def compute_slices(self, rows: torch.Tensor, slices: list[int]) -> torch.Tensor:
        return rows


class FfnLayer(NopLayer):
    """dim → 4 dim → dim with a GELU between, random weights (the feed-forward net that hivemind measures with)."""

    def __init__(self, dim: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        up = torch.randn(FFN_RATIO * dim, dim, generator=generator) / dim**0.5
        down = torch.randn(dim, FFN_RATIO * dim, generator=generator) / dim**0.5
        self.nbytes = up.nbytes + down.nbytes
        self._up, self._down = lay_out(up, down)

    def compute_slices(self, rows: torch.Tensor, slices: list[int]) -> torch.Tensor:
        return self._down(functional.gelu(self._up(fill(rows, self._up.least_rows))))[: len(rows)]


async def serve(data_dir: DataDir, config: Config, kind: Kind, dim: int, emit: Emit) -> None:
    """The host's side, until cancelled."""
    async with open_node(data_dir, config, listen=True, libp2p=False) as node:
        layer = NopLayer() if kind == "nop" else FfnLayer(dim)
        node.hosting.get_service().add(HostedModel(ROOT, f"bench-{kind}", "dense", dim, "f32", {0: layer}))
        await emit({"event": "ready", "peer_id": node.peer_id, "addrs": node.addrs})
        await trio.sleep_forever()


async def run_expert_calls(
    data_dir: DataDir, config: Config, *, kind: Kind, dim: int, batch: int, callers: int, seconds: float, host_dir: str
) -> dict[str, Any]:
    """``callers`` tasks call one expert with ``batch`` rows, one call after the other, for ``seconds``.

    Raises:
        DaaswarmError: the host process didn't start.
    """
    options = ["--expert", kind, "--dim", str(dim), "--data-dir", host_dir]
    host = Child(await start_process("bench", "serve-expert", *options))
    try:
        failure = DaaswarmError("the benchmark's host process did not start", hint="its messages are above")
        contact = await host.wait_ready(START_S, failure)
        async with open_node(data_dir, config, listen=False, libp2p=False) as node:
            await node.network.connect(contact)
            rows = torch.randn(batch, dim, generator=torch.Generator().manual_seed(0))
            call = ExpertCall(model_root=ROOT, layer=0, experts=[0], dtype="f32", rows=batch, hidden=dim)
            body = [as_bytes(rows)]
            latencies: list[float] = []
            busy = 0

            async def caller(until: float, kept: list[float]) -> None:
                nonlocal busy
                while (started := time.perf_counter()) < until:
                    try:
                        await node.network.call(contact, call, body, deadline_s=CALL_S)
                    except Busy as error:  # its queue is longer than the deadline allows
                        busy += 1
                        await trio.sleep(min(error.retry_after_s, max(until - time.perf_counter(), 0.0)))
                    else:
                        kept.append(time.perf_counter() - started)

            async with trio.open_nursery() as nursery:  # warm up: connections, caches, the host's allocator
                for _ in range(callers):
                    nursery.start_soon(caller, time.perf_counter() + min(1.0, seconds / 4), [])
            busy, started = 0, time.perf_counter()
            async with trio.open_nursery() as nursery:
                for _ in range(callers):
                    nursery.start_soon(caller, started + seconds, latencies)
            elapsed = time.perf_counter() - started
    finally:
        await host.close()
    if not latencies:
        raise DaaswarmError(
            f"no call was answered within {seconds:g} s", hint="give --seconds more, or a smaller --batch"
        )
    latencies.sort()
    return {
        "expert": kind,
        "dim": dim,
        "batch": batch,
        "callers": callers,
        "seconds": round(elapsed, 3),
        "calls": len(latencies),
        "busy": busy,
        "calls_per_s": round(len(latencies) / elapsed, 1),
        "rows_per_s": round(len(latencies) * batch / elapsed, 1),
        "p50_ms": round(statistics.median(latencies) * 1000, 4),
        "p99_ms": round(latencies[min(len(latencies) - 1, int(len(latencies) * 0.99))] * 1000, 4),
    }
