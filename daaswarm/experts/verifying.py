"""Asks of a host what this node can compute itself, and compares. The answer must differ by rounding only."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from daaswarm.experts.loading import load_hosted
from daaswarm.experts.service import TORCH_DTYPES, ExpertService
from daaswarm.messages import ExpertCall, ExpertReply
from daaswarm.models.sources import LocalModel, ignore_progress
from daaswarm.types import Dtype, ExpertId

ROWS = 4  # of one sample: as large as what a host computes at once, without queueing

# Of a row's error relative to its length (L2). Measured between machines, thread counts and batch sizes: no false
# alarm in 253,952 rows each, while weights in int8, 1 % pruned, of another layer, stale rows and zeros were all caught.
# In bf16 it can't see a scaling by 1.001, noise of 0.1 %, or f16 instead of bf16.
TOLERANCES: dict[str, float] = {"f32": 1e-5, "f16": 2e-3, "bf16": 8e-3}


@dataclass
class Sample:
    """One call, and what this node makes of it. ``expected``: (rows, hidden) f32."""

    call: ExpertCall
    body: bytearray
    expected: torch.Tensor


def choose_samples(held: dict[int, list[int]], count: int) -> list[ExpertId]:
    """``count`` random experts of those held, without repeating one as long as there are others."""
    every = [ExpertId(layer, expert) for layer, experts in held.items() for expert in experts]
    chosen = random.sample(every, min(count, len(every)))
    return sorted(chosen + random.choices(every, k=count - len(chosen)))


def make_sample(model: LocalModel, expert: ExpertId, dtype: Dtype) -> Sample:
    """Read one expert from the checkpoint, its bytes checked against the manifest, and apply it to random rows. Blocks.

    Raises:
        ModelError: the checkpoint here was altered.
    """
    rows = torch.randn(ROWS, model.hidden).to(TORCH_DTYPES[dtype])
    body = bytearray(rows.view(torch.uint8).numpy().tobytes())
    pairs = ROWS if model.kind == "moe" else 0
    if pairs:
        for values, kind in (
            (range(ROWS), torch.int32),
            ([expert.expert] * ROWS, torch.int32),
            ([1.0] * ROWS, torch.float32),
        ):
            body += torch.tensor(list(values), dtype=kind).numpy().tobytes()
    call = ExpertCall(
        model_root=model.root,
        layer=expert.layer,
        experts=[expert.expert],
        dtype=dtype,
        rows=ROWS,
        hidden=model.hidden,
        pairs=pairs,
    )
    service = ExpertService()
    service.add(load_hosted(model, {expert.layer: [expert.expert]}, dtype, ignore_progress)[0])
    reply, parts = service.compute(call, memoryview(body))
    return Sample(call, body, read_sums(reply, memoryview(b"".join(parts))))


def compare(sample: Sample, reply: ExpertReply, body: memoryview) -> float:
    """The largest relative error of a row; infinite where a number is none, or the answer has another shape."""
    if (reply.rows, reply.hidden) != sample.expected.shape or len(body) != 4 * sample.expected.numel():
        return float("inf")
    got = read_sums(reply, body)
    if not got.isfinite().all():
        return 0.0 if torch.equal(got, sample.expected) else float("inf")
    errors = (got - sample.expected).norm(dim=1) / sample.expected.norm(dim=1).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    return float(errors.max())


def read_sums(reply: ExpertReply, body: memoryview) -> torch.Tensor:
    """(rows, hidden) f32; ``body`` must have that size."""
    return torch.frombuffer(bytearray(body), dtype=torch.float32).view(reply.rows, reply.hidden)
