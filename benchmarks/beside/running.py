"""Starts what measures: ours and the floor with this Python, hivemind's adapters with its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ADAPTERS = ROOT / "benchmarks" / "hivemind"
TOLD = 1_000  # characters of what a command that failed said
RUN_S = 900.0  # of one command: ten hosts of hivemind take minutes to start on a small machine


@dataclass(frozen=True)
class Options:
    """``threads``: of torch in each process that computes; 0 leaves the choice to torch, on all sides."""

    hivemind: Path
    seconds: float = 3.0
    threads: int = 0
    handlers: int = 4


class Failed(Exception):
    """A command measured nothing; the text says which and why."""


def run_ours(options: Options, *arguments: str) -> dict[str, Any]:
    """``daaswarm ARGUMENTS --json``; its last line."""
    return run_json(options, ["-m", "daaswarm", *arguments, "--json"])[-1]


def run_hivemind(options: Options, script: str, *arguments: str, handlers: int | None = None) -> list[dict[str, Any]]:
    """One of our adapters in hivemind's environment; its lines."""
    common = ["--threads", f"{options.threads}", "--handlers", f"{handlers or options.handlers}"]
    python = f"{options.hivemind / 'bin' / 'python'}"
    return run_json(options, [str(ADAPTERS / script), *arguments, *common], python=python)


def run_json(options: Options, arguments: list[str], python: str = sys.executable) -> list[dict[str, Any]]:
    """The lines of JSON that a command writes.

    Raises:
        Failed: it failed, said nothing or took too long.
    """
    what = " ".join(arguments)
    with tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(
                [python, *arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=RUN_S,
                cwd=ROOT,
                env=get_environment(options),
            )
        except subprocess.TimeoutExpired as error:
            raise Failed(f"{what}: not done after {RUN_S:g} s") from error
        errors.seek(0)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            said = f"{done.stdout[-TOLD:]} {errors.read()[-TOLD:]}"  # with --json, an error is on standard output
            raise Failed(f"{what}: code {done.returncode}: {said.strip()}")
    return lines


def get_environment(options: Options) -> dict[str, str]:
    """Nobody's settings but those of this run, the same on all sides. Threads of OpenMP that wait don't spin, which
    daaswarm asks for by itself: where processes share cores, hivemind and bare torch lose more by it than we do."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DAASWARM_")}
    kept.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if options.threads:
        kept["DAASWARM_HOST_THREADS"] = f"{options.threads}"
    return kept
