"""What prompt lookup is worth at a round trip: an answer that repeats its prompt, and one that doesn't.

    python -m benchmarks.prompt_lookup [--round-trip-ms 20] [--rounds 3] [--tokens 64]

Two real hosts with half of the default model each, behind relays that hold every byte back. Each prompt is asked with
and without it in turn. One JSON line for each prompt: tokens a second, min / median / max, their ratio within a round,
and whether the texts are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.plan_against_infer import COMMAND_S, MODEL, PARTS, Relay, free_port, get_environment
from benchmarks.swarm import Node, get_command

TEXT = (
    "The harbour master keeps a list of every boat: the Anna is green, the Berta is blue, the Clara is white, the Dora "
    "is red, the Emma is yellow, the Frieda is black, and the Greta has no paint at all."
)
PROMPTS = {
    "repeats its prompt": f"Repeat this text, word for word, and nothing else: {TEXT}",
    "does not": "Invent a short story about a clockmaker who finds a door in the sea.",
}


def ask(prompt: str, tokens: int, folder: Path, address: str, *, lookup: bool) -> dict[str, Any]:
    """The result of one ``infer`` of a node of its own."""
    environment = get_environment() | {"DAASWARM_INFER_PROMPT_LOOKUP": str(lookup).lower()}
    command = get_command(
        *("infer", prompt, "--model", MODEL, "--max-tokens", str(tokens), "--bootstrap", address, "--force"),
        *("--data-dir", str(folder)),
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, env=environment)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--round-trip-ms", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        addresses: list[str] = []
        for number, layers in enumerate(PARTS):
            port = free_port()
            relay = Relay(port, options.round_trip_ms / 2e3)
            node = Node(
                f"host{number}",
                Path(folder) / f"host{number}",
                *("host-expert", MODEL, "--layers", layers, "--listen", f"/ip4/127.0.0.1/tcp/{port}"),
                *("--announce", f"/ip4/127.0.0.1/tcp/{relay.port}"),
                *(part for address in addresses[:1] for part in ("--bootstrap", address)),
            )
            node.start()
            stack.callback(node.stop)
            node.wait_ready()
            addresses.append(node.addrs[0])
        for what, prompt in PROMPTS.items():
            speeds: dict[bool, list[float]] = {True: [], False: []}
            answers: dict[bool, dict[str, Any]] = {}
            for number in range(options.rounds):
                for lookup in (True, False) if number % 2 else (False, True):
                    asker = Path(folder) / "asker"
                    answers[lookup] = ask(prompt, options.tokens, asker, addresses[0], lookup=lookup)
                    speeds[lookup].append(decode_speed(answers[lookup]))
            ratios = sorted(on / off for on, off in zip(speeds[True], speeds[False], strict=True))
            line = {
                "answer": what,
                "round_trip_ms": options.round_trip_ms,
                "with": summarise(speeds[True]),
                "without": summarise(speeds[False]),
                "ratio": summarise(ratios),
                "same_text": answers[True]["text"] == answers[False]["text"],
                "guessed": answers[True]["guessed_tokens"],
                "right": answers[True]["right_tokens"],
                "load": round(os.getloadavg()[0], 2),
            }
            print(json.dumps(line), flush=True)


def decode_speed(answer: dict[str, Any]) -> float:
    """Tokens a second after the first: reading the prompt is the same with and without."""
    tokens = answer["completion_tokens"]
    return (tokens - 1) / (tokens / answer["tokens_per_s"] - answer["time_to_first_token_s"])


def summarise(values: list[float]) -> list[float]:
    return [round(value, 3) for value in (min(values), statistics.median(values), max(values))]


if __name__ == "__main__":
    main()
