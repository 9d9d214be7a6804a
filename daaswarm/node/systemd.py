"""Tells systemd how the node does (sd_notify(3)): a datagram to the socket that it names. No library needed."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

import trio

STARTING_S = 30.0  # asked for again and again while models load: systemd would give up after its own start limit
MIN_WATCHDOG_S = 0.1  # shorter is a mistake in the unit

logger = logging.getLogger(__name__)


class Systemd:
    """Says nothing unless systemd listens (``Type=notify``).

    Args:
        environ: ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` are read from it.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        if not self._address.startswith(("/", "@")) or not hasattr(socket, "AF_UNIX"):
            self._address = ""
        self._started = trio.Event()
        self.watchdog_s = _get_watchdog_s(environ) if self._address else 0.0

    @property
    def is_listening(self) -> bool:
        return bool(self._address)

    def ready(self) -> None:
        self._started.set()
        self._say("READY=1")

    def stopping(self) -> None:
        self._say("STOPPING=1")

    async def keep_alive(self) -> None:
        """Ask for time while the node starts, and answer the watchdog, until cancelled. If the loop is stuck, nothing
        is said, and systemd starts the node again."""
        if not self._address:
            return
        while not self._started.is_set():
            self._say(f"EXTEND_TIMEOUT_USEC={int(STARTING_S * 1e6)}")
            with trio.move_on_after(STARTING_S / 3):
                await self._started.wait()
        while self.watchdog_s:
            self._say("WATCHDOG=1")
            await trio.sleep(self.watchdog_s / 2)

    def _say(self, text: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaking:
                speaking.setblocking(False)
                speaking.sendto(text.encode(), address)
        except OSError as error:  # nobody to tell is no reason to stop
            logger.info("systemd can't be told %s: %s", text, error)


def _get_watchdog_s(environ: Mapping[str, str]) -> float:
    """The interval within which systemd wants to hear of this process; 0 for never."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):  # meant for another process
        return 0.0
    text = environ.get("WATCHDOG_USEC", "0")
    seconds = int(text) / 1e6 if text.isdecimal() else 0.0
    return max(seconds, MIN_WATCHDOG_S) if seconds else 0.0
