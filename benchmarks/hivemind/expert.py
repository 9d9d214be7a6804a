"""Calls to one remote expert of hivemind, as ``daaswarm bench expert`` makes them to ours.

Runs in hivemind's own environment (``install.sh``), started by ``benchmarks/beside_hivemind.py``. Calls are made in
hivemind's own event loop, without the hop between threads and the autograd of its usual interface. A line of JSON for
each cell.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
import traceback
from typing import Any

import serving

NAME = "e.0"
WARM_S = 1.0
TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--expert", choices=("nop", "ffn"), default="nop")
    parser.add_argument("--dim", type=int, default=576)
    parser.add_argument("--cells", default="1x1", help="rows x callers, with commas between")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--handlers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.serve:
        serving.serve({NAME: arguments.expert}, arguments.dim, arguments.handlers, arguments.threads, [])
        return
    options = ["--serve", "--expert", arguments.expert, "--dim", str(arguments.dim)]
    options += ["--handlers", str(arguments.handlers), "--threads", str(arguments.threads)]
    server = serving.start(__file__, *options)
    code = 1
    try:
        assert server.stdout is not None
        measure(arguments, json.loads(server.stdout.readline()))
        code = 0
    except BaseException:  # noqa: BLE001 - nothing may stay behind, whatever it is
        traceback.print_exc()
    serving.stop(server)
    serving.leave(code)


def measure(arguments: argparse.Namespace, ready: dict[str, Any]) -> None:
    import torch
    from hivemind.compression import serialize_torch_tensor
    from hivemind.moe import RemoteExpert
    from hivemind.moe.client.expert import expert_forward
    from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
    from hivemind.moe.expert_uid import ExpertInfo
    from hivemind.p2p import P2P, PeerID

    p2p = RemoteExpertWorker.run_coroutine(P2P.create(initial_peers=ready["addrs"]))
    expert = RemoteExpert(ExpertInfo(NAME, PeerID.from_base58(ready["peer_id"])), p2p)
    local, stub = serving.build(arguments.expert, arguments.dim), expert.stub
    for cell in arguments.cells.split(","):
        batch, callers = map(int, cell.split("x"))
        rows = torch.randn(batch, arguments.dim, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            difference = float((expert(rows) - local(rows)).abs().max())
        if difference > TOLERANCE:
            sys.exit(f"hivemind's answer differs by {difference}")
        latencies: list[float] = []
        errors: list[str] = []

        async def caller(until: float, kept: list[float], rows: Any = rows, errors: list[str] = errors) -> None:
            while (started := time.perf_counter()) < until and len(errors) < 100:
                try:
                    await expert_forward(NAME, (rows,), (serialize_torch_tensor(each) for each in (rows,)), stub)
                    kept.append(time.perf_counter() - started)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is counted
                    errors.append(f"{type(error).__name__}: {error}")

        async def call_all(callers: int, until: float, kept: list[float], caller: Any = caller) -> None:
            await asyncio.gather(*(caller(until, kept) for _ in range(callers)))

        warm_until = time.perf_counter() + min(WARM_S, arguments.seconds / 4)
        RemoteExpertWorker.run_coroutine(call_all(callers, warm_until, []))
        errors.clear()
        started = time.perf_counter()
        RemoteExpertWorker.run_coroutine(call_all(callers, started + arguments.seconds, latencies))
        elapsed = time.perf_counter() - started
        latencies.sort()
        result: dict[str, Any] = {"batch": batch, "callers": callers, "calls": len(latencies), "errors": len(errors)}
        if not latencies:
            sys.exit(f"hivemind answered no call: {errors[:1]}")
        result |= {
            "calls_per_s": round(len(latencies) / elapsed, 1),
            "rows_per_s": round(len(latencies) * batch / elapsed, 1),
            "p50_ms": round(statistics.median(latencies) * 1000, 4),
            "p99_ms": round(latencies[min(len(latencies) - 1, int(len(latencies) * 0.99))] * 1000, 4),
            "threads": ready["threads"],
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
