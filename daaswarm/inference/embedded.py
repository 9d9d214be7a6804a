"""Hosts for one run: real host processes on loopback, started and stopped with the command that needs them."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import trio

from daaswarm.config import ENV_SWARM_KEY
from daaswarm.core.swarm_keys import SwarmKey
from daaswarm.errors import DaaswarmError, ModelError, unwrap_groups
from daaswarm.types import Dtype, format_range

START_S = 120.0  # importing torch and reading a slow disk; a host that failed says so at once
STOP_S = 5.0  # a clean leave; then the process is killed
EVENT_BYTES = 1 << 20  # one line of a child's output
UNLIMITED = "1000TB"  # of experts: what they hold, the ranges given to them say
NOT_THEIRS = (  # settings of this node that a host of its own must not have: addresses, and whom it pauses for
    "HOME",
    "NETWORK_BOOTSTRAP",
    "NETWORK_LISTEN",
    "NETWORK_ANNOUNCE",
    "NETWORK_SWARM_KEY_FILE",
    "NETWORK_ALLOW",
    "SWARM_KEY",
    "HOST_QUIET_HOURS",
    "HOST_PAUSE_WHEN_BUSY",
    "HOST_UPLOAD",
)
SAID_PIECES = 256  # of the children's messages waiting to be shown, at most 64 KiB each; then they are dropped

# Ctrl-C in the terminal reaches us alone; we stop them.
_APART: dict[str, Any] = (
    {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if sys.platform == "win32" else {"start_new_session": True}
)


@dataclass(frozen=True)
class EmbeddedHost:
    """A host process of ours."""

    process: trio.Process
    peer_id: str
    addrs: list[str]
    layers: list[int]
    experts: list[int] | None


def split_evenly(layers: dict[int, int], hosts: int, *, across: bool) -> list[tuple[list[int], list[int] | None]]:
    """Which (layers, experts) each of ``hosts`` hosts serves; ``None``: all experts of those layers.

    ``across`` cuts every layer over all hosts (they compute at the same time); otherwise each host has whole
    layers (one call a layer), unless there are fewer layers than hosts.
    """
    numbers = sorted(layers)
    fewest = min(layers.values())
    if (across or len(numbers) < hosts) and fewest >= hosts:
        most = max(layers.values())
        bounds = [most * i // hosts for i in range(hosts + 1)]
        return [(numbers, list(range(a, b))) for a, b in itertools.pairwise(bounds)]
    hosts = min(hosts, len(numbers))
    bounds = [len(numbers) * i // hosts for i in range(hosts + 1)]
    return [(numbers[a:b], None) for a, b in itertools.pairwise(bounds)]


@asynccontextmanager
async def run_embedded_hosts(
    model: str,
    kind: str,
    layers: dict[int, int],
    *,
    count: int,
    bootstrap: list[str],
    swarm: str,
    swarm_key: SwarmKey | None,
    dtype: Dtype,
    across: bool,
    threads: int,
) -> AsyncIterator[list[EmbeddedHost]]:
    """Start ``count`` host processes and wait until all are ready; stop them at the end.

    Raises:
        ModelError: a host refused the model (its own message).
        DaaswarmError: a host could not start.
    """
    plans = split_evenly(layers, count, across=across)
    with tempfile.TemporaryDirectory(prefix="daaswarm-") as folder:
        hosts: list[EmbeddedHost] = []
        processes: list[trio.Process] = []
        try:
            with unwrap_groups():
                async with trio.open_nursery() as nursery:
                    said, to_show = trio.open_memory_channel[bytes](SAID_PIECES)
                    nursery.start_soon(_show, to_show)

                    async def start(number: int, held: tuple[list[int], list[int] | None]) -> None:
                        command = [sys.executable, "-m", "daaswarm", "host-expert", model, "--json"]
                        command += ["--until-eof", "--data-dir", str(Path(folder) / str(number)), "--dtype", dtype]
                        command += ["--layers", format_range(held[0])]
                        if held[1] is not None:
                            command += ["--experts" if kind == "moe" else "--slices", format_range(held[1])]
                        for address in bootstrap:
                            command += ["--bootstrap", address]
                        environment = {**os.environ, "DAASWARM_NETWORK_LIBP2P": "false"}
                        environment |= {"DAASWARM_NETWORK_SWARM": swarm, "DAASWARM_HOST_THREADS": str(threads)}
                        environment["DAASWARM_HOST_MEMORY"] = UNLIMITED
                        for name in NOT_THEIRS:
                            environment.pop(f"DAASWARM_{name}", None)  # this node's, not theirs
                        if swarm_key is not None:
                            environment |= {ENV_SWARM_KEY: swarm_key.text, "DAASWARM_NETWORK_SWARM": swarm_key.swarm_id}
                        process = await trio.lowlevel.open_process(
                            command,
                            stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE,
                            env=environment,
                            **_APART,
                        )
                        processes.append(process)
                        nursery.start_soon(_drain, process, said)
                        ready = await _wait_ready(process, number)
                        hosts.append(EmbeddedHost(process, ready["peer_id"], ready["addrs"], *held))

                    async with trio.open_nursery() as starting:
                        for number, held in enumerate(plans):
                            starting.start_soon(start, number, held)
                    for process in processes:
                        nursery.start_soon(_drain_stdout, process)
                    yield hosts
                    await _stop(processes)
                    nursery.cancel_scope.cancel()
        finally:
            for process in processes:  # after an error or a cancellation
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + STOP_S):
                for process in processes:
                    await process.wait()
                    for pipe in (process.stdin, process.stdout, process.stderr):
                        if pipe is not None:
                            await pipe.aclose()


async def _wait_ready(process: trio.Process, number: int) -> dict[str, Any]:
    assert process.stdout is not None
    buffer = bytearray()
    with trio.move_on_after(START_S):
        while True:
            data = await process.stdout.receive_some(65_536)
            if not data:
                await process.wait()
                raise DaaswarmError(
                    f"embedded host {number} stopped with exit code {process.returncode} before it was ready",
                    hint="run daaswarm host-expert by hand to see why",
                )
            buffer += data
            if len(buffer) > EVENT_BYTES:
                raise DaaswarmError(f"embedded host {number} wrote too much", hint="report this")
            *lines, rest = bytes(buffer).split(b"\n")
            buffer = bytearray(rest)
            for line in lines:
                event = msgspec.json.decode(line, type=dict[str, Any])
                if "error" in event:
                    error = event["error"]
                    kind = ModelError if error["code"] == ModelError.code else DaaswarmError
                    raise kind(error["message"], hint=error["hint"])
                if event.get("event") == "ready":
                    return event
    raise DaaswarmError(f"embedded host {number} was not ready within {START_S:.0f} s", hint="is the machine busy?")


async def _drain(process: trio.Process, said: trio.MemorySendChannel[bytes]) -> None:
    """Take what a child says, so that its pipe never fills: a host that can't say something must not stand still."""
    assert process.stderr is not None
    async for data in process.stderr:
        with contextlib.suppress(trio.WouldBlock):  # whoever reads our standard error is far behind
            said.send_nowait(bytes(data))


async def _show(to_show: trio.MemoryReceiveChannel[bytes]) -> None:
    """Pass the children's messages on to our standard error; in a thread, since its reader may have stopped."""
    async for data in to_show:
        with contextlib.suppress(OSError):  # nobody can be told
            await trio.to_thread.run_sync(os.write, 2, data, abandon_on_cancel=True)


async def _drain_stdout(process: trio.Process) -> None:
    assert process.stdout is not None
    with contextlib.suppress(trio.ClosedResourceError, trio.BrokenResourceError, trio.BusyResourceError):
        async for _ in process.stdout:
            pass


async def _stop(processes: list[trio.Process]) -> None:
    for process in processes:
        if process.stdin is not None:
            await process.stdin.aclose()  # end of file: leave
    with trio.move_on_after(STOP_S):
        for process in processes:
            await process.wait()
