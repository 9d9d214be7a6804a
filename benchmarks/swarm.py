"""Nodes as real processes, for long runs: start, disturb, measure, and keep what they said on standard error."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil

START_S = 180.0  # until a node is ready; two cores, several processes importing torch
STOP_S = 30.0  # of a node that was told to stop: it finishes the calls in flight
STATUS_S = 30.0  # of `daaswarm status` on a busy machine
LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\dT\S+Z (DEBUG|INFO|WARNING|ERROR|CRITICAL) ")
QUIET_LEVELS = ("DEBUG", "INFO", "WARNING")


def get_environment() -> dict[str, str]:
    """This process's, without the user's settings; one thread a process, since all share the machine."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DAASWARM_") or k == "DAASWARM_CACHE"}
    return {**environment, "DAASWARM_HOST_THREADS": "1", "DAASWARM_INFER_THREADS": "1"}


def get_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "daaswarm", *arguments, "--json"]


class Log:
    """Lines of standard error, sorted. ``unexpected``: records above warning and lines that are no log records."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.warnings = 0
        self.unexpected: list[str] = []
        self._level = ""  # of the record that further lines (a traceback) belong to

    def add(self, line: str) -> None:
        found = LOG_LINE.match(line)
        if found:
            self._level = found[1]
            self.warnings += self._level == "WARNING"
        if self._level not in QUIET_LEVELS and line.strip():
            self.unexpected.append(f"{self.name}: {line.rstrip()}")


class Sample(NamedTuple):
    """What one process holds at one moment."""

    rss_bytes: int
    files: int
    threads: int
    tasks: int


class Node:
    """One long-lived ``daaswarm`` process with a data directory; it can be killed, frozen and started again."""

    def __init__(self, name: str, folder: Path, *arguments: str) -> None:
        self.name = name
        self.folder = folder
        self.arguments = arguments
        self.log = Log(name)
        self.starts = 0
        self.faults: list[str] = []  # what a node must never do, by its own doing
        self.frozen = False
        self.addrs: list[str] = []
        self._process: subprocess.Popen[str] | None = None
        self._ready = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start it; see :meth:`wait_ready`."""
        self._ready.clear()
        self.starts += 1
        process = self._process = subprocess.Popen(
            get_command(*self.arguments, "--data-dir", str(self.folder)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=get_environment(),
        )
        self._threads = [
            threading.Thread(target=self._read_events, args=(process,)),
            threading.Thread(target=self._read_log, args=(process,)),
        ]
        for thread in self._threads:
            thread.start()

    def wait_ready(self, timeout_s: float = START_S) -> float:
        """Until it said that it is ready; the seconds that took.

        Raises:
            RuntimeError: it ended, or took too long.
        """
        begin = time.monotonic()
        while not self._ready.wait(0.2):
            if self._process is None or self._process.poll() is not None:
                self._join_readers()
                raise RuntimeError(f"{self.name} ended before it was ready: {self.log.unexpected[-20:]}")
            if time.monotonic() - begin > timeout_s:
                raise RuntimeError(f"{self.name} was not ready within {timeout_s:g} s")
        return time.monotonic() - begin

    def kill(self) -> None:
        """As a crash, or the machine's power, would."""
        assert self._process is not None
        if self._process.poll() is not None:
            self.faults.append(f"{self.name} had ended by itself with code {self._process.returncode}")
        self._process.kill()
        self._process.wait()
        self._join_readers()

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        self.frozen = True

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
        self.frozen = False

    def stop(self) -> None:
        """Ask it to leave, as ``kill`` does; anything but a clean end is a fault."""
        if self._process is None:
            return
        if self._process.poll() is not None:
            self.faults.append(f"{self.name} had ended by itself with code {self._process.returncode}")
            self._join_readers()
            return
        if self.frozen:
            self.thaw()
        self._process.terminate()
        try:
            code = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.faults.append(f"{self.name} did not end within {STOP_S:g} s of being told to")
            self.kill()
            return
        if code:
            self.faults.append(f"{self.name} ended with code {code} when told to stop")
        self._join_readers()

    def sample(self) -> Sample | None:
        """``None`` while it isn't running, or is frozen, or can't say."""
        if self._process is None or self.frozen or not self._ready.is_set():
            return None
        try:
            process = psutil.Process(self._process.pid)
            with process.oneshot():
                rss, files, threads = process.memory_info().rss, process.num_fds(), process.num_threads()
        except psutil.Error:
            return None
        status = ask("status", "--data-dir", str(self.folder), timeout_s=STATUS_S)
        if status.code or not status.result.get("running"):
            return None
        return Sample(rss, files, threads, status.result["tasks"])

    def _read_events(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                event = json.loads(line)
                if event.get("event") == "ready":
                    self.addrs = event["addrs"]
                    self._ready.set()
        if self._process is process:
            self._ready.clear()

    def _read_log(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                self.log.add(line)

    def _join_readers(self) -> None:
        for thread in self._threads:
            thread.join(10)


class Done(NamedTuple):
    """A command that has ended: exit code (-1: it hung and was killed), its last JSON line, standard error."""

    code: int
    result: dict[str, Any]
    errors: str


def ask(*arguments: str, timeout_s: float) -> Done:
    """Run one command to its end."""
    with subprocess.Popen(
        get_command(*arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=get_environment(),
    ) as process:
        try:
            out, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            _, errors = process.communicate()
            return Done(-1, {}, errors)
    result: dict[str, Any] = {}
    with contextlib.suppress(ValueError, IndexError):
        result = json.loads(out.splitlines()[-1])
    return Done(process.returncode, result, errors)
