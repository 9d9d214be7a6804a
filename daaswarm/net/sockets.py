"""TCP sockets under trio: listening, looking names up, connecting."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import trio

from daaswarm.errors import ConfigError, DaaswarmError, Unreachable
from daaswarm.net.addresses import Address, get_host_address
from daaswarm.systems import claim_port

log = logging.getLogger(__name__)

BACKLOG = 128  # connections that the kernel holds until they're accepted
ACCEPT_PAUSE_S = 0.1  # when there are no file descriptors left, or the network is down
LOOKUPS = 16  # names looked up at once; threads of their own, so that hostile names can't hold up computing
LOOKUP_S = 5.0  # a resolver's own first timeout; its thread may stay in there longer, and then counts as one

Note = Callable[[str, float], None]
"""Hears of a step of a dial that went well: its name, and the seconds that it took."""

LISTEN_HINTS = {
    errno.EADDRINUSE: "another program has this port; stop it, or choose another (tcp/0 picks a free one)",
    errno.EACCES: "ports below 1024 are the system's: choose a higher one",
}


class Listener:
    """A bound port. Args: ``port`` 0 picks a free one.

    Raises:
        ConfigError: the address can't be bound; it's named.
    """

    def __init__(self, address: Address) -> None:
        self._sock = _bind(address)
        host, port = self._sock.getsockname()[:2]
        self.address = get_host_address(host, port)

    async def accept(self) -> socket.socket:
        """The next connection, non-blocking."""
        while True:
            await trio.lowlevel.wait_readable(self._sock.fileno())
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                continue
            except OSError as error:
                if error.errno in (errno.EBADF, errno.EINVAL, errno.ENOTSOCK):
                    raise  # the listener itself is broken
                log.warning("cannot accept connections at %s: %s", self.address, error.strerror)
                await trio.sleep(ACCEPT_PAUSE_S)
                continue
            sock.setblocking(False)
            return sock

    def close(self) -> None:
        trio.lowlevel.notify_closing(self._sock.fileno())
        self._sock.close()


@contextmanager
def marking(step: str, note: Note | None = None) -> Iterator[None]:
    """An error that leaves the block says at which step of a dial it came, unless it knows that already. ``note``
    hears of a block that went well."""
    began = trio.current_time()
    try:
        yield
        if note is not None:
            note(step, trio.current_time() - began)
    except DaaswarmError as error:
        error.step = error.step or step
        raise


def _bind(address: Address) -> socket.socket:
    family = socket.AF_INET6 if address.protocol.endswith("6") else socket.AF_INET
    sock = None
    try:
        info = socket.getaddrinfo(address.host, address.port, family, socket.SOCK_STREAM)
        sock = socket.socket(family, socket.SOCK_STREAM)
        claim_port(sock)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(info[0][4])
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        if sock is not None:
            sock.close()
        hint = LISTEN_HINTS.get(error.errno or 0, "choose an address of this machine, or /ip4/0.0.0.0 for all it has")
        raise ConfigError(f"cannot listen at {address}: {error.strerror or error}", hint=hint) from error
    return sock


async def look_up(address: Address, addr: str, lookups: trio.CapacityLimiter) -> tuple[Any, ...]:
    """The first of ``socket.getaddrinfo``'s answers.

    Raises:
        Unreachable: no such name, or no answer in time.
    """
    families = {"4": socket.AF_INET, "6": socket.AF_INET6}
    family = families.get(address.protocol[-1], socket.AF_UNSPEC)
    arguments = address.host, address.port, family, socket.SOCK_STREAM, 0
    found: Sequence[tuple[Any, ...]] = []
    try:
        if address.protocol.startswith("ip"):
            found = socket.getaddrinfo(*arguments, socket.AI_NUMERICHOST | socket.AI_NUMERICSERV)
        else:
            with trio.move_on_after(LOOKUP_S):
                found = await trio.to_thread.run_sync(
                    socket.getaddrinfo, *arguments, abandon_on_cancel=True, limiter=lookups
                )
    except OSError as error:
        raise Unreachable(f"{addr}: {error.strerror or error}", hint="check the host's name") from error
    except ValueError as error:  # UnicodeError: a name that can't be one
        raise Unreachable(f"{addr}: not a host's name: {error}", hint="check the host's name") from error
    if not found:
        raise Unreachable(f"{addr}: the name was not found within {LOOKUP_S:g} s", hint="check the name server")
    return found[0]


async def connect(address: Address, addr: str, lookups: trio.CapacityLimiter) -> socket.socket:
    """A connected, non-blocking socket. The caller sets the deadline.

    Raises:
        Unreachable: unknown name, refused, no route, no file descriptor left.
    """
    family, kind, protocol, _, target = await look_up(address, addr, lookups)
    try:
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise Unreachable(f"{addr}: {error.strerror or error}") from error
    sock.setblocking(False)
    try:
        code = sock.connect_ex(target)
        if code == errno.EINPROGRESS:
            await trio.lowlevel.wait_writable(sock.fileno())
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            hint = "is the node running there, and is the port right?"
            raise Unreachable(f"{addr}: {os.strerror(code)}", hint=hint) from OSError(code, os.strerror(code))
    except BaseException as error:
        close(sock)
        if isinstance(error, OSError):
            raise Unreachable(f"{addr}: {error.strerror or error}") from error
        raise
    return sock


async def peek(sock: socket.socket) -> int:
    """The first byte that will be read, left in place.

    Raises:
        Unreachable: hung up before sending any.
    """
    while True:
        await trio.lowlevel.wait_readable(sock.fileno())
        try:
            data = sock.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            continue
        if not data:
            raise Unreachable("hung up without a word")
        return data[0]


def close(sock: socket.socket) -> None:
    """At once, whoever waits for it; also when trio isn't there any more to be told."""
    if sock.fileno() >= 0:
        with contextlib.suppress(RuntimeError):
            trio.lowlevel.notify_closing(sock.fileno())
        sock.close()
