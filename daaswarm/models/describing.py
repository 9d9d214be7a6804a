"""What a model takes, worked out from its manifest or, where there is none yet, from its configuration: ``model info``.

Weights are not read.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from daaswarm.errors import ModelError
from daaswarm.models.checkpoint import ITEM_BYTES, Checkpoint, read_config
from daaswarm.models.manifest import TRUNK, Entry, Layer
from daaswarm.models.sources import find_manifest
from daaswarm.types import DTYPE_BYTES, DTYPES, Dtype

_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "model_max_length")  # names of one thing


def describe_model(folder: Path, cache: Path, *, dtype: Dtype, hosts: int, memory_bytes: int | None) -> dict[str, Any]:
    """What ``model info`` shows of a checkpoint.

    Args:
        dtype: that it would be computed in.
        hosts: to share the experts evenly.
        memory_bytes: of each host, to say how many are needed.

    Raises:
        ModelError: the folder is no checkpoint. One that can't be split is described, with the reason.
    """
    config = _read_config(folder)
    nested = config.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else {}
    with Checkpoint(folder) as checkpoint:
        stored = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        dtypes = {tensor.dtype for tensor in checkpoint.tensors.values()}
        described: dict[str, Any] = {
            "folder": str(folder),
            "architecture": ", ".join(config.get("architectures") or []) or str(config.get("model_type", "")),
            "model_type": str(config.get("model_type", "")),
            "context": next((c[key] for c in (text, config) for key in _CONTEXT if isinstance(c.get(key), int)), None),
            "bytes": stored,
            "stored_dtypes": sorted(dtypes),
            "servable": True,
            "reason": "",
        }
        try:
            manifest = find_manifest(folder, cache)
            if manifest is not None:
                kind, layers, entries, root = manifest.kind, manifest.layers, manifest.entries, manifest.root
            else:
                from daaswarm.models.plan import make_plan

                plan = make_plan(checkpoint)
                kind, layers, entries, root = plan.kind, plan.layers, plan.entries, None
        except ModelError as error:
            return {**described, "servable": False, "reason": error.message}
    described |= {"root": root, "kind": kind, "prepared": root is not None}
    return described | measure(layers, entries, dtype=dtype, hosts=hosts, memory_bytes=memory_bytes)


def measure(
    layers: dict[int, Layer], entries: list[Entry], *, dtype: Dtype, hosts: int, memory_bytes: int | None
) -> dict[str, Any]:
    """Sizes of each part, bytes.

    Returns:
        ``host_bytes``: what the fullest of ``hosts`` holds; ``hosts_needed``: with ``memory_bytes`` each, None if one
        expert is too large.
    """
    width = DTYPE_BYTES[dtype]
    trunk = sum(math.prod(entry.shape) for entry in entries if entry.layer == TRUNK and entry.dtype in ITEM_BYTES)
    sizes = [
        (layer.numel * width, layer.shared * width, number)
        for number, layer in sorted(layers.items())
        for _ in range(layer.experts)
    ]
    shares = [sizes[len(sizes) * i // hosts : len(sizes) * (i + 1) // hosts] for i in range(hosts)]
    found: dict[str, Any] = {
        "layers": [
            {
                "layer": number,
                "experts": layer.experts,
                "expert_bytes": {name: layer.numel * DTYPE_BYTES[name] for name in DTYPES},
            }
            for number, layer in sorted(layers.items())
        ],
        "requester_bytes": {name: trunk * DTYPE_BYTES[name] for name in DTYPES},
        "experts_bytes": {name: _weigh(sizes) * DTYPE_BYTES[name] // width for name in DTYPES},
        "dtype": dtype,
        "hosts": hosts,
        "host_bytes": max(_weigh(share) for share in shares),
    }
    if memory_bytes is not None:
        found |= {"memory_bytes": memory_bytes, "hosts_needed": _count_hosts(sizes, memory_bytes)}
    return found


def _weigh(share: list[tuple[int, int, int]]) -> int:
    """Bytes of some experts, and once of what their layers share."""
    return sum(own for own, _, _ in share) + sum({number: shared for _, shared, number in share}.values())


def _count_hosts(sizes: list[tuple[int, int, int]], memory_bytes: int) -> int | None:
    count, room, last = 0, 0, -1
    for own, shared, number in sizes:
        needed = own + (shared if number != last else 0)
        if count == 0 or needed > room:
            count, room, needed = count + 1, memory_bytes, own + shared
            if needed > room:
                return None
        room -= needed
        last = number
    return count


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_config(folder))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ModelError(f"{folder / 'config.json'} is not a JSON object", hint="download it again")
    return config
