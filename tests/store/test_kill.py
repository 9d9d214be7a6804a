"""kill -9 while a node writes; the long version is ``make kill-store``."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from benchmarks.kill_store import check, run, run_creations, run_round


def test_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    result = run(tmp_path, 5, seed=7)
    assert result["wrong"] == [] and result["kills"] == 5


def test_a_file_that_was_being_made(tmp_path: Path) -> None:
    assert run_creations(tmp_path, 6, seed=7) == []


def test_a_loss_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "node.db"
    acknowledged: dict[str, list[int]] = {"saved": [], "deployed": [], "used": []}
    run_round(path, 1, 0.1, acknowledged)
    assert check(path, acknowledged) == []
    for table, text in (("peers", "peer or advert"), ("deployed_layers", "deployment"), ("calls", "saves")):
        connection = sqlite3.connect(path)
        connection.execute(f"DELETE FROM {table}")
        connection.commit()
        connection.close()
        acknowledged["deployed"] = acknowledged["deployed"] or [1]
        assert any(text in line for line in check(path, acknowledged))
