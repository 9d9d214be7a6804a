"""Requests to hivemind's ``RemoteMixtureOfExperts``, as ``daaswarm bench moe`` makes them, before and after hosts go.

Runs in hivemind's own environment (``install.sh``), started by ``benchmarks/beside_hivemind.py``. Each host is a group
of processes of its own; an expert is on one host, since hivemind knows no replicas. One line of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from typing import Any

import serving

PREFIX = "g."
WAVE = 3  # hosts started at the same time
READY_S = 100.0
STARTS = 3  # of one host: hivemind 1.1.12 sometimes hangs at start
VISIBLE_S = 30.0  # until the DHT knows all experts
FORWARD_S = 5.0  # a request's deadline, and
AFTER_K_MIN_S = 1.0  # how long it waits for the rest once one expert has answered
HANG_S = 12.0  # then a request counts as failed, and the phase ends
WARM_CALLS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", default="", help="names of experts, with commas between")
    parser.add_argument("--peers", default="[]")
    parser.add_argument("--hosts", type=int, default=10)
    parser.add_argument("--grid", default="4x5", help="experts, as hivemind names them")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--dim", type=int, default=576)
    parser.add_argument("--dead", type=float, default=0.3)
    parser.add_argument("--how", choices=("kill", "stop"), default="kill")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--handlers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.serve:
        kinds = dict.fromkeys(arguments.serve.split(","), "ffn")
        serving.serve(kinds, arguments.dim, arguments.handlers, arguments.threads, json.loads(arguments.peers))
        return
    hosts: list[subprocess.Popen[str]] = []
    code = 1
    try:
        print(json.dumps(measure(arguments, hosts)), flush=True)
        code = 0
    except BaseException:  # noqa: BLE001 - nothing may stay behind, whatever it is
        traceback.print_exc()
    for host in hosts:
        serving.stop(host)
    serving.leave(code)


def measure(arguments: argparse.Namespace, hosts: list[subprocess.Popen[str]]) -> dict[str, Any]:
    width, height = map(int, arguments.grid.split("x"))
    names = [f"{PREFIX}{i}.{j}" for i in range(width) for j in range(height)]
    addrs = start_hosts(arguments, names, hosts)
    import hivemind
    import torch
    from hivemind.moe import RemoteMixtureOfExperts, get_experts

    torch.manual_seed(arguments.seed)
    dht = hivemind.DHT(initial_peers=addrs, start=True, startup_timeout=60)
    mixture = RemoteMixtureOfExperts(
        in_features=arguments.dim,
        grid_size=(width, height),
        dht=dht,
        uid_prefix=PREFIX,
        k_best=arguments.k,
        k_min=1,
        forward_timeout=FORWARD_S,
        timeout_after_k_min=AFTER_K_MIN_S,
    )
    until = time.perf_counter() + VISIBLE_S
    while not all(get_experts(dht, names)) and time.perf_counter() < until:
        time.sleep(0.5)
    for _ in range(WARM_CALLS):
        with torch.no_grad():
            mixture(torch.randn(1, arguments.dim))
    result: dict[str, Any] = {"healthy": run_phase(mixture, arguments)}
    rng = random.Random(arguments.seed)
    victims = rng.sample(hosts[1:], round(arguments.dead * len(hosts)))  # the first is everybody's bootstrap peer
    for victim in victims:
        os.killpg(victim.pid, signal.SIGKILL if arguments.how == "kill" else signal.SIGSTOP)
    return {**result, "gone": len(victims), "after": run_phase(mixture, arguments)}


def run_phase(mixture: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """One request after the other. Experts that don't answer are missing in the sum, which hivemind doesn't tell."""
    import torch

    latencies: list[float] = []
    errors: dict[str, int] = {}
    hung = False
    until = time.perf_counter() + arguments.seconds
    while time.perf_counter() < until and not hung:
        rows = torch.randn(1, arguments.dim)
        said: list[str] = []

        def ask(rows: Any = rows, said: list[str] = said) -> None:
            try:
                with torch.no_grad():
                    answer = mixture(rows)
                said.append("" if bool(torch.isfinite(answer).all()) else "not finite")
            except Exception as error:  # noqa: BLE001 - whatever it is, it is counted
                said.append(type(error).__name__)

        started = time.perf_counter()
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(HANG_S)
        latencies.append(time.perf_counter() - started)
        hung = not said
        if problem := "hung" if hung else said[0]:
            errors[problem] = errors.get(problem, 0) + 1
    ordered = sorted(latencies)
    return {
        "calls": len(ordered),
        "failed": sum(errors.values()),
        "errors": errors,
        "calls_per_s": round(len(ordered) / sum(ordered), 1),
        "first_ms": round(latencies[0] * 1000, 3),
        "p50_ms": round(statistics.median(ordered) * 1000, 3),
        "p99_ms": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1000, 3),
        "max_ms": round(ordered[-1] * 1000, 3),
    }


def start_hosts(arguments: argparse.Namespace, names: list[str], hosts: list[subprocess.Popen[str]]) -> list[str]:
    """All of them, in waves; those that hang are started again. Returns the first one's addresses."""
    addrs: list[str] = []

    def start(number: int) -> subprocess.Popen[str]:
        options = ["--serve", ",".join(names[number :: arguments.hosts]), "--peers", json.dumps(addrs)]
        options += ["--dim", f"{arguments.dim}", "--handlers", f"{arguments.handlers}"]
        return serving.start(__file__, *options, "--threads", f"{arguments.threads}")

    while len(hosts) < arguments.hosts:
        begin = len(hosts)
        hosts += [start(n) for n in range(begin, min(begin + (WAVE if begin else 1), arguments.hosts))]
        for number in range(begin, len(hosts)):
            for _ in range(STARTS):
                if ready := wait_ready(hosts[number]):
                    addrs = addrs or ready["addrs"]
                    break
                serving.stop(hosts[number])
                hosts[number] = start(number)
            else:
                sys.exit("a host of hivemind didn't start")
    return addrs


def wait_ready(host: subprocess.Popen[str]) -> dict[str, Any] | None:
    assert host.stdout is not None
    if not select.select([host.stdout], [], [], READY_S)[0]:
        return None
    line = host.stdout.readline()
    return json.loads(line) if line else None


if __name__ == "__main__":
    main()
