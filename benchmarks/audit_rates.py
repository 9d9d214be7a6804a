"""How often the check by sketches fails honest rows, and which tamperings it catches.

    python -m benchmarks.audit_rates [--rows 200000] [--model smollm2-135m-instruct] [--json]

Honest rows: a model's own experts, its layers in turn, on rows like those of trained models (a few large coordinates,
lengths that differ), by one and two threads, in batches of 1 to 256, with every kernel that this machine has. Also rows
that were delivered, and opened afterwards in another batch. Tampered rows: one line for each way and dtype.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from daaswarm.config import get_cache_dir
from daaswarm.models.auditing import ABSTAIN, FAIL, FfnSecrets, Opened, check_again, check_ffn, get_spread
from daaswarm.models.experts import load_experts
from daaswarm.models.kernels import KERNELS, fill
from daaswarm.models.secrets import Form, Secrets, get_form, save_secrets
from daaswarm.models.sources import find_model
from daaswarm.models.tensors import COMPUTE_DTYPES
from daaswarm.types import DTYPES

BATCHES = (1, 4, 16, 64, 256)
THREADS = (1, 2)
LAYERS = 3  # of the model, first, middle, last
TAMPERED_ROWS = 2_000
Weights = tuple[Tensor, Tensor, Tensor]


def make_rows(count: int, hidden: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, hidden, generator=generator)
    rows[:, :4] *= 20
    return (rows * torch.exp(0.5 * torch.randn(count, 1, generator=generator))).to(dtype)


def compute(
    x: Tensor, weights: Weights, kernel: str = "eager", act: Callable[[Tensor], Tensor] = functional.silu
) -> Opened:
    make = KERNELS[kernel][1]
    first, down = make(torch.cat(weights[:2])), make(weights[2])
    return apply(x, first, down, act)


def apply(x: Tensor, first: Any, down: Any, act: Callable[[Tensor], Tensor] = functional.silu) -> Opened:
    gate, up = first(fill(x, first.least_rows)).chunk(2, 1)
    hidden = act(gate) * up
    out = down(hidden)
    return Opened(*(each[: len(x)] for each in (gate, up, hidden, out)))


def count_honest(forms: dict[int, Form], secrets: Secrets, dtype: torch.dtype, wanted: int) -> dict[str, int]:
    """Rows, and how many failed or abstained, opened at once and afterwards."""
    counts = {"rows": 0, "failed": 0, "abstained": 0, "failed_again": 0}
    kernels = [name for name, (can, _) in KERNELS.items() if can(next(iter(forms.values())).matrices[0][0])]
    if dtype == torch.float16:
        kernels = ["eager"]  # the others take a second for each batch on processors without f16 arithmetic
    cases = [
        (layer, kernel, threads, batch)
        for layer in forms
        for kernel in kernels
        for threads in THREADS
        for batch in BATCHES
    ]
    each = -(-wanted // len(cases))
    for number, (layer, kernel, threads, batch) in enumerate(cases):
        torch.set_num_threads(threads)
        weights = join(forms[layer])
        ffn = secrets.join(layer, tuple(range(len(forms[layer].matrices))))
        make = KERNELS[kernel][1]
        first, down = make(torch.cat(weights[:2])), make(weights[2])
        rows = make_rows(each, weights[0].shape[1], dtype, number)
        whole = [apply(part, first, down) for part in rows.split(256)]
        for done, part in enumerate(rows.split(256)):
            parts = [apply(few, first, down) for few in part.split(batch)] if batch < 256 else [whole[done]]
            opened = Opened(*(torch.cat(values) for values in zip(*parts, strict=True)))
            verdicts = check_ffn(ffn, part, opened)
            again = check_again(opened.out, whole[done].out, get_spread(ffn, whole[done].hidden), dtype)
            counts["rows"] += len(part)
            counts["failed"] += int((verdicts == FAIL).sum())
            counts["abstained"] += int((verdicts == ABSTAIN).sum())
            counts["failed_again"] += int((again == FAIL).sum())
    torch.set_num_threads(max(THREADS))
    return counts


def join(form: Form) -> Weights:
    gates, ups, downs = zip(*form.matrices, strict=True)
    return torch.cat(gates), torch.cat(ups), torch.cat(downs, 1)


def quantise(weight: Tensor, levels: int) -> Tensor:
    scale = weight.float().abs().amax(1, keepdim=True) / levels
    return ((weight.float() / scale).round() * scale).to(weight.dtype)


def tamper(x: Tensor, weights: Weights, other: Weights) -> dict[str, Opened]:
    honest = compute(x, weights)
    out = honest.out.float()
    rms = out.square().mean(1, keepdim=True).sqrt()
    generator = torch.Generator().manual_seed(5)

    def say(sums: Tensor) -> Opened:
        return honest._replace(out=sums.to(x.dtype))

    kept = torch.rand(weights[2].shape, generator=generator) >= 0.01
    one = torch.eye(out.shape[1])[7]
    return {
        "another layer's experts": compute(x, other),
        "weights in int8": compute(
            x, (quantise(weights[0], 127), quantise(weights[1], 127), quantise(weights[2], 127))
        ),
        "weights in int4": compute(x, (quantise(weights[0], 7), quantise(weights[1], 7), quantise(weights[2], 7))),
        "1 % of the weights left out": compute(x, (weights[0], weights[1], weights[2] * kept.to(x.dtype))),
        "another activation": compute(x, weights, act=functional.gelu),
        "stale rows": compute(x.roll(1, 0), weights),
        "zeros": say(out * 0),
        "NaN": say(out * float("nan")),
        "sums times 1.01": say(out * 1.01),
        "sums times 1.001": say(out * 1.001),
        "one number off by a tenth": say(out + 0.1 * rms * one),
        "one number off by half": say(out + 0.5 * rms * one),
        "noise of 1 %": say(out + 0.01 * rms * torch.randn(out.shape, generator=generator)),
        "noise of 0.1 %": say(out + 0.001 * rms * torch.randn(out.shape, generator=generator)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000, help="honest ones of each dtype")
    parser.add_argument("--model", default="default")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = find_model(options.model, get_cache_dir())
    layers = sorted({min(model.layers), sorted(model.layers)[len(model.layers) // 2], max(model.layers)})[:LAYERS]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for dtype in DTYPES:
            began = time.perf_counter()
            held = load_experts(model, {layer: list(range(model.layers[layer])) for layer in layers}, dtype)
            forms = {layer: form for layer in layers if (form := get_form(held[layer])) is not None}
            path = Path(folder) / dtype
            save_secrets(list(forms.items()), model.root, dtype, path)
            secrets = Secrets(path, model.root, dtype)
            honest = count_honest(forms, secrets, COMPUTE_DTYPES[dtype], options.rows)
            weights, other = join(forms[layers[1]]), join(forms[layers[0]])
            x = make_rows(TAMPERED_ROWS, model.hidden, COMPUTE_DTYPES[dtype], 99)
            ffn: FfnSecrets = secrets.join(layers[1], tuple(range(model.layers[layers[1]])))
            caught = {
                name: round(float((check_ffn(ffn, x, opened) == FAIL).float().mean()), 4)
                for name, opened in tamper(x, weights, other).items()
            }
            found[dtype] = {"honest": honest, "caught": caught, "seconds": round(time.perf_counter() - began, 1)}
    if options.json:
        print(json.dumps(found))
        return
    for dtype, figures in found.items():
        print(f"{dtype}: {figures['honest']}, {figures['seconds']} s")
    for name in next(iter(found.values()))["caught"]:
        print(f"{name:<32}" + "".join(f"{found[dtype]['caught'][name]:>10.1%}" for dtype in found))


if __name__ == "__main__":
    main()
