"""Scenario 4: what a host with one expert takes, before anybody calls it.

Ours is a real ``daaswarm host-expert`` with all it does by default (discovery, the DHT, libp2p). It serves the layer of
a small random checkpoint, 576 → 1536 → 576 with a gate: as many weights as hivemind's 576 → 2304 → 576. The checkpoint
was prepared before (``model prepare``), as at every start but the first; hivemind's server has none to check.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.beside.calls import DIM
from benchmarks.beside.figures import FLOOR, OURS, THEIRS, Figure, Figures, Target
from benchmarks.beside.running import ADAPTERS, ROOT, Failed, Options, get_environment, run_json, run_ours

METRICS = ("ready_s", "pss_mb", "processes", "import_s")
HOST, IMPORT = "host with one FFN", "import"
READY_S = 120.0
SETTLE_S = 5.0  # until what starts in the background is there
END_S = 5.0
GATED_WIDTH = 1_536
MODULES = {OURS: "daaswarm", THEIRS: "hivemind", FLOOR: "torch"}

TARGETS = (
    Target("6: host with one expert, PSS over hivemind's", Figure(OURS, HOST, "pss_mb"), 0.5,
           Figure(THEIRS, HOST, "pss_mb")),
    Target("6: start to ready over hivemind's", Figure(OURS, HOST, "ready_s"), 1.0, Figure(THEIRS, HOST, "ready_s")),
    Target("6: import daaswarm, s", Figure(OURS, IMPORT, "import_s"), 0.2),
)  # fmt: skip


def measure(library: str, options: Options, figures: Figures) -> None:
    """Start a host, wait until it says that it is ready, let it settle, weigh it."""
    hivemind = f"{options.hivemind / 'bin' / 'python'}"
    python = hivemind if library == THEIRS else sys.executable
    timed = f"import json, time; t = time.perf_counter(); import {MODULES[library]}"
    said = run_json(options, ["-c", f"{timed}; print(json.dumps({{'s': time.perf_counter() - t}}))"], python=python)
    figures.add(library, IMPORT, {"import_s": said[-1]["s"]})
    if library == FLOOR:
        return
    with tempfile.TemporaryDirectory(prefix="daaswarm-footprint-") as folder:
        if library == OURS:
            model = make_model(options, Path(folder) / "model")
            command = [python, "-m", "daaswarm", "host-expert", f"{model}", "--data-dir", f"{folder}/data", "--json"]
        else:
            serve = ["--serve", "--expert", "ffn", "--dim", f"{DIM}", "--handlers", f"{options.handlers}"]
            command = [python, f"{ADAPTERS / 'expert.py'}", *serve, "--threads", f"{options.threads}"]
        with start(command, options) as (process, ready_s):
            time.sleep(SETTLE_S)
            figures.add(library, HOST, {"ready_s": ready_s, **weigh(process.pid)})


def make_model(options: Options, folder: Path) -> Path:
    """In a process of its own: this one stays small."""
    sizes = f"num_hidden_layers=1, hidden_size={DIM}, intermediate_size={GATED_WIDTH}"
    code = "from pathlib import Path; from daaswarm.testing.checkpoints import make_tiny_checkpoint as make; "
    run_json(options, ["-c", f"{code} make('llama', Path({f'{folder}'!r}), {sizes}); print('{{}}')"])
    run_ours(options, "model", "prepare", f"{folder}")
    return folder


@contextlib.contextmanager
def start(command: list[str], options: Options) -> Iterator[tuple[subprocess.Popen[str], float]]:
    """A host in a group of its own, and the seconds from its start to its word that it is ready.

    Raises:
        Failed: it isn't ready in time.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        cwd=ROOT,
        env=get_environment(options),
    )
    try:
        wait_ready(process)
        yield process, time.perf_counter() - began
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(END_S)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def wait_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    watchdog = threading.Timer(READY_S, process.kill)  # then its line ends
    watchdog.start()
    try:
        for line in process.stdout:
            said: dict[str, Any] = json.loads(line)
            if "addrs" in said:
                return
    finally:
        watchdog.cancel()
    raise Failed(f"a host was not ready: {' '.join(process.args)}")  # type: ignore[arg-type]


def weigh(pid: int) -> dict[str, float]:
    """Of a process and all that it started. PSS counts what is shared in parts."""
    root = psutil.Process(pid)
    every = [root, *root.children(recursive=True)]
    return {"pss_mb": sum(each.memory_full_info().pss for each in every) / 1e6, "processes": len(every)}
