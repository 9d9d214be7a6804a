"""``bench generate``: tokens a second of one answer, and of several that share passes, on hosts of this machine.

All answers have as many tokens, so that they run together from the first to the last one. The two are measured in turn.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import trio

from daaswarm.config import Config
from daaswarm.core.verify import Verify
from daaswarm.inference.embedded import run_embedded_hosts
from daaswarm.inference.prompt import Prompt, encode_prompt
from daaswarm.inference.requester import Way, describe_audits
from daaswarm.inference.sequence import Sampling, Sequence
from daaswarm.inference.use import AuditUse
from daaswarm.node.life import open_node
from daaswarm.node.reporting import Emit, get_model
from daaswarm.store.data_dir import DataDir
from daaswarm.types import Codec

PROMPTS = ("Write a story about a lighthouse.", "Explain how rain forms.", "What is a hash table?", "Describe Rome.")
REPEATS = 3


async def run_generate(
    data_dir: DataDir,
    config: Config,
    name: str,
    *,
    hosts: int,
    answers: int,
    tokens: int,
    dtype: Any,
    codec: Codec,
    verify: Verify,
    emit: Emit,
) -> dict[str, Any]:
    """Args:
        answers: at once, beside one.
        tokens: of each answer.

    Raises:
        ModelError: the model can't be used, or has no tokenizer.
    """
    async with open_node(data_dir, config, listen=True, libp2p=False) as node:
        cores = torch.get_num_threads()
        model = await get_model(name, emit)
        await emit({"event": "message", "text": f"starting {hosts} hosts for {model.name} …"})
        embedded = run_embedded_hosts(
            str(model.folder),
            model.kind,
            model.layers,
            count=hosts,
            bootstrap=node.addrs,
            swarm=config.network.swarm,
            swarm_key=node.network.identity.swarm_key,
            dtype=dtype,
            across=False,
            threads=config.host.threads or max(1, cores // hosts),
        )
        async with embedded:
            requester = await node.answering.get_requester()
            plan = await node.answering.find_hosts(model, dtype)
            plan.check_complete(model.name)
            await node.answering.connect_hosts(plan)
            trunk = await requester.load(model, dtype, lambda what, done, total: None)
            prompts = [
                encode_prompt(Prompt(PROMPTS[n % len(PROMPTS)]), trunk.tokenizer, model.name) for n in range(answers)
            ]
            latencies: list[float] = []
            audits = AuditUse()

            async def run(count: int) -> tuple[float, float]:
                """Tokens a second of all, and seconds to the first token of the last to have one."""
                sampling = Sampling(max_tokens=tokens, min_tokens=tokens)
                sequences = [Sequence(trunk.model, model.name, list(ids), sampling) for ids in prompts[:count]]
                started = time.perf_counter()
                async with trio.open_nursery() as nursery:
                    for sequence in sequences:
                        nursery.start_soon(requester.complete, model, trunk, plan, sequence, Way(codec, verify))
                seconds = time.perf_counter() - started
                for sequence in sequences:
                    if sequence.error is not None:
                        raise sequence.error
                audits.add(sequences[0].audits)
                if count == 1:
                    latencies.extend(each for use in sequences[0].hosts.values() for each in use.latencies_s)
                trunk.forget()
                return count * tokens / seconds, max(s.first_token_at or 0.0 for s in sequences) - started

            await run(1)  # threads and kernels are chosen
            latencies.clear()
            alone, together = [], []
            for done in range(REPEATS):
                await emit({"event": "progress", "what": "measuring", "done": done, "total": REPEATS})
                alone.append(await run(1))
                together.append(await run(answers) if answers > 1 else alone[-1])
            await emit({"event": "progress", "what": "measuring", "done": REPEATS, "total": REPEATS})
    ratios = [many[0] / one[0] for one, many in zip(alone, together, strict=True)]
    return {
        "model": model.name,
        "model_root": model.root,
        "dtype": dtype,
        "codec": codec,
        "hosts": hosts,
        "answers": answers,
        "tokens": tokens,
        "tokens_per_s": _summarise([rate for rate, _ in alone]),
        "first_token_s": _summarise([first for _, first in alone]),
        "call_p50_ms": round(statistics.median(latencies) * 1e3, 3),
        "together_tokens_per_s": _summarise([rate for rate, _ in together]),
        "together_first_token_s": _summarise([first for _, first in together]),
        "together_ratio": _summarise(ratios),
        "verify": describe_audits(verify, audits),
    }


def _summarise(values: list[float]) -> dict[str, float]:
    return {
        "min": round(min(values), 3),
        "median": round(statistics.median(values), 3),
        "max": round(max(values), 3),
    }
