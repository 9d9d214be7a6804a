"""A swarm of real processes, half of which stand still for minutes (SIGSTOP) and go on.

    python -m benchmarks.partition [--peers 30] [--minutes 5] [--seed 1]

All peers host one model, so each follows all others. Reported: how many adverts each of the running half knows during
the stop, and how many of those peers it takes for alive; and how long after it every peer knows every other alive.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import trio

from daaswarm.bench.dht import Peer, open_peers
from daaswarm.types import ModelRoot

ROOT = ModelRoot("5a" * 32)
SETTLE_S = 120.0  # for all to have heard of all at first
HEAL_S = 180.0  # given up after
LOOK_S = 1.0


async def emit(event: dict[str, Any]) -> None:
    """Progress is of no interest here."""


async def count(peers: list[Peer], what: str) -> list[int]:
    """How many adverts each has ("peers"), or how many of their peers it takes for alive ("up")."""
    counts: list[int] = []
    for peer in peers:
        answer, _ = await peer.ask("known", ROOT)
        counts.append(len(answer[what]) if answer is not None else -1)
    return counts


async def wait_for_all(peers: list[Peer], total: int, most_s: float) -> tuple[float | None, list[int]]:
    """Seconds until each takes ``total`` peers for alive; ``None`` if that doesn't come in time."""
    started = time.monotonic()
    while True:
        counts = await count(peers, "up")
        elapsed = time.monotonic() - started
        if min(counts) >= total:
            return round(elapsed, 1), counts
        if elapsed > most_s:
            return None, counts
        await trio.sleep(LOOK_S)


async def run(peers: int, minutes: float, seed: int) -> int:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        async with open_peers(peers, rng, Path(folder), emit) as swarm:
            for peer in swarm:
                answer, _ = await peer.ask("store", ROOT)
                assert answer is not None
            settled_s, counts = await wait_for_all(swarm, peers, SETTLE_S)
            report(step="settled", seconds=settled_s, least_up=min(counts))
            stopped = rng.sample(swarm[1:], peers // 2)
            running = [peer for peer in swarm if peer not in stopped]
            for peer in stopped:
                peer.process.send_signal(signal.SIGSTOP)
            try:
                await trio.sleep(minutes * 60)
                known, up = await count(running, "peers"), await count(running, "up")
                report(step="stopped", minutes=minutes, least_known=min(known), least_up=min(up), most_up=max(up))
            finally:
                for peer in stopped:
                    peer.process.send_signal(signal.SIGCONT)
            healed_s, counts = await wait_for_all(swarm, peers, HEAL_S)
            known = await count(swarm, "peers")
            report(step="healed", seconds=healed_s, least_known=min(known), least_up=min(counts))
    return 0 if settled_s is not None and healed_s is not None and healed_s <= 60 else 1


def report(**result: object) -> None:
    print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    sys.exit(trio.run(run, arguments.peers, arguments.minutes, arguments.seed))


if __name__ == "__main__":
    main()
