"""The check of GPUs, as far as it goes without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from daaswarm.models.sources import find_model
from daaswarm.testing.checkpoints import make_tiny_checkpoint


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for device in ("cuda", "auto"):
        monkeypatch.setattr("sys.argv", ["gpu_check", "--device", device])
        assert gpu_check.main() == 2
        assert "nothing was checked" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["llama", "olmoe"])
def test_the_processor_agrees_with_itself(architecture: str, tmp_path: Path) -> None:
    model = find_model(str(make_tiny_checkpoint(architecture, tmp_path / "model")), tmp_path / "cache")
    found = gpu_check.compare(model, "f32", "cpu")
    assert [row["rows"] for row in found] == list(gpu_check.ROWS) and all(row["is_right"] for row in found)
