"""What passes on a namespace's interfaces, by a raw socket of its own: the payload of each TCP connection's direction.

Run as a program in the namespace: writes to the file named first, until its standard input ends."""

from __future__ import annotations

import pickle
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.netns.world import inside_of

Flow = tuple[str, int, str, int]  # from host and port, to host and port
ETH_P_ALL = 3
MOST_BYTES = 64 << 20


def main(path: str) -> None:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 20)
    packets: list[bytes] = []
    size = 0
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([sock, sys.stdin], [], [])
        if sock in ready:
            data = sock.recv(65_536)
            size += len(data)
            if size < MOST_BYTES:
                packets.append(data)
        elif sys.stdin in ready:
            break
    Path(path).write_bytes(pickle.dumps(packets))


@contextmanager
def capturing(namespace: str, path: Path) -> Iterator[None]:
    """In the block, everything is written down; afterwards :func:`read_flows` reads it."""
    command = [*inside_of(namespace), sys.executable, "-m", "tests.netns.capture", str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield
    finally:
        process.stdin.close()
        try:
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def read_flows(path: Path) -> dict[Flow, bytes]:
    """The payload of each direction of each TCP connection, in order, sent again or not."""
    segments: dict[Flow, dict[int, bytes]] = {}
    starts: dict[Flow, int] = {}
    for packet in pickle.loads(path.read_bytes()):
        if packet[0] >> 4 != 4 or packet[9] != socket.IPPROTO_TCP:
            continue
        length = 4 * (packet[0] & 15)
        total = struct.unpack_from("!H", packet, 2)[0] or len(packet)
        source, target = socket.inet_ntoa(packet[12:16]), socket.inet_ntoa(packet[16:20])
        from_port, to_port, number = struct.unpack_from("!HHI", packet, length)
        flow = source, from_port, target, to_port
        if packet[length + 13] & 2:  # SYN
            starts[flow] = number + 1
        payload = packet[length + 4 * (packet[length + 12] >> 4) : total]
        if payload and flow in starts:
            segments.setdefault(flow, {})[(number - starts[flow]) & 0xFFFFFFFF] = payload
    flows: dict[Flow, bytes] = {}
    for flow, found in segments.items():
        stream = bytearray()
        for offset in sorted(found):
            if offset <= len(stream):
                stream[offset : offset + len(found[offset])] = found[offset]
        flows[flow] = bytes(stream)
    return flows


if __name__ == "__main__":
    main(sys.argv[1])
