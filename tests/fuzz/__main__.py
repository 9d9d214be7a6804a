"""Coverage-guided fuzzing with atheris: ``python -m tests.fuzz --minutes 10``, or ``make fuzz``.

Each target has its share of the time in a process of its own, which libFuzzer ends at the first finding and leaves the
input as ``crash-*`` in the folder of findings. Prints a table and, as the last line, JSON; exits non-zero on a finding.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MEMORY_MIB = 1024  # of a process; the targets need under 200. One single allocation may take an eighth of it
INPUT_BYTES = 4096  # no longer ones: they only say the same more often
SLOW_S = 10  # one input that takes longer is a finding

STATUS = re.compile(r"cov: (\d+) ft: (\d+)")
EXECUTED = re.compile(r"stat::number_of_executed_units:\s+(\d+)")
FINDING = re.compile(r"(=== Uncaught Python|ERROR: libFuzzer).{0,2000}", re.DOTALL)
WRITTEN = re.compile(r"Test unit written to .*")
PEAK = re.compile(r"stat::peak_rss_mb:\s+(\d+)")


def fuzz(name: str, options: list[str]) -> None:
    """Fuzz one target in this process; doesn't return."""
    import importlib

    atheris: Any = importlib.import_module("atheris")  # its names are made when it's imported
    with atheris.instrument_imports(include=["daaswarm"], enable_loader_override=False):
        from tests.fuzz.targets import TARGETS
    target, _ = TARGETS[name]
    atheris.Setup([sys.argv[0], *options], target)
    atheris.Fuzz()


def run(name: str, seeds: list[bytes], seconds: int, folder: Path, findings: Path) -> dict[str, Any]:
    """Fuzz one target in a process of its own; its figures."""
    corpus = folder / name
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={INPUT_BYTES}",
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-malloc_limit_mb={MEMORY_MIB // 8}",
        f"-timeout={SLOW_S}",
        f"-artifact_prefix={findings}/{name}-",
        "-print_final_stats=1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--target", name, "--", *options, str(corpus)],
        capture_output=True,
        text=True,
        errors="replace",
    )
    said = done.stdout + done.stderr
    covered = STATUS.findall(said)
    figures = {
        "target": name,
        "seconds": seconds,
        "executed": int(_get_last(EXECUTED.findall(said))),
        "edges": int(covered[-1][0]) if covered else 0,
        "features": int(covered[-1][1]) if covered else 0,
        "peak_rss_mb": int(_get_last(PEAK.findall(said))),
        "finding": None,
    }
    if done.returncode:
        found = FINDING.search(said)
        figures["finding"] = (found[0] if found else said[-2000:]) + "".join(WRITTEN.findall(said))
    return figures


def _get_last(found: list[str]) -> str:
    return found[-1] if found else "0"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of all targets together")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="where inputs are left")
    parser.add_argument("--target", help="fuzz only this, in this process, with libFuzzer's options")
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_args()
    if arguments.target:
        fuzz(arguments.target, arguments.options)
    from tests.fuzz.targets import TARGETS

    arguments.findings.mkdir(exist_ok=True)
    seconds = max(1, int(arguments.minutes * 60 / len(TARGETS)))
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="daaswarm-fuzz-") as folder:
        for name, (_, seeds) in TARGETS.items():
            results.append(run(name, seeds, seconds, Path(folder), arguments.findings))
            line = "{target:<14} {executed:>10,} runs {edges:>6} edges {features:>6} features {peak_rss_mb:>5} MB"
            print(line.format(**results[-1]), results[-1]["finding"] or "", file=sys.stderr, flush=True)
    print(json.dumps(results))
    return int(any(result["finding"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
