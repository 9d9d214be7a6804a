"""Several ``infer`` at once on one node: are all right, how much faster are they together, how long does each wait?

Real processes on loopback: one ``join``, two hosts with half of the default model each, and commands that attach to
the node. The same prompts are first asked one after another, which gives the reference texts and the speed alone. The
node is restarted before each round, so that none begins with keys and values of the one before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks.swarm import Done, Node, ask

ANSWER_S = 300.0
PROMPTS = [
    "What is the capital of France?",
    "Explain what a distributed hash table is.",
    "Write a short poem about the sea.",
    "Name three animals that can fly.",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "What is a prime number?",
    "Tell me about the planet Mars.",
    "What does a compiler do?",
    "Who wrote Romeo and Juliet?",
]


def ask_node(node: Node, prompt: str, tokens: int) -> Done:
    arguments = ("infer", prompt, "--max-tokens", str(tokens), "--temperature", "0", "--data-dir", str(node.folder))
    return ask(*arguments, timeout_s=ANSWER_S)


def ask_all(node: Node, prompts: list[str], tokens: int) -> list[Done]:
    """All at the same time."""
    done: dict[int, Done] = {}
    threads = [
        threading.Thread(target=lambda i=i, prompt=prompt: done.__setitem__(i, ask_node(node, prompt, tokens)))
        for i, prompt in enumerate(prompts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [done[i] for i in range(len(prompts))]


def check(answers: list[Done]) -> list[dict[str, Any]]:
    for answer in answers:
        if answer.code:
            sys.exit(f"an answer failed with code {answer.code}: {answer.result} {answer.errors[-1000:]}")
    return [answer.result for answer in answers]


def get_rate(answers: list[dict[str, Any]]) -> float:
    """Tokens per second of all together, by the slowest's time (measured in the node)."""
    tokens = sum(answer["completion_tokens"] for answer in answers)
    return tokens / max(answer["completion_tokens"] / answer["tokens_per_s"] for answer in answers)


def measure(node: Node, count: int, tokens: int, repeats: int) -> dict[str, Any]:
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    alone = check([ask_node(node, prompt, tokens) for prompt in prompts])
    rate_alone = statistics.median(answer["tokens_per_s"] for answer in alone)
    first_alone = statistics.median(answer["time_to_first_token_s"] for answer in alone)
    rounds: list[list[dict[str, Any]]] = []
    for _ in range(repeats):
        restart(node)
        rounds.append(check(ask_all(node, prompts, tokens)))
    firsts = [answer["time_to_first_token_s"] for answers in rounds for answer in answers]
    rates = [get_rate(answers) / rate_alone for answers in rounds]
    return {
        "answers": count,
        "all_right": all([a["text"] for a in answers] == [a["text"] for a in alone] for answers in rounds),
        "tokens_per_s_alone": round(rate_alone, 2),
        "rate_ratio": round(statistics.median(rates), 2),
        "rate_ratio_min": round(min(rates), 2),
        "rate_ratio_max": round(max(rates), 2),
        "first_token_s_alone": round(first_alone, 3),
        "first_token_s_median": round(statistics.median(firsts), 3),
        "first_token_s_max": round(max(firsts), 3),
        "first_token_ratio": round(max(firsts) / first_alone, 2),
        "first_token_spread": round(max(max(f) / min(f) for f in get_firsts(rounds)), 2),
    }


def restart(node: Node) -> None:
    """Forget earlier answers; the trunk is loaded again."""
    node.stop()
    node.start()
    node.wait_ready()
    check([ask_node(node, "x", 2)])


def get_firsts(rounds: list[list[dict[str, Any]]]) -> list[list[float]]:
    return [[answer["time_to_first_token_s"] for answer in answers] for answers in rounds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="daaswarm-answers-") as folder:
        node = Node("node", Path(folder) / "node", "join")
        nodes = [node]
        try:
            node.start()
            node.wait_ready()
            node.arguments = ("join", "--listen", node.addrs[0].split("/p2p/")[0])  # the hosts find it there again
            for layers in ("0-14", "15-29"):
                bootstrap = ("--bootstrap", node.addrs[0])
                model = "smollm2-135m-instruct"
                host = Node(layers, Path(folder) / layers, "host-expert", model, "--layers", layers, *bootstrap)
                nodes.append(host)
                host.start()
            for host in nodes[1:]:
                host.wait_ready()
            restart(node)
            print(json.dumps(measure(node, options.answers, options.tokens, options.repeats)))
        finally:
            for each in reversed(nodes):
                each.stop()


if __name__ == "__main__":
    main()
