"""Is the GPU path the processor's, and how fast is it? ``make gpu-check``, on a machine with a GPU.

Ends with 0 if everything agrees, 1 if something doesn't, 2 if there is no GPU: then nothing was checked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import trio

from daaswarm.errors import ConfigError
from daaswarm.experts.loading import load_hosted
from daaswarm.experts.service import TORCH_DTYPES, Layer
from daaswarm.models.devices import choose_device
from daaswarm.models.sources import DEFAULT_MODEL, LocalModel, find_model, ignore_progress
from daaswarm.node.reporting import Event, get_model
from daaswarm.testing.checkpoints import make_tiny_checkpoint
from daaswarm.types import Dtype

ROWS = (1, 2, 3, 4, 8, 9, 64, 512)  # with a graph of their size, filled up to one, and without
TOLERANCE: dict[Dtype, float] = {"f32": 1e-4, "bf16": 2e-2}  # of the largest sum: kernels add up in other orders
CHOICES = 0.99  # of next tokens that must be the same in f32: two logits may be as close as rounding
CALLS_S = 2.0  # of calls that are counted
THREADS = (1, 8)  # that call at once
SAMPLE_S = 0.2  # between two looks at the GPU
ANSWER_S = 900.0  # until `bench parity` is through


class Utilisation:
    """What ``nvidia-smi`` says of the GPU during a block: percent of the time with a kernel, and MiB in use."""

    def __init__(self) -> None:
        self.percent: list[float] = []
        self.memory_mib = 0.0

    @contextmanager
    def sampling(self) -> Iterator[None]:
        stop = threading.Event()
        thread = threading.Thread(target=self._sample, args=(stop,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _sample(self, stop: threading.Event) -> None:
        command = ["nvidia-smi", "--id=0", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
        while not stop.wait(SAMPLE_S):
            try:
                said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
                percent, used = (float(part) for part in said.split(","))
            except (OSError, subprocess.SubprocessError, ValueError):
                return  # no such program here: nothing is said of it
            self.percent.append(percent)
            self.memory_mib = max(self.memory_mib, used)

    def describe(self) -> dict[str, Any]:
        mean = round(sum(self.percent) / len(self.percent), 1) if self.percent else None
        return {"gpu_percent": mean, "gpu_memory_mib": self.memory_mib or None}


def compare(model: LocalModel, dtype: Dtype, device: str) -> list[dict[str, Any]]:
    """The first layer's sums on the device and on the processor, for each number of rows."""
    layer = min(model.layers)
    held = {layer: list(range(model.layers[layer]))}
    here = load_hosted(model, held, dtype, ignore_progress)[0].layers[layer]
    there = load_hosted(model, held, dtype, ignore_progress, device)[0].layers[layer]
    found: list[dict[str, Any]] = []
    for rows in ROWS:
        generator = torch.Generator().manual_seed(rows)
        values = torch.randn(rows, model.hidden, generator=generator).to(TORCH_DTYPES[dtype])
        for _ in range(2):  # graphs are replayed with other rows than they were captured with
            values = values.flip(0) * 0.5
            wanted, got = (compute(each, model.kind, values, model.layers[layer]) for each in (here, there))
            error = float((wanted - got).abs().max() / wanted.abs().max())
        is_right = error <= TOLERANCE[dtype]
        found.append({"model": model.name, "dtype": dtype, "rows": rows, "error": error, "is_right": is_right})
    return found


def compute(layer: Layer, kind: str, values: torch.Tensor, experts: int) -> torch.Tensor:
    if kind == "dense":
        return layer.compute_slices(values, layer.ids)
    rows = len(values)
    index = torch.arange(rows).repeat_interleave(2)
    return layer.compute_pairs(values, index, torch.arange(2 * rows) % experts, torch.full((2 * rows,), 0.5))


def count_calls(model: LocalModel, device: str, threads: int) -> dict[str, Any]:
    """Calls of one row a second, over some layers, without a network."""
    wanted = {layer: list(range(count)) for layer, count in sorted(model.layers.items())[:8]}
    layers = load_hosted(model, wanted, "f32", ignore_progress, device)[0].layers
    row = torch.randn(1, model.hidden)
    for number, layer in layers.items():  # graphs are captured
        compute(layer, model.kind, row, model.layers[number])
    counts = [0] * threads
    ends_at = time.perf_counter() + CALLS_S

    def call(thread: int) -> None:
        while time.perf_counter() < ends_at:
            for number, layer in layers.items():
                compute(layer, model.kind, row, model.layers[number])
                counts[thread] += 1

    used = Utilisation()
    started = time.perf_counter()
    with used.sampling():
        callers = [threading.Thread(target=call, args=(i,)) for i in range(threads)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        took_s = time.perf_counter() - started
    return {"threads": threads, "calls_per_s": round(sum(counts) / took_s, 1), **used.describe()}


def ask(name: str, device: str, host_device: str, tokens: int) -> dict[str, Any]:
    """``bench parity`` with the trunk and the experts on these devices, beside the whole model on the processor."""
    environment = {**os.environ, "DAASWARM_INFER_DEVICE": device, "DAASWARM_HOST_DEVICE": host_device}
    command = [sys.executable, "-m", "daaswarm", "bench", "parity", "--model", name, "--hosts", "2"]
    command += ["--tokens", str(tokens), "--json"]
    used = Utilisation()
    with used.sampling():
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    if done.returncode:
        return {"trunk": device, "experts": host_device, "is_right": False, "error": done.stdout + done.stderr[-2000:]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {
        "trunk": device,
        "experts": host_device,
        "is_right": result["choices_identical"] >= CHOICES,
        "choices_identical": result["choices_identical"],
        "max_abs_logit_diff": result["choices_max_abs_logit_diff"],
        "tokens_per_s": result["sharded_tokens_per_s"],
        "answers_per_s": round(result["sharded_tokens_per_s"] / tokens, 3),
        "processor_tokens_per_s": result["local_tokens_per_s"],
        **used.describe(),
    }


async def say(event: Event) -> None:
    """Progress isn't shown."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name or folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    try:
        device = choose_device(arguments.device, key="--device")
    except ConfigError as error:
        print(f"{error.message}: nothing was checked", file=sys.stderr)
        return 2
    if device.type != "cuda":
        print(f"{device} is no GPU: nothing was checked", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}", file=sys.stderr)
    model = trio.run(get_model, arguments.model, say)
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    with tempfile.TemporaryDirectory(prefix="daaswarm-") as folder:
        mixture = find_model(str(make_tiny_checkpoint("olmoe", Path(folder) / "olmoe")), Path(folder) / "cache")
        dtypes: tuple[Dtype, ...] = ("f32", "bf16")
        report["parity"] = [
            row for each in (model, mixture) for dtype in dtypes for row in compare(each, dtype, str(device))
        ]
    report["calls"] = [count_calls(model, str(device), threads) for threads in THREADS]
    report["answers"] = [
        ask(arguments.model, str(device), experts, arguments.tokens) for experts in ("cpu", str(device))
    ]
    print(json.dumps(report, indent=2))
    return 0 if all(row["is_right"] for row in (*report["parity"], *report["answers"])) else 1


if __name__ == "__main__":
    sys.exit(main())
