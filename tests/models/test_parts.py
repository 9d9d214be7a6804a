"""Descriptions of parts that no tensor has are refused before memory is taken for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from daaswarm.errors import ModelError
from daaswarm.models.checkpoint import Checkpoint
from daaswarm.models.manifest import Entry
from daaswarm.models.parts import STRIDE_BYTES, hash_parts, read_parts
from daaswarm.models.sources import find_model

Tiny = Callable[[str], Path]


def read_nothing(*args: Any) -> None:
    raise AssertionError("nothing is to be read")


@pytest.mark.parametrize("shape", [[2, STRIDE_BYTES // 4 + 2], [2, 1 << 32, 256], [1 << 12, 1 << 32]])
def test_rows_too_large_to_hold(shape: list[int]) -> None:
    entry = Entry(name="down", dtype="F32", shape=shape, layer=0, param="down.weight", axis=1, parts=2)
    with pytest.raises(ModelError, match="tensor down has rows of"):
        hash_parts(read_nothing, entry, 0, 2)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [({"shape": [1 << 32, 1 << 12]}, [0]), ({"shape": [1 << 32]}, [0]), ({"dtype": "F64"}, [0]), ({}, [1]), ({}, [-1])],
)
def test_parts_that_the_tensor_does_not_have(tiny: Tiny, tmp_path: Path, changes: Any, parts: list[int]) -> None:
    model = find_model(str(tiny("llama")), tmp_path)
    entry = next(entry for entry in model.manifest.entries if entry.parts == 1)
    entry = msgspec.structs.replace(entry, **changes)
    with Checkpoint(model.folder) as checkpoint, pytest.raises(ModelError, match="no such parts"):
        read_parts(checkpoint, entry, parts, where=model.manifest_path)
    assert checkpoint.bytes_read == 0
