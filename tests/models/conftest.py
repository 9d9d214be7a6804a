from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from daaswarm.testing.checkpoints import make_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny checkpoint of an architecture, made once a session; tests that change it copy it."""
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = make_tiny_checkpoint(architecture, tmp_path_factory.mktemp(architecture) / "model")
        return made[architecture]

    return get
