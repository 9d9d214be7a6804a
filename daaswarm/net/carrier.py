"""What carries a session's bytes: the interface, and a pair of carriers in memory."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import trio

from daaswarm.net.frames import Buffer

PIPE_BYTES = 1024 * 1024  # unread bytes that one direction of a memory pipe holds before its writer has to wait
READ_BYTES = 256 * 1024  # at most so much is read at once: the next reader's turn comes within a millisecond


class Carrier(Protocol):
    """A stream of bytes that never blocks. All but the ``wait_*`` methods are called under the connection's lock.

    Every method may raise ``OSError`` or a ``DaaswarmError`` when the stream is broken.
    """

    remote_addr: str
    binding: bytes  # 32 bytes that both ends know and no other connection shares
    threads_can_read: bool  # wait_readable_blocking works

    def send(self, buffers: Sequence[Buffer]) -> bool:
        """Take all of ``buffers``; ``True`` if nothing waits to be written. Only called when nothing waited before."""
        ...

    def flush(self) -> bool:
        """Write what waits; ``True`` if nothing is left."""
        ...

    def receive(self) -> Buffer | None:
        """Bytes that have arrived, valid until the next call; empty at the end of the stream, ``None`` if none yet."""
        ...

    async def wait_readable(self) -> None: ...

    async def wait_writable(self) -> None: ...

    def wait_readable_blocking(self, timeout_s: float) -> None:
        """Like ``wait_readable``, for a worker thread; returns on timeout too."""
        ...

    def fileno(self) -> int:
        """The socket's number, for a thread that waits for several; only where ``threads_can_read``."""
        ...

    def shut_down(self) -> None:
        """End the stream both ways at once; whoever waits for it wakes up. From any thread, more than once."""
        ...

    def close(self) -> None:
        """Free it. From trio's thread, after ``shut_down``, once nobody is inside ``wait_readable_blocking``."""
        ...


class Signal:
    """A wake-up for one trio task that any thread may give. Create it in trio's thread."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.get_ident()
        self._event = trio.Event()

    def set(self) -> None:
        if threading.get_ident() == self._thread:
            self._event.set()
            return
        with contextlib.suppress(trio.RunFinishedError):  # nobody waits any more
            self._token.run_sync_soon(self._set)

    def _set(self) -> None:
        self._event.set()  # the event of that moment: a wake-up too many only costs a look

    def clear(self) -> None:
        if self._event.is_set():
            self._event = trio.Event()

    async def wait(self) -> None:
        await self._event.wait()


class _Pipe:
    """One direction in memory."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.chunks: deque[bytes] = deque()
        self.size = 0
        self.closed = False
        self.held = False  # what is sent stays on the way: a partition
        self.readable = Signal()
        self.writable = Signal()

    def write(self, data: bytes) -> None:
        with self.lock:
            if self.closed:
                raise BrokenPipeError("the other end is closed")
            self.chunks.append(data)
            self.size += len(data)
        self.readable.set()

    def read(self) -> bytes | None:
        with self.lock:
            if self.held:
                self.readable.clear()
                return None
            if not self.chunks:
                if self.closed:
                    return b""
                self.readable.clear()
                return None
            data = self.chunks.popleft()
            self.size -= len(data)
            roomy = self.size < PIPE_BYTES
        if roomy:
            self.writable.set()
        return data

    def has_room(self) -> bool:
        with self.lock:
            if self.size < PIPE_BYTES:
                return True
            self.writable.clear()
            return False

    def close(self) -> None:
        with self.lock:
            self.closed = True
        self.readable.set()
        self.writable.set()

    def hold(self, held: bool) -> None:
        self.held = held
        if not held:
            self.readable.set()


class MemoryCarrier:
    """One end of a pair of pipes; see :func:`open_memory_pair`."""

    threads_can_read = False

    def __init__(self, inbound: _Pipe, outbound: _Pipe, binding: bytes, remote_addr: str) -> None:
        self.inbound = inbound
        self.outbound = outbound
        self.binding = binding
        self.remote_addr = remote_addr
        self._unsent: bytes | None = None

    def send(self, buffers: Sequence[Buffer]) -> bool:
        # A copy: what the receiver gets must not change when the sender reuses its tensor.
        self._unsent = b"".join(buffers)
        return self.flush()

    def flush(self) -> bool:
        if self._unsent is not None:
            if not self.outbound.has_room():
                if self.outbound.closed:
                    raise BrokenPipeError("the other end is closed")
                return False
            data, self._unsent = self._unsent, None
            self.outbound.write(data)
        return True

    def receive(self) -> Buffer | None:
        return self.inbound.read()

    async def wait_readable(self) -> None:
        await self.inbound.readable.wait()

    async def wait_writable(self) -> None:
        await self.outbound.writable.wait()

    def wait_readable_blocking(self, timeout_s: float) -> None:
        raise NotImplementedError

    def fileno(self) -> int:
        raise NotImplementedError

    def shut_down(self) -> None:
        self.inbound.close()
        self.outbound.close()

    def close(self) -> None:
        self.shut_down()


def open_memory_pair(
    binding: bytes, *, client_addr: str = "memory", server_addr: str = "memory"
) -> tuple[MemoryCarrier, MemoryCarrier]:
    """The client's and the server's end. Call it in trio's thread."""
    up, down = _Pipe(), _Pipe()
    for pipe in (up, down):
        pipe.writable.set()
    return MemoryCarrier(down, up, binding, server_addr), MemoryCarrier(up, down, binding, client_addr)
