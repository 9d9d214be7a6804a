"""A model from a peer, between real processes: by its root, with nothing but an address."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from daaswarm.models.sources import find_model
from tests.e2e.processes import run_json, swarm

pytestmark = pytest.mark.e2e


def test_pulled_and_asked_by_root(moe: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAASWARM_CACHE", str(cache))
    root = find_model(str(moe), cache).root
    own: Any = {"DAASWARM_CACHE": str(tmp_path / "own"), "DAASWARM_HOME": str(tmp_path / "home")}
    with swarm(tmp_path, str(moe), []) as (address, _):
        pulled = run_json("model", "pull", root, "--bootstrap", address, **own)
        assert pulled["model_root"] == root and Path(pulled["folder"]).is_relative_to(tmp_path / "own")
        (listed,) = run_json("model", "list", **own)["models"]
        assert listed["root"] == root
        options = ["--max-tokens", "3", "--bootstrap", address]
        answer = run_json("infer", "Hello", "--model", root, *options, **own)
        assert (answer["model_root"], answer["completion_tokens"]) == (root, 3)
