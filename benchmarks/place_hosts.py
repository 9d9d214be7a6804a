"""Six real hosts on this machine, each given only a memory, one after the other; then one leaves and another comes.

    python benchmarks/place_hosts.py [--memory 107MB]

Writes one JSON line after each step: how many replicas the rarest and the commonest expert have, and at the end how
many experts those who stayed have loaded anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.swarm import Node, get_command, get_environment

MODEL = "smollm2-135m-instruct"
EXPERTS = 240
HOSTS = 6
COMMAND_S = 120.0

Held = dict[str, set[tuple[int, int]]]


def look(address: str, folder: Path) -> Held:
    """Who holds which (layer, expert), as the swarm says."""
    command = get_command(
        "expert", "list", "--available", "--model", MODEL, "--bootstrap", address, "--data-dir", str(folder)
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, env=get_environment())
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    hosts: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["hosts"]
    return {
        host["peer_id"]: {(int(layer), e) for layer, experts in host["held"].items() for e in experts} for host in hosts
    }


def tell(step: str, held: Held, **more: Any) -> None:
    counts = Counter(expert for experts in held.values() for expert in experts)
    replicas = [*counts.values(), *([0] * (EXPERTS - len(counts)))]
    line = {"step": step, "hosts": len(held), "covered": len(counts), "least": min(replicas), "most": max(replicas)}
    print(json.dumps({**line, **more, "load": round(os.getloadavg()[0], 2)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", default="107MB", help="of each host; six of 107MB hold everything twice")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        nodes: list[Node] = []

        def start(number: int) -> None:
            near = ("--bootstrap", nodes[0].addrs[0]) if nodes else ()
            place = Path(folder) / f"host{number}"
            node = Node(f"host{number}", place, "host-expert", MODEL, "--memory", options.memory, *near)
            node.start()
            stack.callback(node.stop)
            node.wait_ready()
            nodes.append(node)

        asker = Path(folder) / "asker"
        for number in range(HOSTS):
            start(number)
            tell(f"host {number + 1} came", look(nodes[0].addrs[0], asker))
        before = look(nodes[0].addrs[0], asker)
        nodes[3].stop()
        tell("host 4 left", look(nodes[0].addrs[0], asker))
        start(HOSTS)
        after = look(nodes[0].addrs[0], asker)
        moved = sum(len(after[peer] - before[peer]) for peer in before.keys() & after.keys())
        total = sum(map(len, after.values()))
        tell("host 7 came", after, moved=moved, moved_share=round(moved / total, 4))


if __name__ == "__main__":
    main()
