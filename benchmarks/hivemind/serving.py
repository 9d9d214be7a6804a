"""hivemind's server with one expert, in a process group of its own, and what its clients need to reach it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FFN_RATIO = 4  # intermediate width over model width, as in daaswarm.bench.expert_calls
MAX_BATCH = 65_536  # rows that hivemind may compute together: never what limits it here
START_S = 90  # not ready by then: it hangs, as hivemind 1.1.12 sometimes does at start
END_S = 5.0


def build(kind: str, dim: int) -> Any:
    """The same arithmetic as daaswarm's benchmark: identity, or dim → 4 dim → dim with a GELU and without biases."""
    import torch

    if kind == "nop":

        class Nop(torch.nn.Module):
            def forward(self, rows: torch.Tensor) -> torch.Tensor:
                return rows.clone()  # hivemind can't return its input

        return Nop()
    torch.manual_seed(0)
    up, down = (torch.nn.Linear(*size, bias=False) for size in ((dim, FFN_RATIO * dim), (FFN_RATIO * dim, dim)))
    return torch.nn.Sequential(up, torch.nn.GELU(), down)


def serve(kinds: dict[str, str], dim: int, handlers: int, threads: int, peers: list[str]) -> None:
    """One hivemind server with these experts (name → kind), until standard input ends. Says where it is first."""
    signal.signal(signal.SIGALRM, lambda number, frame: os.killpg(os.getpgid(0), signal.SIGKILL))
    signal.alarm(START_S)
    tempfile.gettempdir()  # hivemind 1.1.12 can deadlock at start: it forks while a thread holds tempfile's lock
    started = time.perf_counter()
    import torch

    if threads:
        torch.set_num_threads(threads)
    import hivemind
    from hivemind.moe import ModuleBackend, Server
    from hivemind.utils.tensor_descr import BatchTensorDescriptor

    dht = hivemind.DHT(initial_peers=peers, start=True, startup_timeout=60)
    rows = BatchTensorDescriptor(dim)
    backends = {
        name: ModuleBackend(name, build(kind, dim), args_schema=(rows,), outputs_schema=rows, max_batch_size=MAX_BATCH)
        for name, kind in kinds.items()
    }
    server = Server(dht, backends, num_connection_handlers=handlers)
    server.run_in_background(await_ready=True)
    ready = {
        "addrs": [str(addr) for addr in dht.get_visible_maddrs()],
        "peer_id": dht.peer_id.to_base58(),
        "ready_s": round(time.perf_counter() - started, 3),
        "threads": torch.get_num_threads(),
    }
    signal.alarm(0)
    print(json.dumps(ready), flush=True)
    sys.stdin.read()
    os.killpg(os.getpgid(0), signal.SIGKILL)


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    """``script ARGUMENTS`` as the leader of a group, with pipes."""
    return subprocess.Popen(
        [sys.executable, str(Path(script).resolve()), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # its daemons talk to the last
        start_new_session=True,
        text=True,
    )


def leave(code: int) -> None:
    """End this process and all that hivemind started in it, which neither end by themselves."""
    import psutil

    sys.stdout.flush()
    sys.stderr.flush()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(code)


def stop(process: subprocess.Popen[str]) -> None:
    """The whole group, at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(END_S)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
