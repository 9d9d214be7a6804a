"""Runs ``daaswarm`` as a user does: real processes, real sockets on loopback, a data directory each."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

START_S = 120  # a machine with two cores, several processes importing torch
ANSWER_S = 180
PROGRAM = ("-m", "daaswarm")


def get_environment(**extra: str) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DAASWARM_") or k == "DAASWARM_CACHE"}
    return {**environment, "DAASWARM_HOST_THREADS": "1", "DAASWARM_INFER_THREADS": "1", **extra}


def run(
    *arguments: str, input: str | None = None, timeout: float = ANSWER_S, prefix: Sequence[str] = (), **extra: str
) -> Any:
    """One command to its end; ``prefix``: what comes before it, as ``ip netns exec NAME``."""
    return subprocess.run(
        [*prefix, sys.executable, "-m", "daaswarm", *arguments],
        input=input,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=get_environment(**extra),
    )


def run_json(*arguments: str, code: int = 0, **kwargs: Any) -> dict[str, Any]:
    """One command with --json; its last line."""
    done = run(*arguments, "--json", **kwargs)
    assert done.returncode == code, (done.returncode, done.stdout[-2000:], done.stderr[-4000:])
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines, done.stderr
    return lines[-1]


class Running:
    """A command that runs for a while; its JSON lines can be waited for."""

    def __init__(
        self, *arguments: str, prefix: Sequence[str] = (), program: Sequence[str] = PROGRAM, **extra: str
    ) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, *program, *arguments, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=get_environment(**extra),
        )
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.errors: list[str] = []
        self._threads = [threading.Thread(target=self._read_out), threading.Thread(target=self._read_errors)]
        for thread in self._threads:
            thread.start()

    def _read_out(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(json.loads(line))
        self.lines.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors += list(self.process.stderr)

    def wait_for(self, event: str, timeout: float = START_S) -> dict[str, Any]:
        """The next line that is this event."""
        while True:
            line = self.lines.get(timeout=timeout)
            assert line is not None, f"ended before {event}: {''.join(self.errors)[-4000:]}"
            if line.get("event") == event:
                return line

    def wait(self, timeout: float = ANSWER_S) -> tuple[int, dict[str, Any]]:
        """To its end: exit code and last line."""
        code = self.process.wait(timeout)
        last: dict[str, Any] = {}
        while (line := self.lines.get(timeout=10)) is not None:
            last = line
        return code, last

    def stop(self, number: int = signal.SIGTERM, timeout: float = 20) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(timeout)
        self._close()
        return code

    def _close(self) -> None:
        for thread in self._threads:
            thread.join(10)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


@contextlib.contextmanager
def running(
    *arguments: str, prefix: Sequence[str] = (), program: Sequence[str] = PROGRAM, **extra: str
) -> Iterator[Running]:
    """A command until the end of the block, then SIGKILL if it still runs."""
    command = Running(*arguments, prefix=prefix, program=program, **extra)
    try:
        yield command
    finally:
        command.stop(signal.SIGKILL)


@contextlib.contextmanager
def swarm(folder: Path, model: str, *held: list[str]) -> Iterator[tuple[str, list[Running]]]:
    """One ``join`` and a ``host-expert`` for each of ``held`` (its options), all ready; (bootstrap address, hosts)."""
    with contextlib.ExitStack() as stack:
        joined = stack.enter_context(running("join", "--data-dir", str(folder / "join")))
        bootstrap = joined.wait_for("ready")["addrs"][0]
        hosts = [
            stack.enter_context(
                running(
                    "host-expert", model, *options, "--bootstrap", bootstrap, "--data-dir", str(folder / f"host{i}")
                )
            )
            for i, options in enumerate(held)
        ]
        for host in hosts:
            host.wait_for("ready")
        yield bootstrap, hosts
