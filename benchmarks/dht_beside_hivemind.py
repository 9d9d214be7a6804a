"""``daaswarm bench dht`` and the same with hivemind, in turn on the same machine.

    bash benchmarks/hivemind/install.sh .venv-hivemind
    python -m benchmarks.dht_beside_hivemind --hivemind .venv-hivemind [--peers 64] [--rounds 3]

Writes one JSON line per run, and at the end the ratios of each round: ours over hivemind's, so below 1 is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

RUN_S = 1_200.0
PHASES = (
    ("before", "store_p50_ms"),
    ("before", "store_p99_ms"),
    ("before", "get_p50_ms"),
    ("before", "get_p99_ms"),
    ("after_old_keys", "get_p50_ms"),
    ("after_old_keys", "get_p99_ms"),
    ("after_new_keys", "store_p50_ms"),
    ("after_new_keys", "get_p50_ms"),
)


def run(library: str, command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=RUN_S, check=True)
    result = {"library": library, "load1": round(os.getloadavg()[0], 2), **json.loads(done.stdout.splitlines()[-1])}
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hivemind", type=Path, required=True, help="its virtual environment")
    parser.add_argument("--peers", type=int, default=64)
    parser.add_argument("--keys", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    common = ["--peers", str(arguments.peers), "--keys", str(arguments.keys), "--kill", "0.2"]
    script = Path(__file__).parent / "hivemind" / "dht.py"
    ratios: dict[str, list[float]] = {}
    for seed in range(1, arguments.rounds + 1):
        options = [*common, "--seed", str(seed)]
        theirs = run("hivemind", [str(arguments.hivemind / "bin" / "python"), str(script), *options])
        ours = run("daaswarm", [sys.executable, "-m", "daaswarm", "bench", "dht", *options, "--json"])
        for phase, name in PHASES:
            ratios.setdefault(f"{phase}.{name}", []).append(ours[phase][name] / theirs[phase][name])
    summary = {
        name: {"min": round(min(of), 3), "median": round(statistics.median(of), 3), "max": round(max(of), 3)}
        for name, of in ratios.items()
    }
    print(json.dumps({"ours_over_hivemind": summary}))


if __name__ == "__main__":
    main()
