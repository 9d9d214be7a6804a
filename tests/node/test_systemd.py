"""What systemd is told."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio

from daaswarm.node.systemd import Systemd


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="systemd is Linux's")
@pytest.mark.parametrize("abstract", [False, True])
async def test_systemd_is_told(abstract: bool, tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    name = f"@daaswarm-{tmp_path.name}" if abstract else str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("\0" + name[1:] if abstract else name)
        listening.setblocking(False)

        def read() -> list[str]:
            found: list[str] = []
            try:
                while True:
                    found.append(listening.recv(200).decode())
            except BlockingIOError:
                return found

        systemd = Systemd({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "4000000"})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(systemd.keep_alive)
            await trio.sleep(25)
            assert set(read()) == {"EXTEND_TIMEOUT_USEC=30000000"}
            systemd.ready()
            await trio.sleep(5)
            assert read() == ["READY=1", "WATCHDOG=1", "WATCHDOG=1", "WATCHDOG=1"]
            systemd.stopping()
            assert read() == ["STOPPING=1"]
            nursery.cancel_scope.cancel()


async def test_without_systemd_nothing_is_said(tmp_path: Path) -> None:
    for environ in ({}, {"NOTIFY_SOCKET": "vsock:1:2"}, {"NOTIFY_SOCKET": str(tmp_path / "gone")}):
        systemd = Systemd(environ)
        systemd.ready()
        systemd.stopping()
    other = Systemd({"NOTIFY_SOCKET": str(tmp_path / "n"), "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"})
    assert other.watchdog_s == 0.0
    await Systemd({}).keep_alive()
