"""How fast this machine runs the parts of a model, and how fast its hosts answer: with the model's real shapes.

What is timed is what an answer does, so that its overheads are in the figures: the trunk runs with the requester's own
routing and an answer of zeros, experts compute real calls, and hosts are sent calls as an answer sends them.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from daaswarm.core.router import ReplicaRouter
from daaswarm.errors import RemoteProtocolError
from daaswarm.inference.alone import generate_alone
from daaswarm.inference.batching import Batch
from daaswarm.inference.plan import HostPlan
from daaswarm.inference.requester import Requester, Trunk, Way
from daaswarm.inference.sequence import Sampling
from daaswarm.inference.sequence import Sequence as TokenSequence
from daaswarm.inference.swarm_experts import ROWS_PER_CALL, TORCH_DTYPES, SwarmExperts, as_bytes
from daaswarm.messages import Contact, ExpertCall, ExpertReply
from daaswarm.models.experts import load_experts
from daaswarm.models.sources import LocalModel
from daaswarm.net.network import Network
from daaswarm.types import Dtype, ExpertId, PeerId

TOKENS = 24  # of the answer that times the trunk: a second of a small model
SAMPLE_BYTES = 256 << 20  # of experts that are read in turn: more than caches hold, as in an answer
MEASURE_S = 1.0  # of one kind of call; then the round is finished, and no other begun
ROUNDS = 5  # calls of one row to each layer that is sampled
LAYERS = 32  # of one host that are called
PREFILL_CALLS = 4  # with the rows of a prompt
CALL_S = 10.0  # deadline of one call
RATE_BYTES = 64 << 20  # read for a quick look at the memory's speed, some 10 ms
QUICK_ROUNDS = 3
LARGE_BYTES = 65_536  # of a call, that says something of the bandwidth


class TrunkTimes(NamedTuple):
    """``chosen``: experts of a layer that each row goes to (slices: all)."""

    token_s: float
    prefill_s: float
    chosen: int


class LayerTimes(NamedTuple):
    """One split layer with all that is chosen of it."""

    token_s: float
    prefill_s: float


class HostTimes(NamedTuple):
    """``round_s``: a call's time beside the host's own. ``bytes_per_s``: ``None`` if no call was large enough."""

    round_s: float
    layer: LayerTimes
    bytes_per_s: float | None


async def measure_trunk(
    requester: Requester, network: Network, model: LocalModel, trunk: Trunk, dtype: Dtype, prompt_tokens: int
) -> TrunkTimes:
    """A short answer whose experts say nothing.

    Raises:
        ConfigError: the prompt is longer than the model's context.
    """
    chosen = max(model.layers.values(), default=0)

    def compute_nothing(call: ExpertCall, body: memoryview) -> tuple[ExpertReply, list[Any]]:
        nonlocal chosen
        if call.pairs:
            chosen = call.pairs // call.rows
        return ExpertReply(rows=call.rows, hidden=call.hidden), [bytearray(call.rows * call.hidden * 4)]

    own = network.peer_id
    holders = {ExpertId(layer, e): [own] for layer, count in model.layers.items() for e in range(count)}
    plan = HostPlan(
        model.root, dtype, dict(model.layers), holders, {own: Contact(peer_id=own, addrs=[])}, kind=model.kind
    )
    experts = SwarmExperts(
        plan,
        network,
        ReplicaRouter(random.Random(0)),
        refresh=lambda: plan,
        call_timeout_s=CALL_S,
        model_name=model.name,
        local=compute_nothing,
    )
    ids = torch.randint(1, 200, (prompt_tokens,)).tolist()
    sampling = Sampling(max_tokens=TOKENS, min_tokens=TOKENS)
    sequence = TokenSequence(trunk.model, model.name, ids, sampling)
    if trunk.can_batch:
        batch = Batch(trunk.model, experts)
        batch.submit(sequence, plan, lambda: None)
        await requester.run_model(batch.compute, batch.work, batch.cancel_all)
    else:
        await requester.run_model(experts, lambda: generate_alone(sequence, trunk.get_kept(Way())), experts.cancel)
    if sequence.error is not None:
        raise sequence.error
    assert sequence.first_token_at is not None and sequence.ended_at is not None
    prefill_s = sequence.first_token_at - sequence.started_at
    token_s = (sequence.ended_at - sequence.first_token_at) / max(len(sequence.token_ids) - 1, 1)
    return TrunkTimes(token_s, prefill_s, chosen)


def measure_layers(model: LocalModel, dtype: Dtype, chosen: int, prompt_tokens: int) -> LayerTimes:
    """Experts of this machine. Blocks: reads up to :data:`SAMPLE_BYTES` of them, and computes for a second or two."""
    wanted = choose_sample(model, dtype, chosen)
    layers = load_experts(model, wanted, dtype)

    def compute(call: ExpertCall, body: Sequence[memoryview]) -> tuple[float, float, int]:
        layer = layers[call.layer]
        rows = torch.frombuffer(body[0], dtype=TORCH_DTYPES[dtype]).view(call.rows, call.hidden)
        began = time.perf_counter()
        with torch.inference_mode():
            if call.pairs:
                index, experts = (torch.frombuffer(part, dtype=torch.int32).long() for part in body[1:3])
                layer.compute_pairs(rows, index, experts, torch.frombuffer(body[3], dtype=torch.float32))
            else:
                layer.compute_slices(rows, call.experts)
        return time.perf_counter() - began, 0.0, 0

    return _time_layers(compute, model, dtype, wanted, chosen, prompt_tokens)[1]


def measure_host(
    network: Network,
    contact: Contact,
    model: LocalModel,
    dtype: Dtype,
    held: dict[int, list[int]],
    chosen: int,
    prompt_tokens: int,
) -> HostTimes:
    """Real calls to a host that is connected. Blocks; call from a worker thread.

    Between two calls this machine reads as many weights as the trunk has in a layer: in an answer its cores and caches
    are used by the trunk too, which a host on the same machine feels.

    Raises:
        DaaswarmError: it doesn't answer, or refuses.
    """

    width = model.hidden
    weights = torch.zeros(max(model.get_trunk_bytes(dtype) // max(len(model.layers), 1) // 4 // width, 1), width)
    row = torch.ones(width)

    def compute(call: ExpertCall, body: Sequence[memoryview]) -> tuple[float, float, int]:
        torch.mv(weights, row)
        pending = network.submit(contact, call, body, deadline_s=CALL_S)
        reply, answer = pending.wait()
        if not isinstance(reply, ExpertReply):
            raise RemoteProtocolError(f"an expert call was answered by {type(reply).__name__}")
        nbytes = sum(part.nbytes for part in body) + answer.nbytes
        elapsed_s, service_s = pending.latency_s, reply.service_us / 1e6
        network.links.note_sizes(PeerId(contact.peer_id), nbytes, elapsed_s, service_s)
        service_s = min(service_s, elapsed_s)
        return service_s, elapsed_s - service_s, nbytes

    round_s, layer, rates = _time_layers(compute, model, dtype, held, chosen, prompt_tokens)
    return HostTimes(round_s, layer, max(rates, default=None))


def measure_read_rate() -> float:
    """Bytes/s at which weights are read and multiplied by one row. Blocks for some 50 ms."""
    weights = torch.zeros(RATE_BYTES // 4 // 1024, 1024)
    row = torch.ones(1024)
    best_s = float("inf")
    with torch.inference_mode():
        for _ in range(QUICK_ROUNDS):
            began = time.perf_counter()
            torch.mv(weights, row)
            best_s = min(best_s, time.perf_counter() - began)
    return RATE_BYTES / best_s


def choose_sample(model: LocalModel, dtype: Dtype, chosen: int) -> dict[int, list[int]]:
    """Layers, each with as many experts as a row goes to, up to :data:`SAMPLE_BYTES`; one at least."""
    wanted: dict[int, list[int]] = {}
    left = SAMPLE_BYTES
    for layer, count in sorted(model.layers.items()):
        size = min(chosen, count) * model.expert_bytes(layer, dtype)
        if wanted and size > left:
            break
        wanted[layer] = list(range(min(chosen, count)))
        left -= size
    return wanted


def _time_layers(
    compute: Callable[[ExpertCall, Sequence[memoryview]], tuple[float, float, int]],
    model: LocalModel,
    dtype: Dtype,
    held: dict[int, list[int]],
    chosen: int,
    prompt_tokens: int,
) -> tuple[float, LayerTimes, list[float]]:
    """A call's time beside its service, a whole layer's, and the bandwidths that large calls showed. Means, not
    medians: an answer waits for the slow ones too.

    Args:
        compute: (call, body) → (service s, the rest s, bytes of its body and answer).
    """
    layers = sorted(held)[:LAYERS]
    service_s: list[float] = []
    rest_s: list[float] = []
    ends_at = time.perf_counter() + MEASURE_S
    for number in range(ROUNDS + 1):
        for layer in layers:
            call, body = make_call(model, dtype, layer, held[layer], 1, chosen)
            own_s, other_s, _ = compute(call, body)
            if number:  # the first round warms up
                service_s.append(own_s * _get_scale(model, call, chosen))
                rest_s.append(other_s)
        if number and time.perf_counter() > ends_at:
            break
    round_s = statistics.fmean(rest_s)
    prefill_s: list[float] = []
    rates: list[float] = []
    for layer in layers[:PREFILL_CALLS]:
        total_s, left = 0.0, prompt_tokens
        while left > 0:
            rows = min(left, ROWS_PER_CALL)
            call, body = make_call(model, dtype, layer, held[layer], rows, chosen)
            own_s, other_s, nbytes = compute(call, body)
            total_s += own_s * _get_scale(model, call, chosen)
            left -= rows
            if nbytes >= LARGE_BYTES:
                rates.append(nbytes / max(other_s - round_s, other_s / 2, 1e-6))
        prefill_s.append(total_s)
    return round_s, LayerTimes(statistics.fmean(service_s), statistics.fmean(prefill_s)), rates


def make_call(
    model: LocalModel, dtype: Dtype, layer: int, held: list[int], rows: int, chosen: int
) -> tuple[ExpertCall, list[memoryview]]:
    """A call as an answer makes it, for ``rows`` random rows: each goes to ``chosen`` of what is held."""
    values = torch.randn(rows, model.hidden).to(TORCH_DTYPES[dtype])
    body = [as_bytes(values)]
    experts, pairs = held, 0
    if model.kind == "moe":
        each = min(chosen, len(held))
        picked = torch.stack([torch.randperm(len(held))[:each] for _ in range(rows)])
        index = torch.tensor(held)[picked].reshape(-1)
        experts, pairs = sorted(set(index.tolist())), len(index)
        body += [
            as_bytes(torch.arange(rows).repeat_interleave(each).to(torch.int32)),
            as_bytes(index.to(torch.int32)),
            as_bytes(torch.full((pairs,), 1 / each)),
        ]
    call = ExpertCall(
        model_root=model.root,
        layer=layer,
        experts=experts,
        dtype=dtype,
        rows=rows,
        hidden=model.hidden,
        pairs=pairs,
    )
    return call, body


def _get_scale(model: LocalModel, call: ExpertCall, chosen: int) -> float:
    """What a whole layer takes, as a multiple of this call."""
    if model.kind == "moe":
        return chosen * call.rows / call.pairs
    return model.layers[call.layer] / len(call.experts)
