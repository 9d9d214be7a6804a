"""``daaswarm bench sim`` as its user sees it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from daaswarm.cli.app import run

SMALL = ["bench", "sim", "--nodes", "20", "--minutes", "0.2"]
KEYS = {
    "lookup_success", "hops_p50", "hops_p99", "stale_answers", "call_p50_ms", "call_p95_ms", "call_p99_ms",
    "load_max_over_mean", "bytes_per_node_s", "growth", "rss_bytes", "wall_s", "events_per_s",
}  # fmt: skip


def test_json_is_one_object_with_all_figures_and_pictures_are_drawn(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert run([*SMALL, "--json", "--plots", str(tmp_path / "new" / "pictures")]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert result.keys() > KEYS and err == ""
    assert result["lookup_success"] == 1 and result["nodes"] == 20 and len(result["growth"]) == 1
    assert [Path(path).name for path in result["plots"]] == ["latency.png", "hops.png", "load.png"]
    for path in result["plots"]:
        assert Path(path).read_bytes().startswith(b"\x89PNG")


def test_people_get_a_table(capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*SMALL, "--no-growth"]) == 0
    out, err = capfd.readouterr()
    assert "lookup_success" in out and "P50 / P95 / P99" in out and "load_max_over_mean" in out and err == ""


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    assert run([*SMALL, "--plots", str(tmp_path / "file" / "pictures")]) == 2
    assert "can't be written" in capfd.readouterr().err


def test_without_matplotlib_it_is_said_before_the_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(["bench", "sim", "--plots", str(tmp_path)]) == 2
    assert "daaswarm[plots]" in capfd.readouterr().err
