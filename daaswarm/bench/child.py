"""A node of a benchmark in a process of its own, which says a line of JSON at a time."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import trio

from daaswarm.errors import DaaswarmError
from daaswarm.messages import Contact

LINE_BYTES = 1 << 20  # of what it says at once


class Child:
    """``daaswarm`` with ``--json``, whose pipes are ours. ``process``: of :func:`start_process`."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self._data = bytearray()

    async def wait_ready(self, seconds: float, failure: DaaswarmError) -> Contact:
        """Where it is reached.

        Raises:
            DaaswarmError: ``failure``: it said something else, or nothing in time.
        """
        try:
            with trio.fail_after(seconds):
                event = await self.read()
            if event is not None:
                return Contact(peer_id=event["peer_id"], addrs=event["addrs"])
        except (trio.TooSlowError, msgspec.MsgspecError, KeyError) as error:
            raise failure from error
        raise failure

    async def read(self) -> dict[str, Any] | None:
        """What it says next; ``None`` if it ended, or says too much."""
        assert self.process.stdout is not None
        while b"\n" not in self._data:
            piece = await self.process.stdout.receive_some(65_536)
            if not piece or len(self._data) > LINE_BYTES:
                return None
            self._data += piece
        line, _, rest = bytes(self._data).partition(b"\n")
        self._data = bytearray(rest)
        return msgspec.json.decode(line, type=dict[str, Any])

    async def close(self) -> None:
        """End it at once, and leave nothing of it."""
        self.process.kill()
        with trio.CancelScope(shield=True):
            await self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe is not None
                await pipe.aclose()


async def start_process(*arguments: str) -> trio.Process:
    """``daaswarm ARGUMENTS --json`` with pipes."""
    command = [sys.executable, "-m", "daaswarm", *arguments, "--json"]
    return await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
