"""``bench parity``: is a model with its experts on several hosts the same model, and how fast beside the whole one?

Real host processes, real sockets. Both models generate greedily from the same prompt, in turn, so that the ratio of
their speeds is one of the same minute on the same machine.
"""

from __future__ import annotations

import itertools
import statistics
import time
from contextlib import AsyncExitStack
from typing import Any

import torch
import trio

from daaswarm.config import Config
from daaswarm.core.verify import OFF, Verify
from daaswarm.inference.embedded import run_embedded_hosts
from daaswarm.inference.prompt import Prompt, encode_prompt
from daaswarm.inference.requester import Way, describe_audits
from daaswarm.inference.sequence import Sampling, Sequence, get_pad_token
from daaswarm.inference.use import AuditUse, HostUse
from daaswarm.models.sources import LocalModel
from daaswarm.models.trunk import load_reference, load_tokenizer
from daaswarm.node.life import open_node
from daaswarm.node.reporting import Emit, get_model
from daaswarm.store.data_dir import DataDir
from daaswarm.types import Codec, PeerId

PROMPT = "Explain what a distributed hash table is."
RANDOM_PROMPT_TOKENS = 16  # for a checkpoint without a tokenizer
REPEATS = 3  # of each model, interleaved; the ratio is the median of the pairs'


def encode(model: LocalModel, vocabulary: int, prompt: str) -> list[int]:
    """The prompt's tokens, or random ones of a fixed seed where there is no tokenizer."""
    tokenizer = load_tokenizer(model)
    if tokenizer is not None:
        return encode_prompt(Prompt(prompt), tokenizer, model.name)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (RANDOM_PROMPT_TOKENS,), generator=generator).tolist()


def generate(model: Any, ids: list[int], tokens: int) -> tuple[list[int], Any, float]:
    """Exactly ``tokens`` greedy tokens by transformers alone; (token ids, per-step logits, seconds)."""
    prompt = torch.tensor([ids])
    started = time.perf_counter()
    with torch.inference_mode():
        made = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=get_pad_token(model),
            return_dict_in_generate=True,
            output_logits=True,
        )
    seconds = time.perf_counter() - started
    return made.sequences[0, len(ids) :].tolist(), made.logits, seconds


def compare_choices(reference: Any, trunk: Any, ids: list[int], first: int) -> tuple[float, float]:
    """Both models read the same text in one pass: the share of its places from ``first`` on where they would choose
    the same next token, and the largest difference of two logits there. Call where the trunk's experts are set.
    """
    text = torch.tensor([ids])
    with torch.inference_mode():
        want = reference(input_ids=text).logits[0, first:].float()
        got = trunk(input_ids=text.to(trunk.device)).logits[0, first:].float().cpu()
    return float((want.argmax(1) == got.argmax(1)).float().mean()), float((want - got).abs().max())


async def run_parity(
    data_dir: DataDir,
    config: Config,
    name: str,
    *,
    hosts: int,
    tokens: int,
    dtype: Any,
    across: bool,
    codec: Codec = "none",
    verify: Verify = OFF,
    emit: Emit,
) -> dict[str, Any]:
    """Compare a model on ``hosts`` host processes with the same model whole in this process.

    Args:
        across: cut every layer over all hosts, instead of giving each host whole layers.
        codec: of rows and sums on the wire. Logits are compared while the tokens are the same.
        verify: how hosts are checked; if at all, the same is also measured without.

    Raises:
        ModelError: the model can't be used.
    """
    async with open_node(data_dir, config, listen=True, libp2p=False) as node, AsyncExitStack() as stack:
        cores = torch.get_num_threads()  # torch's own choice: what transformers alone would use
        model = await get_model(name, emit)
        reference = await trio.to_thread.run_sync(load_reference, model, dtype)
        ids = encode(model, reference.config.get_text_config().vocab_size, PROMPT)
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
            across=across,
            threads=config.host.threads or max(1, cores // hosts),
        )
        await stack.enter_async_context(embedded)
        requester = await node.answering.get_requester()
        plan = await node.answering.find_hosts(model, dtype)
        plan.check_complete(model.name)
        await node.answering.connect_hosts(plan)
        trunk = await requester.load(model, dtype, lambda what, done, total: None)
        hosts_used: dict[PeerId, HostUse] = {}
        audits = AuditUse()
        way = Way(codec, verify)

        own_threads = torch.get_num_threads()

        async def sharded(way: Way) -> Sequence:
            torch.set_num_threads(own_threads)
            sampling = Sampling(max_tokens=tokens, min_tokens=tokens)
            sequence = Sequence(trunk.model, model.name, list(ids), sampling, keep_logits=True)
            await requester.complete(model, trunk, plan, sequence, way)
            if sequence.error is not None:
                raise sequence.error
            for peer, use in sequence.hosts.items():
                hosts_used.setdefault(peer, HostUse()).add(use, 1.0)
            audits.add(sequence.audits)
            trunk.forget()  # the next one computes its prompt again
            return sequence

        async def local() -> tuple[list[int], Any, float]:
            torch.set_num_threads(cores)
            return await trio.to_thread.run_sync(generate, reference, ids, tokens)

        want_ids, want_logits, _ = await local()
        got = await sharded(way)
        unchecked: list[float] = []
        speeds: list[tuple[float, float]] = []
        for i in range(REPEATS):
            await emit({"event": "progress", "what": "measuring", "done": i, "total": REPEATS})
            speeds.append((tokens / (await local())[2], tokens / (await sharded(way)).seconds))
            if verify != OFF:
                unchecked.append(tokens / (await sharded(Way(codec))).seconds)
        await emit({"event": "progress", "what": "measuring", "done": REPEATS, "total": REPEATS})
        experts = requester.make_experts(model, plan, codec)
        agreement, choice_diff = await requester.run_model(
            experts,
            lambda: compare_choices(reference, trunk.model, [*ids, *want_ids[:-1]], len(ids) - 1),
            experts.cancel,
        )
    same = sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(want_ids, got.token_ids, strict=True))
    )
    moved = sum(use.bytes_sent + use.bytes_received for use in got.hosts.values())
    ratios = sorted(there / here for here, there in speeds)
    calls = sum(use.calls for use in hosts_used.values())
    return {
        "model": model.name,
        "model_root": model.root,
        "dtype": dtype,
        "codec": codec,
        **({} if verify == OFF else describe_checking(verify, audits, [there for _, there in speeds], unchecked)),
        "hosts": len(hosts_used),
        "tokens": tokens,
        "tokens_identical": want_ids == got.token_ids,
        "tokens_identical_first": same,
        "choices_identical": round(agreement, 4),
        "choices_max_abs_logit_diff": choice_diff,
        "bytes_per_token": round(moved / (len(ids) + tokens - 1)),
        "max_abs_logit_diff": max(
            float((a.float() - b.float().cpu()).abs().nan_to_num(nan=float("inf")).max())
            for a, b in list(zip(want_logits, got.logits, strict=True))[: same + 1]
        ),
        "local_tokens_per_s": round(statistics.median(here for here, _ in speeds), 3),
        "sharded_tokens_per_s": round(statistics.median(there for _, there in speeds), 3),
        "speed_ratio": round(statistics.median(ratios), 4),
        "speed_ratio_min": round(ratios[0], 4),
        "speed_ratio_max": round(ratios[-1], 4),
        "calls": calls,
        "local_threads": cores,
        "requester_threads": own_threads,
    }


def describe_checking(verify: Verify, audits: AuditUse, rates: list[float], unchecked: list[float]) -> dict[str, Any]:
    """What checking hosts took. ``rates``, ``unchecked``: tokens a second with and without, measured in turn."""
    ratios = sorted(checked / free for checked, free in zip(rates, unchecked, strict=True))
    return {
        "verify": describe_audits(verify, audits),
        "verify_ratio": round(statistics.median(ratios), 4),
        "verify_ratio_min": round(ratios[0], 4),
        "verify_ratio_max": round(ratios[-1], 4),
    }
