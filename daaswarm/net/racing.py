"""Waiting for the first of several calls, in a worker thread that reads all of their connections itself meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from time import monotonic

from daaswarm.net.connection import LEAD_S, LOOK_S, Connection
from daaswarm.net.pending import PendingCall
from daaswarm.systems import wait_any_readable


def look(calls: Sequence[PendingCall]) -> None:
    """Read what has come for them by now, without waiting: answers lie unread while a thread waits for another."""
    _read(_get_connections(calls), 0.0)


def wait_any(calls: Sequence[PendingCall], until: float) -> None:
    """Block this worker thread until one of ``calls`` is done, or until then (monotonic, s). Deadlines and errors are
    left to ``PendingCall.wait``, which doesn't block where a call is done or late.
    """
    bell = threading.Lock()  # of all of them
    bell.acquire()
    for call in calls:
        call.use_bell(bell)
    connections = _get_connections(calls)
    reads_all = all(connection.threads_can_read for connection in connections)
    while not any(call.is_done() for call in calls):
        remaining = until - monotonic()
        if remaining <= 0:
            return
        # Another reader of a connection rings the bell, which wakes nobody who looks at sockets.
        if not _read(connections, min(remaining, LOOK_S), LEAD_S):
            bell.acquire(timeout=min(remaining, LEAD_S if reads_all else LOOK_S))


def _get_connections(calls: Sequence[PendingCall]) -> list[Connection]:
    return list({id(call.connection): call.connection for call in calls}.values())


def _read(connections: Sequence[Connection], pause_s: float, pause_if_read_s: float = 0.0) -> bool:
    """Wait for something to read, and read it. False: all the connections are being read by others.

    Args:
        pause_if_read_s: the longest wait where that is so for some.
    """
    led: dict[int, Connection] = {}
    try:
        for connection in connections:
            if connection.try_lead():
                led[connection.fileno()] = connection
        if led:
            if len(led) < len(connections):
                pause_s = min(pause_s, pause_if_read_s)
            for file in wait_any_readable(list(led), pause_s):
                led[file].read_once()
    finally:
        for connection in led.values():
            connection.stop_leading()
    return bool(led)
