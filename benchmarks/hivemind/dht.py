"""hivemind's DHT under the load of ``daaswarm bench dht``: one ``hivemind.DHT`` process (and its p2pd) per peer.

Runs in hivemind's own environment (``install.sh``), started by ``benchmarks/dht_beside_hivemind.py``. Each key is
stored by a random peer and got by another, one after the other; then a part of the peers is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import time

import hivemind
import psutil
from hivemind.utils import get_dht_time

WAVE = 8
BOOTSTRAPS = 4
START_S = 60.0
WAIT_S = 3.0  # hivemind's own default
TTL_S = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=int, default=64)
    parser.add_argument("--keys", type=int, default=100)
    parser.add_argument("--kill", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libp2p's daemons talk to the last
    rng = random.Random(arguments.seed)
    peers: list[hivemind.DHT] = []
    try:
        result = run(arguments, rng, peers)
        answers.write(json.dumps(result) + "\n")
        answers.flush()
    finally:
        for peer in peers:
            kill(peer)
    os._exit(0)  # its threads don't end by themselves


def run(arguments: argparse.Namespace, rng: random.Random, peers: list[hivemind.DHT]) -> dict[str, object]:
    started = time.perf_counter()
    addresses: list[list[str]] = []
    while len(peers) < arguments.peers:
        wave = []
        for _ in range(min(WAVE if peers else 1, arguments.peers - len(peers))):
            seeds = [address for some in rng.sample(addresses, min(BOOTSTRAPS, len(addresses))) for address in some]
            options = {"wait_timeout": WAIT_S, "startup_timeout": START_S, "num_workers": 4}
            wave.append(hivemind.DHT(initial_peers=seeds, start=True, await_ready=False, **options))
        peers += wave
        for peer in wave:
            peer.wait_until_ready(START_S)
            addresses.append([str(address) for address in peer.get_visible_maddrs()])
    result: dict[str, object] = {"peers": arguments.peers, "wall_start_s": round(time.perf_counter() - started, 1)}
    result["rss_mb_per_peer"] = round(sum(get_memory(peer.pid) for peer in peers) / len(peers) / 1e6, 1)
    old = make_keys(rng, arguments.keys)
    result["before"] = store(peers, old, rng) | get(peers, old, rng)
    victims = rng.sample(peers[1:], round(arguments.kill * len(peers)))
    for victim in victims:
        kill(victim)
    live = [peer for peer in peers if peer not in victims]
    result["after_old_keys"] = get(live, old, rng)
    new = make_keys(rng, arguments.keys)
    result["after_new_keys"] = store(live, new, rng) | get(live, new, rng)
    return result


def make_keys(rng: random.Random, keys: int) -> dict[str, str]:
    return {rng.randbytes(32).hex(): f"value {i}" for i in range(keys)}


def store(live: list[hivemind.DHT], keys: dict[str, str], rng: random.Random) -> dict[str, float]:
    times, stored = [], 0
    for key, value in keys.items():
        peer = rng.choice(live)
        begun = time.perf_counter()
        stored += bool(peer.store(key, value, expiration_time=get_dht_time() + TTL_S))
        times.append(time.perf_counter() - begun)
    return {"store_success": stored / len(keys), **describe("store", times)}


def get(live: list[hivemind.DHT], keys: dict[str, str], rng: random.Random) -> dict[str, float]:
    times, right = [], 0
    for key, value in keys.items():
        peer = rng.choice(live)
        begun = time.perf_counter()
        got = peer.get(key)
        times.append(time.perf_counter() - begun)
        right += got is not None and got.value == value
    return {"get_success": right / len(keys), **describe("get", times)}


def describe(name: str, times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        f"{name}_p50_ms": round(statistics.median(ordered) * 1000, 2),
        f"{name}_p99_ms": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1000, 2),
        f"{name}_max_ms": round(ordered[-1] * 1000, 2),
    }


def get_memory(pid: int) -> int:
    process = psutil.Process(pid)
    return sum(some.memory_info().rss for some in (process, *process.children(recursive=True)))


def kill(peer: hivemind.DHT) -> None:
    if not peer.pid or not psutil.pid_exists(peer.pid):
        return
    process = psutil.Process(peer.pid)
    for some in (*process.children(recursive=True), process):
        try:
            some.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    sys.exit(main())
