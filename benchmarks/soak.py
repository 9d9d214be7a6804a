"""A swarm under a nemesis: real processes, answers compared token by token with the reference, leaks looked for.

One ``join``; hosts in pairs, each pair holding the same part of the model's layers; requesters that ask without end.
Every interval the nemesis kills (SIGKILL), freezes (SIGSTOP, later SIGCONT) or restarts (SIGTERM) one host, and waits
until that host serves again before it chooses the next. So one replica of every layer is always up, unless
``--both-replicas`` lets it choose a twin too. The last requester is a fresh ``infer`` process on a node of its own
every time; the others attach to the ``join`` node, which lives as long as the run.

    python -m benchmarks.soak --minutes 30 --hosts 4 --requesters 3 --seed 0

Exits non-zero on a wrong answer, a leak (see ``LEAKS``), an unexpected log line, an unexpected end of a process, an
unexpected cause of a refusal, or no answer at all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.swarm import Log, Node, Sample, ask

SAMPLE_S = 15.0  # between two looks at every process
ANSWER_S = 180.0  # an `infer` that takes longer hangs
FROZEN_S = (3.0, 12.0)  # how long a host is frozen: below and above the 10 s that a call may take
DOWN_S = (1.0, 6.0)  # until a killed host is started again
WARM_SHARE = 0.1  # of the run is left out at its beginning: models are being loaded
WINDOW_SHARE = 0.2  # of the run at its start, middle and end is looked at for leaks
REFUSALS = {"no_peer", "unreachable", "busy", "deadline_exceeded", "connection_lost"}  # what faults of hosts may cause

# From the middle of the run to its end, medians of one process (a restarted host: of its incarnations). What caches
# and the allocator still take after half of the run is below these; a leak of 1 % of an answer's tensors is not.
LEAKS: dict[str, tuple[float, float]] = {  # what: (share, amount) that it may grow by
    "rss_bytes": (0.10, 32e6),
    "files": (0.0, 16),  # connections of hosts that were replaced may still be closing
    "threads": (0.0, 8),
    "tasks": (0.0, 32),  # a few of each connection
}

PROMPTS: list[dict[str, Any]] = [
    {"prompt": "Explain what a distributed hash table is.", "max_tokens": 24},
    {"prompt": "What is the capital of France?", "max_tokens": 16},
    {"prompt": "Write a short poem about the sea.", "max_tokens": 32, "system": "You are a poet."},
    {"prompt": "def fibonacci(n):", "max_tokens": 20, "raw": True},
    {"prompt": "Übersetze ins Deutsche: The weather is nice today. 🌞", "max_tokens": 16},
    {"prompt": "Repeat after me: " + "one two three four five six seven eight nine ten. " * 12, "max_tokens": 12},
    {"prompt": "The quick brown fox", "max_tokens": 8, "raw": True},
]


class Expected(NamedTuple):
    """transformers' own greedy answer."""

    text: str
    tokens: int


class Tally:
    """What the requesters met. Guarded by ``lock``."""

    def __init__(self, requesters: int) -> None:
        self.lock = threading.Lock()
        self.right = [0] * requesters
        self.tokens = 0
        self.retries = 0
        self.refused: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.broken: list[str] = []  # hangs, crashes, unknown causes
        self.seconds: list[float] = []


def get_references(prompts: list[dict[str, Any]]) -> list[Expected]:
    """The greedy answers of transformers on the same weights, in this process."""
    import torch

    from daaswarm.config import get_cache_dir
    from daaswarm.models.sources import DEFAULT_MODEL, find_model
    from daaswarm.models.trunk import load_reference, load_tokenizer

    model = find_model(DEFAULT_MODEL, get_cache_dir())
    reference: Any = load_reference(model, "f32")
    tokenizer: Any = load_tokenizer(model)
    answers: list[Expected] = []
    for prompt in prompts:
        if prompt.get("raw"):
            inputs = tokenizer(prompt["prompt"], return_tensors="pt")
        else:
            turns = [{"role": "user", "content": prompt["prompt"]}]
            if "system" in prompt:
                turns.insert(0, {"role": "system", "content": prompt["system"]})
            inputs = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        with torch.inference_mode():
            made = reference.generate(
                inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=prompt["max_tokens"],
                do_sample=False,
            )
        ids = made[0, inputs["input_ids"].shape[1] :]
        answers.append(Expected(tokenizer.decode(ids, skip_special_tokens=True), len(ids)))
    return answers


def get_layers(pairs: int) -> list[str]:
    """The model's layers in ``pairs`` ranges, as ``--layers`` takes them."""
    from daaswarm.config import get_cache_dir
    from daaswarm.models.sources import DEFAULT_MODEL, find_model

    count = len(find_model(DEFAULT_MODEL, get_cache_dir()).layers)
    bounds = [count * i // pairs for i in range(pairs + 1)]
    return [f"{first}-{last - 1}" for first, last in itertools.pairwise(bounds)]


def keep_asking(
    number: int, attach_to: Path | None, folder: Path, bootstrap: str, answers: list[Expected], run: Run
) -> None:
    """One requester: prompts in an order of its own until the run ends."""
    rng = random.Random(f"{run.seed}/{number}")
    where = ["--data-dir", str(attach_to or folder)]
    if attach_to is None:
        where += ["--bootstrap", bootstrap]
    while not run.over.is_set():
        which = rng.randrange(len(PROMPTS))
        prompt, expected = PROMPTS[which], answers[which]
        options = ["--temperature", "0", "--max-tokens", str(prompt["max_tokens"])]
        options += ["--system", prompt["system"]] if "system" in prompt else []
        options += ["--raw"] if prompt.get("raw") else []
        begin = time.monotonic()
        done = ask("infer", prompt["prompt"], *options, *where, timeout_s=ANSWER_S)
        judge(run.tally, number, which, done.code, done.result, expected, time.monotonic() - begin)
        with run.tally.lock:
            for line in done.errors.splitlines():
                run.asking.add(line)
        run.over.wait(rng.uniform(0, 0.5))


def judge(
    tally: Tally, number: int, which: int, code: int, result: dict[str, Any], expected: Expected, seconds: float
) -> None:
    """Count one answer: right, refused for a cause that faults of hosts explain, wrong, or broken."""
    label = f"requester {number}, prompt {which}"
    with tally.lock:
        if code == 0:
            if (result.get("text"), result.get("completion_tokens")) != expected:
                tally.wrong.append(f"{label}: {json.dumps(result)[:2000]} instead of {expected}")
                return
            tally.right[number] += 1
            tally.tokens += expected.tokens
            tally.retries += result["retries"]
            tally.seconds.append(seconds)
            return
        error = result.get("error", {})
        cause = error.get("code", "nothing said")
        tally.refused[cause] += 1
        if not expected.text.startswith(result.get("text", "")):
            tally.wrong.append(f"{label}: {result['text']!r} is no beginning of {expected.text!r}")
        if code == -1:
            tally.broken.append(f"{label}: no end within {ANSWER_S:g} s")
        elif cause not in REFUSALS or "internal error" in error.get("message", ""):
            tally.broken.append(f"{label}: code {code}, {json.dumps(result)[:1000]}")


class Run(NamedTuple):
    """What all threads of a run share."""

    seed: int
    minutes: float
    every_s: float
    both_replicas: bool
    over: threading.Event
    tally: Tally
    asking: Log


def disturb(hosts: list[Node], run: Run, deeds: Counter[str], recoveries: list[float]) -> None:
    """The nemesis. With ``both_replicas`` it doesn't wait for a host to be back, so that a twin may be next."""
    rng = random.Random(run.seed)
    mending: list[threading.Thread] = []
    begin = time.monotonic()
    while not run.over.wait(max(0.0, run.every_s - (time.monotonic() - begin))):
        begin = time.monotonic()
        mending = [thread for thread in mending if thread.is_alive()]
        idle = [host for host in hosts if not any(thread.name == host.name for thread in mending)]
        if not idle:
            continue
        host, deed = rng.choice(idle), rng.choice(["kill", "freeze", "restart"])
        down_s = rng.uniform(*(FROZEN_S if deed == "freeze" else DOWN_S))
        deeds[deed] += 1
        print(f"nemesis: {deed} {host.name} ({down_s:.1f} s)", file=sys.stderr, flush=True)
        thread = threading.Thread(target=hurt, name=host.name, args=(host, deed, down_s, recoveries))
        thread.start()
        mending.append(thread)
        if not run.both_replicas:
            thread.join()
    for thread in mending:
        thread.join()


def hurt(host: Node, deed: str, down_s: float, recoveries: list[float]) -> None:
    """Do it to one host, and undo it."""
    try:
        if deed == "freeze":
            host.freeze()
            time.sleep(down_s)
            host.thaw()
            return
        if deed == "kill":
            host.kill()
        else:
            host.stop()
        time.sleep(down_s)
        host.start()
        recoveries.append(host.wait_ready())
    except RuntimeError as error:
        host.faults.append(str(error))


def watch(nodes: list[Node], run: Run, samples: dict[str, list[tuple[float, Sample]]]) -> None:
    """Look at every process now and then; the times are shares of the run."""
    begin = time.monotonic()
    while True:
        for node in nodes:
            sample = node.sample()
            if sample is not None:
                samples[node.name].append(((time.monotonic() - begin) / (run.minutes * 60), sample))
        if run.over.wait(SAMPLE_S):
            return


def get_medians(samples: list[tuple[float, Sample]]) -> dict[str, list[float]]:
    """``{what: [start, middle, end]}``; empty where a window has no sample."""
    half = WINDOW_SHARE / 2
    windows = [(WARM_SHARE, WARM_SHARE + WINDOW_SHARE), (0.5 - half, 0.5 + half), (1 - WINDOW_SHARE, 10.0)]
    parts = [[sample for at, sample in samples if low <= at <= high] for low, high in windows]
    if not all(parts):
        return {}
    return {what: [statistics.median(getattr(s, what) for s in part) for part in parts] for what in Sample._fields}


def find_leaks(name: str, medians: dict[str, list[float]]) -> list[str]:
    """What grew from the middle of the run to its end by more than :data:`LEAKS` says."""
    found: list[str] = []
    for what, (share, amount) in LEAKS.items():
        _, middle, end = medians[what]
        if end > middle * (1 + share) + amount:
            found.append(f"{name}: {what} grew from {middle:.0f} to {end:.0f}")
    return found


def soak(run: Run, host_count: int, requesters: int, folder: Path) -> dict[str, Any]:
    """The whole run; its report."""
    from daaswarm.models.sources import DEFAULT_MODEL

    answers = get_references(PROMPTS)
    layers = get_layers(host_count // 2)
    joined = Node("join", folder / "join", "join")
    hosts: list[Node] = []
    nodes = [joined]
    samples: dict[str, list[tuple[float, Sample]]] = {}
    deeds: Counter[str] = Counter()
    recoveries: list[float] = []
    try:
        joined.start()
        joined.wait_ready()
        bootstrap = joined.addrs[0]
        for number in range(host_count):
            held = layers[number // 2]
            options = [DEFAULT_MODEL, "--layers", held, "--bootstrap", bootstrap]
            hosts.append(Node(f"host{number} ({held})", folder / f"host{number}", "host-expert", *options))
        for host in hosts:
            host.start()
            nodes.append(host)
        for host in hosts:
            host.wait_ready()
        samples.update({node.name: [] for node in nodes})
        threads = [
            threading.Thread(target=disturb, args=(hosts, run, deeds, recoveries)),
            threading.Thread(target=watch, args=(nodes, run, samples)),
        ]
        for number in range(requesters):
            is_last = requesters > 1 and number == requesters - 1
            attach_to = None if is_last else joined.folder
            arguments = (number, attach_to, folder / f"ask{number}", bootstrap, answers, run)
            threads.append(threading.Thread(target=keep_asking, args=arguments))
        for thread in threads:
            thread.start()
        try:
            run.over.wait(run.minutes * 60)
        finally:
            run.over.set()
            for thread in threads:
                thread.join()
    finally:
        for node in reversed(nodes):
            node.stop()
    return report(run, nodes, samples, deeds, recoveries)


def report(
    run: Run,
    nodes: list[Node],
    samples: dict[str, list[tuple[float, Sample]]],
    deeds: Counter[str],
    recoveries: list[float],
) -> dict[str, Any]:
    tally = run.tally
    processes = {name: get_medians(some) for name, some in samples.items()}
    problems = [*tally.wrong, *tally.broken]
    for node in nodes:
        problems += [*node.log.unexpected, *node.faults]
    problems += run.asking.unexpected
    for name, medians in processes.items():
        if medians:
            problems += find_leaks(name, medians)
        elif name == nodes[0].name:  # a host may have been down for all of a window; this one never is
            problems.append(f"{name}: too few samples; run it for longer")
    problems += [f"requester {number} got no answer" for number, count in enumerate(tally.right) if not count]
    return {
        "minutes": run.minutes,
        "seed": run.seed,
        "right": sum(tally.right),
        "right_by_requester": tally.right,
        "tokens": tally.tokens,
        "retries": tally.retries,
        "wrong": len(tally.wrong),
        "refused": dict(tally.refused),
        "answer_s": {
            "p50": round(statistics.median(tally.seconds), 2) if tally.seconds else None,
            "max": round(max(tally.seconds), 2) if tally.seconds else None,
        },
        "nemesis": dict(deeds),
        "recovery_s": {
            "p50": round(statistics.median(recoveries), 2) if recoveries else None,
            "max": round(max(recoveries), 2) if recoveries else None,
        },
        "processes": processes,
        "starts": {node.name: node.starts for node in nodes},
        "warnings": {log.name: log.warnings for log in (*(node.log for node in nodes), run.asking)},
        "problems": problems,
    }


def show(result: dict[str, Any]) -> None:
    """The table for people, on standard error; the JSON goes to standard output."""
    lines = [f"{'process':<16} {'what':<10} {'start':>12} {'middle':>12} {'end':>12}"]
    for name, medians in result["processes"].items():
        for what, values in medians.items():
            lines.append(f"{name:<16} {what:<10} " + " ".join(f"{value:>12,.0f}" for value in values))
    lines.append(
        f"{result['right']} right answers ({result['tokens']} tokens, {result['retries']} retries), "
        f"{result['wrong']} wrong; refused: {result['refused'] or 'none'}; nemesis: {result['nemesis']}"
    )
    lines += [f"problem: {problem}" for problem in result["problems"]]
    print("\n".join(lines), file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--hosts", type=int, default=4, help="an even number: pairs hold the same layers")
    parser.add_argument("--requesters", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two deeds of the nemesis")
    parser.add_argument("--both-replicas", action="store_true", help="let it disturb both hosts of a pair")
    arguments = parser.parse_args()
    if arguments.hosts < 2 or arguments.hosts % 2 or arguments.requesters < 1:
        parser.error("hosts come in pairs, and there is at least one requester")
    run = Run(
        arguments.seed,
        arguments.minutes,
        arguments.every,
        arguments.both_replicas,
        threading.Event(),
        Tally(arguments.requesters),
        Log("infer"),
    )
    with tempfile.TemporaryDirectory(prefix="daaswarm-soak-") as folder:
        result = soak(run, arguments.hosts, arguments.requesters, Path(folder))
    show(result)
    print(json.dumps(result))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
