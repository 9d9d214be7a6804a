"""What nothing on this machine can beat: the bare arithmetic in torch, and the bare bytes over a TCP connection.

    python -m benchmarks.beside.floor --dim 576

A line of JSON for each figure. Started by ``benchmarks.beside_hivemind``, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional

FFN_RATIO = 4  # as in daaswarm.bench.expert_calls
WARM = 20  # calls
HEAD_BYTES = 4  # a length, before the rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help="echo what one connection sends")
    parser.add_argument("--dim", type=int, default=576)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 128], help="of the torch figures")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.serve:
        echo()
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    write("echo", 1, measure_echo(4 * arguments.dim, arguments.seconds))
    choices = sorted({1, torch.get_num_threads()})  # the better one is the floor: one thread often is on busy cores
    for rows in arguments.rows:
        measured = []
        for threads in choices:
            torch.set_num_threads(threads)
            measured.append((measure_torch(arguments.dim, rows, arguments.seconds / len(choices)), threads))
        latencies, threads = min(measured, key=lambda each: statistics.median(each[0]))
        torch.set_num_threads(threads)
        write("ffn", rows, latencies)


def write(what: str, rows: int, latencies: list[float]) -> None:
    """Calls and rows a second are of one after the other: nothing waits in between."""
    ordered = sorted(latencies)
    figures = {
        "calls_per_s": round(len(ordered) / sum(ordered), 1),
        "rows_per_s": round(rows * len(ordered) / sum(ordered), 1),
        "p50_ms": round(statistics.median(ordered) * 1000, 4),
        "p99_ms": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1000, 4),
    }
    print(json.dumps({"what": what, "batch": rows, "threads": torch.get_num_threads(), **figures}), flush=True)


def measure_torch(dim: int, rows: int, seconds: float) -> list[float]:
    """dim → 4 dim → dim with a GELU, as both sides compute it."""
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(FFN_RATIO * dim, dim, generator=generator) / dim**0.5
    down = torch.randn(dim, FFN_RATIO * dim, generator=generator) / dim**0.5
    given = torch.randn(rows, dim, generator=generator)
    with torch.inference_mode():
        return repeat(lambda: functional.linear(functional.gelu(functional.linear(given, up)), down), seconds)


def measure_echo(nbytes: int, seconds: float) -> list[float]:
    """There and back between two processes, by blocking sockets."""
    command = [sys.executable, "-m", "benchmarks.beside.floor", "--serve"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        with socket.create_connection(("127.0.0.1", int(server.stdout.readline()))) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sent, received = nbytes.to_bytes(HEAD_BYTES, "little") + bytes(nbytes), bytearray(HEAD_BYTES + nbytes)

            def call() -> None:
                connection.sendall(sent)
                fill(connection, memoryview(received))

            return repeat(call, seconds)
    finally:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()


def repeat(call: Callable[[], object], seconds: float) -> list[float]:
    for _ in range(WARM):
        call()
    latencies: list[float] = []
    ends_at = time.perf_counter() + seconds
    while (started := time.perf_counter()) < ends_at:
        call()
        latencies.append(time.perf_counter() - started)
    return latencies


def echo() -> None:
    """The other end, until its connection ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        connection, _ = listener.accept()
    head = bytearray(HEAD_BYTES)
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        body = bytearray()
        while fill(connection, memoryview(head)):
            size = int.from_bytes(head, "little")
            if len(body) != size:
                body = bytearray(size)
            if not fill(connection, memoryview(body)):
                return
            connection.sendall(head + body)


def fill(connection: socket.socket, into: memoryview) -> bool:
    """``False``: the connection ended."""
    while len(into):
        received = connection.recv_into(into)
        if not received:
            return False
        into = into[received:]
    return True


if __name__ == "__main__":
    main()
