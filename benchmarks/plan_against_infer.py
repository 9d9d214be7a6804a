"""Does ``daaswarm plan`` predict what ``daaswarm infer`` then does? Two real hosts here, half of a model each.

    python benchmarks/plan_against_infer.py [--delay-ms 25] [--rounds 3] [--tokens 48]

``--delay-ms`` puts a TCP relay before each host that holds every byte back that long, each way: 25 is a round trip of
50 ms. Writes one JSON line a round: what was predicted, what was measured, and how busy the machine was.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.swarm import Node, get_command

MODEL = "smollm2-135m-instruct"
PROMPT = "What is a hash table, and when should one use it?"
PARTS = ("0-14", "15-29")
COMMAND_S = 600.0


def get_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("DAASWARM_") or k == "DAASWARM_CACHE"}


class Relay:
    """A TCP port on loopback that hands everything on after a delay, which may change at any time."""

    def __init__(self, port: int, delay_s: float) -> None:
        self._target = port
        self.delay_s = delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # the host isn't there yet, or no more
                near.close()
                continue
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._join(near, far)
            self._join(far, near)

    def _join(self, source: socket.socket, target: socket.socket) -> None:
        held: queue.Queue[tuple[float, bytes]] = queue.Queue()

        def read() -> None:
            data = b"?"
            while data:
                try:
                    data = source.recv(1 << 16)
                except OSError:
                    data = b""
                held.put((time.monotonic() + self.delay_s, data))

        def write() -> None:
            while True:
                due, data = held.get()
                time.sleep(max(0.0, due - time.monotonic()))
                try:
                    if not data:
                        target.shutdown(socket.SHUT_WR)
                        return
                    target.sendall(data)
                except OSError:
                    return

        threading.Thread(target=read, daemon=True).start()
        threading.Thread(target=write, daemon=True).start()


def ask(*arguments: str) -> dict[str, Any]:
    """The result of one command, and what it said about splitting."""
    done = subprocess.run(
        get_command(*arguments), capture_output=True, text=True, timeout=COMMAND_S, env=get_environment()
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    warnings = [line["text"] for line in lines if line.get("text", "").startswith("warning")]
    return {**lines[-1], "warnings": warnings}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--delay-ms", type=float, default=0.0, help="each way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        addresses: list[str] = []
        for number, layers in enumerate(PARTS):
            port = free_port()
            outside = Relay(port, options.delay_ms / 1e3).port if options.delay_ms else port
            node = Node(
                f"host{number}",
                Path(folder) / f"host{number}",
                *("host-expert", MODEL, "--layers", layers, "--listen", f"/ip4/127.0.0.1/tcp/{port}"),
                *("--announce", f"/ip4/127.0.0.1/tcp/{outside}"),
                *(part for address in addresses[:1] for part in ("--bootstrap", address)),
            )
            node.start()
            stack.callback(node.stop)
            node.wait_ready()
            addresses.append(node.addrs[0])
        swarm = ("--bootstrap", addresses[0], "--data-dir", str(Path(folder) / "asker"))
        for _ in range(options.rounds):
            load = os.getloadavg()[0]
            answered = ask("infer", PROMPT, "--model", MODEL, "--max-tokens", str(options.tokens), *swarm)
            plan = ask("plan", MODEL, "--prompt-tokens", str(answered["prompt_tokens"]), *swarm)
            again = ask("infer", PROMPT, "--model", MODEL, "--max-tokens", str(options.tokens), *swarm)
            sharded = next(option for option in plan["options"] if option["way"] == "sharded")
            tokens = again["completion_tokens"]
            predicted = tokens / (sharded["prefill_s"] + (tokens - 1) * sharded["token_ms"] / 1e3)
            measured = [round(answer["tokens_per_s"], 2) for answer in (answered, again)]
            mean = sum(measured) / 2
            print(
                json.dumps(
                    {
                        "predicted_tokens_per_s": round(predicted, 2),
                        "measured_before_and_after": measured,
                        "off_by": round(predicted / measured[1] - 1, 3),  # from what was then measured
                        "off_by_of_both": round(predicted / mean - 1, 3),
                        "round_ms": [peer["round_ms"] for peer in plan["peers"]],
                        "sharded_token_ms": sharded["token_ms"],
                        "prefill_s": [sharded["prefill_s"], again["time_to_first_token_s"]],
                        "here": plan["here"],
                        "verdict": plan["verdict"]["text"],
                        "warnings": again["warnings"],
                        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
