"""``bench net``: what the wire between two nodes on this machine takes, without any computing.

A floor is measured in the same run: the same bytes between two processes' sockets, without TLS and frames.
"""

from __future__ import annotations

import socket
import statistics
import threading
import time
from typing import Any

import torch
import trio

from daaswarm.bench.child import Child, start_process
from daaswarm.bench.expert_calls import CALL_S, ROOT, START_S
from daaswarm.config import Config
from daaswarm.errors import DaaswarmError
from daaswarm.inference.swarm_experts import as_bytes
from daaswarm.messages import Contact, ExpertCall, Ping
from daaswarm.node.life import open_node
from daaswarm.store.data_dir import DataDir

ECHO_BYTES = 4_096
DIM = 4_096  # of the rows whose transfer is measured
CONNECTS = 20


async def run_net(
    data_dir: DataDir, config: Config, *, body_bytes: int, seconds: float, host_dir: str
) -> dict[str, Any]:
    """Args:
        body_bytes: of a large call, there and back.
        seconds: of each of the three measurements.

    Raises:
        DaaswarmError: the other process didn't start.
    """
    options = ["--expert", "nop", "--dim", f"{DIM}", "--data-dir", host_dir]
    host = Child(await start_process("bench", "serve-expert", *options))
    try:
        contact = await host.wait_ready(START_S, DaaswarmError("the benchmark's host process did not start"))
        connects: list[float] = []
        for _ in range(CONNECTS):
            async with open_node(data_dir, config, listen=False, libp2p=False) as node:
                started = time.perf_counter()
                await node.network.connect(contact)
                connects.append(time.perf_counter() - started)
        async with open_node(data_dir, config, listen=False, libp2p=False) as node:
            await node.network.connect(contact)
            pings = await _repeat(lambda: _echo(node, contact, b""), seconds)
            echoes = await _repeat(lambda: _echo(node, contact, bytes(ECHO_BYTES)), seconds)
            rows = torch.zeros(max(1, body_bytes // (4 * DIM)), DIM)
            call = ExpertCall(model_root=ROOT, layer=0, experts=[0], dtype="f32", rows=len(rows), hidden=DIM)

            async def transfer() -> None:
                await node.network.call(contact, call, [as_bytes(rows)], deadline_s=CALL_S)

            transfers = await _repeat(transfer, seconds)
    finally:
        await host.close()
    floor = await trio.to_thread.run_sync(_measure_floor, ECHO_BYTES, seconds)
    bulk_floor = await trio.to_thread.run_sync(_measure_floor, rows.nbytes, seconds)
    moved = 2 * rows.nbytes
    return {
        "connect_p50_ms": _ms(connects),
        "ping_p50_ms": _ms(pings),
        "ping_p99_ms": _ms(pings, 0.99),
        "echo_bytes": ECHO_BYTES,
        "echo_p50_ms": _ms(echoes),
        "echo_p99_ms": _ms(echoes, 0.99),
        "tcp_echo_p50_ms": _ms(floor),
        "echo_over_tcp": round(statistics.median(echoes) / statistics.median(floor), 2),
        "body_bytes": rows.nbytes,
        "transfer_mb_per_s": round(moved / statistics.median(transfers) / 1e6, 1),
        "tcp_mb_per_s": round(moved / statistics.median(bulk_floor) / 1e6, 1),
        "transfer_over_tcp": round(statistics.median(bulk_floor) / statistics.median(transfers), 3),
    }


async def _echo(node: Any, contact: Contact, body: bytes) -> None:
    await node.network.call(contact, Ping(echo=bool(body)), [body] if body else [], deadline_s=CALL_S)


async def _repeat(once: Any, seconds: float) -> list[float]:
    """Seconds that each took, after a warm-up of a tenth."""
    taken: list[float] = []
    began = time.perf_counter()
    while not taken or time.perf_counter() - began < 1.1 * seconds:
        started = time.perf_counter()
        await once()
        if started - began >= seconds / 10 or not taken:
            taken.append(time.perf_counter() - started)
    return taken


def _measure_floor(nbytes: int, seconds: float) -> list[float]:
    """The same bytes there and back over plain TCP on loopback; the other end is a thread, which sleeps meanwhile."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            buffer = bytearray(nbytes)
            while _fill(connection, buffer):
                connection.sendall(buffer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    taken: list[float] = []
    with socket.create_connection(listener.getsockname()) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data, back = bytes(nbytes), bytearray(nbytes)
        began = time.perf_counter()
        while not taken or time.perf_counter() - began < seconds:
            started = time.perf_counter()
            connection.sendall(data)
            _fill(connection, back)
            taken.append(time.perf_counter() - started)
    thread.join()
    listener.close()
    return taken


def _fill(connection: socket.socket, buffer: bytearray) -> bool:
    view = memoryview(buffer)
    while view:
        read = connection.recv_into(view)
        if not read:
            return False
        view = view[read:]
    return True


def _ms(times: list[float], share: float = 0.5) -> float:
    ordered = sorted(times)
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1e3, 4)
