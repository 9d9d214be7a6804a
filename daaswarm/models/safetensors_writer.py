"""Write safetensors one tensor at a time, so that a conversion never holds the whole model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

_ALIGNMENT = 8  # the format's: the header is padded with spaces


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], values: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Write f32 tensors.

    Args:
        shapes: in the order in which ``values`` yields them.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    expected = iter(shapes.items())
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, value in values:
            if (name, value.shape) != next(expected):
                raise ValueError(f"{name} {value.shape} is out of order")
            file.write(np.ascontiguousarray(value, dtype="<f4").data)
