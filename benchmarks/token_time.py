"""Where a token's time goes, at several round trips between the asker and its hosts.

    python -m benchmarks.token_time [--tokens 48] [--plot token-time.png]

Two host processes of the default model, half of its layers each, behind TCP relays that hold every byte back. One line
of JSON for each round trip: the parts of a token in ms, means of an answer whose prompt has been read before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import trio

from benchmarks.plan_against_infer import MODEL, PARTS, PROMPT, Relay, free_port
from benchmarks.swarm import Node
from daaswarm.bench.parity import encode
from daaswarm.config import Config
from daaswarm.core.router import ReplicaRouter
from daaswarm.inference.batching import Batch
from daaswarm.inference.sequence import Sampling, Sequence
from daaswarm.inference.swarm_experts import SwarmExperts
from daaswarm.node.life import open_node
from daaswarm.node.reporting import get_model
from daaswarm.store.data_dir import DataDir

ROUND_TRIPS_MS = (0.1, 1.0, 20.0, 80.0)
PARTS_OF_A_TOKEN: tuple[str, ...] = ("trunk", "routing", "send", "network", "host", "sum")  # in this order drawn
WARM_TOKENS = 12  # of an answer before the one that counts


class TimedExperts(SwarmExperts):
    """Notes what each step of a call took (s). Each layer is on one host here, so that nothing overlaps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.times: dict[str, float] = dict.fromkeys(PARTS_OF_A_TOKEN, 0.0)
        self.total_s = 0.0
        self._sent_at = 0.0  # when the call under way had left this thread

    def __call__(self, *args: Any) -> torch.Tensor:
        started = time.perf_counter()
        try:
            return super().__call__(*args)
        finally:
            self.total_s += time.perf_counter() - started

    def _route(self, *args: Any) -> Any:
        started = time.perf_counter()
        try:
            return super()._route(*args)
        finally:
            self.times["routing"] += time.perf_counter() - started

    def _send(self, *args: Any) -> Any:
        started = time.perf_counter()
        sent = super()._send(*args)
        self.times["send"] += time.perf_counter() - started
        self._sent_at = time.monotonic()
        return sent

    def _note_reply(self, item: Any, reply: Any, size: int) -> None:
        super()._note_reply(item, reply, size)
        service_s = reply.service_us / 1e6
        self.times["host"] += service_s
        waited_s = item.call.submitted_at + item.call.latency_s - self._sent_at  # sending is part of the latency
        self.times["network"] += max(0.0, waited_s - service_s)

    def take_times(self, seconds: float) -> dict[str, float]:
        """The parts of so many seconds, and a fresh start."""
        times, total_s = self.times, self.total_s
        times["trunk"] = seconds - total_s
        times["sum"] = max(0.0, total_s - sum(times[part] for part in ("routing", "send", "network", "host")))
        self.times, self.total_s = dict.fromkeys(PARTS_OF_A_TOKEN, 0.0), 0.0
        return times


async def measure(folder: Path, relays: list[Relay], ports: list[int], tokens: int) -> list[dict[str, Any]]:
    """A row for each of :data:`ROUND_TRIPS_MS`."""

    async def ignore(event: dict[str, Any]) -> None:
        del event

    # It doesn't listen: hosts that dialled it would go around the relays.
    async with open_node(DataDir(folder / "asker"), Config(), listen=False, libp2p=False) as node:
        with ExitStack() as stack:
            addresses: list[str] = []
            for number, (layers, port, relay) in enumerate(zip(PARTS, ports, relays, strict=True)):
                host = Node(
                    f"host{number}",
                    folder / f"host{number}",
                    *("host-expert", MODEL, "--layers", layers, "--listen", f"/ip4/127.0.0.1/tcp/{port}"),
                    *("--announce", f"/ip4/127.0.0.1/tcp/{relay.port}"),
                    *(part for address in addresses for part in ("--bootstrap", address)),
                )
                host.start()
                stack.callback(host.stop)
                await trio.to_thread.run_sync(host.wait_ready)
                addresses = addresses or host.addrs[:1]
            await node.bootstrap(addresses)
            model = await get_model(MODEL, ignore)
            requester = await node.answering.get_requester()
            plan = await node.answering.find_hosts(model, "f32")
            plan.check_complete(model.name)
            await node.answering.connect_hosts(plan)
            trunk = await requester.load(model, "f32", lambda what, done, total: None)
            ids = encode(model, trunk.model.config.get_text_config().vocab_size, PROMPT)
            rows: list[dict[str, Any]] = []
            for round_ms in ROUND_TRIPS_MS:
                for relay in relays:
                    relay.delay_s = round_ms / 2e3
                experts = TimedExperts(
                    plan,
                    node.network,
                    ReplicaRouter(random.Random(0)),
                    refresh=lambda: plan,
                    call_timeout_s=10.0,
                    model_name=model.name,
                )
                batch = Batch(trunk.model, experts)
                for count in (WARM_TOKENS, tokens):
                    sampling = Sampling(max_tokens=count, min_tokens=count, prompt_lookup=False)
                    sequence = Sequence(trunk.model, model.name, list(ids), sampling)
                    load = os.getloadavg()[0]
                    batch.submit(sequence, plan, lambda: None)
                    experts.take_times(0.0)
                    await requester.run_model(batch.compute, batch.work, batch.cancel_all)
                    if sequence.error is not None:
                        raise sequence.error
                    times = experts.take_times(sequence.seconds)
                # The second answer reuses the keys and values of the prompt, so that each of its passes is of one row.
                parts = {part: round(times[part] / tokens * 1e3, 3) for part in PARTS_OF_A_TOKEN}
                whole = round(sequence.seconds / tokens * 1e3, 3)
                rows.append({"round_trip_ms": round_ms, "token_ms": whole, **parts, "load": round(load, 2)})
                print(json.dumps(rows[-1]), flush=True)
            return rows


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Stacked bars, as a PNG: in ms above, as shares below, where the short ones can be seen."""
    from matplotlib.figure import Figure  # not pyplot: it looks for a window system

    figure = Figure(figsize=(8, 7), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1)
    names = [f"{row['round_trip_ms']:g} ms" for row in rows]
    tokens_ms = [row["token_ms"] for row in rows]
    for axes, wholes, label in ((above, None, "ms a token"), (below, tokens_ms, "% of a token")):
        ends = [0.0] * len(rows)
        for part in PARTS_OF_A_TOKEN:
            heights = [row[part] for row in rows]
            if wholes is not None:
                heights = [100 * height / whole for height, whole in zip(heights, wholes, strict=True)]
            axes.bar(names, heights, bottom=ends, label=part)
            ends = [end + height for end, height in zip(ends, heights, strict=True)]
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.3)
    above.legend(loc="upper left")
    below.set_xlabel("round trip that the relays add")
    figure.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    ports = [free_port() for _ in PARTS]
    relays = [Relay(port, 0.0) for port in ports]
    with tempfile.TemporaryDirectory() as folder:
        rows = trio.run(measure, Path(folder), relays, ports, options.tokens)
    if options.plot is not None:
        draw(options.plot, rows)


if __name__ == "__main__":
    main()
