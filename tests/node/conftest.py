"""What the tests of nodes share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.node.node_helpers import events


@pytest.fixture(autouse=True)
def home(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is not the user's, and nothing was emitted yet."""
    monkeypatch.setenv("DAASWARM_CACHE", str(cache))
    events.clear()
