"""daaswarm, hivemind and the floor (bare torch, bare TCP), in turn on the same machine, several rounds.

    bash benchmarks/hivemind/install.sh .venv-hivemind
    python -m benchmarks.beside_hivemind --hivemind .venv-hivemind [--rounds 3] [--scenario identity ...]

The order of the three changes from round to round. Figures are min / median / max over the rounds; a ratio is of two
figures of one round. What has to be shown is printed beside what was measured. Progress goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.beside import calls, footprint, mixture
from benchmarks.beside.figures import LIBRARIES, Figures, Target, format_figures, format_verdicts
from benchmarks.beside.plot import draw, is_possible
from benchmarks.beside.running import Failed, Options


class Scenario(NamedTuple):
    """``metrics``: those that are kept."""

    measure: Callable[[str, Options, Figures], None]
    metrics: Sequence[str]
    targets: Sequence[Target]


SCENARIOS = {
    "identity": Scenario(calls.measure_identity, calls.METRICS[:3], calls.IDENTITY_TARGETS),
    "ffn": Scenario(calls.measure_ffn, calls.METRICS, calls.FFN_TARGETS),
    "footprint": Scenario(footprint.measure, footprint.METRICS, footprint.TARGETS),
    "mixture": Scenario(mixture.measure, mixture.METRICS, mixture.TARGETS),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hivemind", type=Path, required=True, help="its virtual environment")
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--threads", type=int, default=0, help="of torch in each process; 0 leaves it to torch")
    parser.add_argument("--handlers", type=int, default=4, help="hivemind's connection handlers")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of tables")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG; needs matplotlib, the extra plots")
    arguments = parser.parse_args()
    if not (arguments.hivemind / "bin" / "python").exists():
        parser.error(f"{arguments.hivemind} has no hivemind: bash benchmarks/hivemind/install.sh {arguments.hivemind}")
    if arguments.plot is not None and not is_possible():
        parser.error('--plot needs matplotlib: pip install "daaswarm[plots]"')
    options = Options(arguments.hivemind.absolute(), arguments.seconds, arguments.threads, arguments.handlers)
    result: dict[str, Any] = {"machine": describe_machine(options), "rounds": arguments.rounds, "scenarios": {}}
    figures = {name: Figures(SCENARIOS[name].metrics) for name in arguments.scenario}
    for number in range(arguments.rounds):
        for name in arguments.scenario:
            measure_round(name, number, options, figures[name])
    result["machine"]["load_after"] = get_load()
    for name, measured in figures.items():
        result["scenarios"][name] = measured.to_json(SCENARIOS[name].targets)
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    if arguments.plot is not None:
        verdicts = [verdict for name in figures for verdict in figures[name].judge(SCENARIOS[name].targets)]
        draw(arguments.plot, figures, verdicts, f"{arguments.rounds} rounds, median, min and max; {machine}")
    if arguments.json:
        print(json.dumps(result))
    else:
        print(machine)
        for name, measured in figures.items():
            print(f"\n{name}, {arguments.rounds} rounds, min / median / max\n")
            print(format_figures(measured), end="\n\n")
            print(format_verdicts(measured.judge(SCENARIOS[name].targets)))
    return 0


def measure_round(name: str, number: int, options: Options, figures: Figures) -> None:
    """The three libraries one after the other; another one begins each round."""
    figures.rounds.append({})
    shift = number % len(LIBRARIES)
    for library in LIBRARIES[shift:] + LIBRARIES[:shift]:
        began = time.perf_counter()
        problem = ""
        try:
            SCENARIOS[name].measure(library, options, figures)
        except Failed as error:  # the others are worth knowing
            problem = f": {error}"
        took = time.perf_counter() - began
        print(f"round {number + 1}, {name}, {library}: {took:.0f} s, load {get_load()}{problem}", file=sys.stderr)


def describe_machine(options: Options) -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "threads": options.threads or "torch's choice",
        "load_before": get_load(),
    }


def get_load() -> float:
    return round(os.getloadavg()[0], 2)


if __name__ == "__main__":
    sys.exit(main())
