"""Answers that share passes, beside one alone: equally long ones on one requester and two host processes.

    python -m benchmarks.shared_passes [--answers 4] [--tokens 48] [--repeats 3]

``benchmarks.answers`` asks through commands, whose answers end when the model says so, at different times; here each
has as many tokens, so that all of them run from the first to the last one. One line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import torch
import trio

from benchmarks.prompt_lookup import summarise
from daaswarm.config import Config
from daaswarm.inference.embedded import run_embedded_hosts
from daaswarm.inference.prompt import Prompt, encode_prompt
from daaswarm.inference.sequence import Sampling, Sequence
from daaswarm.node.life import open_node
from daaswarm.node.reporting import get_model
from daaswarm.store.data_dir import DataDir

MODEL = "default"
HOSTS = 2
PROMPTS = ("Write a story about a lighthouse.", "Explain how rain forms.", "What is a hash table?", "Describe Rome.")


async def ignore(event: dict[str, Any]) -> None:
    del event


async def measure(folder: Path, answers: int, tokens: int, repeats: int) -> dict[str, Any]:
    config = Config()
    async with open_node(DataDir(folder), config, listen=True, libp2p=False) as node, AsyncExitStack() as stack:
        model = await get_model(MODEL, ignore)
        hosts = run_embedded_hosts(
            str(model.folder),
            model.kind,
            model.layers,
            count=HOSTS,
            bootstrap=node.addrs,
            swarm=config.network.swarm,
            swarm_key=None,
            dtype="f32",
            across=False,
            threads=1,
        )
        await stack.enter_async_context(hosts)
        requester = await node.answering.get_requester()
        torch.set_num_threads(1)
        plan = await node.answering.find_hosts(model, "f32")
        await node.answering.connect_hosts(plan)
        trunk = await requester.load(model, "f32", lambda what, done, total: None)
        prompts = [
            encode_prompt(Prompt(PROMPTS[n % len(PROMPTS)]), trunk.tokenizer, model.name) for n in range(answers)
        ]

        async def run(count: int) -> float:
            """Tokens a second of all."""
            sampling = Sampling(max_tokens=tokens, min_tokens=tokens)
            sequences = [Sequence(trunk.model, model.name, list(ids), sampling) for ids in prompts[:count]]
            started = time.perf_counter()
            async with trio.open_nursery() as nursery:
                for sequence in sequences:
                    nursery.start_soon(requester.complete, model, trunk, plan, sequence)
            seconds = time.perf_counter() - started
            if any(sequence.error is not None for sequence in sequences):
                raise RuntimeError("an answer failed")
            trunk.forget()
            return count * tokens / seconds

        await run(1)
        rates = [(await run(1), await run(answers)) for _ in range(repeats)]
    return {
        "answers": answers,
        "tokens": tokens,
        "tokens_per_s_alone": summarise([alone for alone, _ in rates]),
        "tokens_per_s_together": summarise([together for _, together in rates]),
        "ratio": summarise([together / alone for alone, together in rates]),
        "load": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--answers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(trio.run(measure, Path(folder), options.answers, options.tokens, options.repeats)))


if __name__ == "__main__":
    main()
