"""A call under way, as a worker thread or a trio task holds it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from daaswarm.errors import DaaswarmError, DeadlineExceeded
from daaswarm.messages import Failure, Ping, Reply, Request
from daaswarm.net.failures import get_error
from daaswarm.types import PeerId

if TYPE_CHECKING:
    from daaswarm.net.connection import Connection


class PendingCall:
    """A call of this ``kind`` with so many bytes that has been submitted, just now. Wait for it in one place only."""

    __slots__ = (
        "_body",
        "_call",
        "_connection",
        "_done",
        "_done_at",
        "_error",
        "_on_done",
        "_reply",
        "_submitted_at",
        "_wakeup",
        "deadline_s",
        "kind",
        "nbytes",
    )

    def __init__(
        self,
        connection: Connection,
        deadline_s: float,
        on_done: Callable[[], None] | None = None,
        kind: type[Request] = Ping,
        nbytes: int = 0,
    ) -> None:
        self.kind = kind
        self.nbytes = nbytes
        self._connection = connection
        self.deadline_s = deadline_s
        self._submitted_at = self._done_at = monotonic()
        self._call = 0
        self._reply: Reply | None = None
        self._body: memoryview | None = None
        self._error: DaaswarmError | None = None
        self._done = False
        self._on_done = on_done
        self._wakeup = threading.Lock()
        self._wakeup.acquire()

    @property
    def peer_id(self) -> PeerId:
        return self._connection.peer_id

    @property
    def connection(self) -> Connection:
        return self._connection

    @property
    def submitted_at(self) -> float:
        """Monotonic, s."""
        return self._submitted_at

    @property
    def due(self) -> float:
        """Monotonic, s: its deadline."""
        return self._submitted_at + self.deadline_s

    @property
    def latency_s(self) -> float:
        """From submitting the call to its answer, whenever that was looked at; 0 while there is none."""
        return self._done_at - self._submitted_at

    def wait(self, timeout_s: float | None = None) -> tuple[Reply, memoryview]:
        """Block this (worker) thread until the answer, for ``timeout_s`` at most. The call's deadline ends it anyway,
        and counts from submitting: what was spent on waiting for other calls isn't given to this one.

        Raises:
            DeadlineExceeded: no answer in time; the call is cancelled.
            ConnectionLost, Busy, ExpertError, ...: as for ``Network.call``.
        """
        if not self._done:
            due = self.due if timeout_s is None else min(self.due, monotonic() + timeout_s)
            self._connection.wait_for(self, due)
        return self.get_result(self.deadline_s if timeout_s is None else timeout_s)

    def wait_until(self, until: float) -> None:
        """Block this (worker) thread until there is an answer, or until then (monotonic, s); ends nothing."""
        if not self._done:
            self._connection.wait_for(self, min(self.due, until))

    def cancel(self) -> None:
        """Give the call up. Thread-safe; does nothing when it has ended."""
        self._connection.cancel(self)

    def is_done(self) -> bool:
        return self._done

    def get_result(self, timeout_s: float) -> tuple[Reply, memoryview]:
        """The answer; an unfinished call is cancelled as too late."""
        if not self._done:
            self.cancel()
            raise DeadlineExceeded(f"no answer from {self.peer_id} within {timeout_s:g} s")
        if self._error is not None:
            raise self._error
        assert self._reply is not None and self._body is not None
        if isinstance(self._reply, Failure):
            raise get_error(self._reply, self.peer_id)
        return self._reply, self._body

    # -- for the connection -----------------------------------------------------------------------------------

    def finish(self, reply: Reply | None, body: memoryview | None, error: DaaswarmError | None) -> None:
        self._reply, self._body, self._error = reply, body, error
        self._done_at = monotonic()
        self._done = True
        self.wake()
        if self._on_done is not None:
            self._on_done()

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # it's awake already
            self._wakeup.release()

    def use_bell(self, bell: threading.Lock) -> None:
        """Release this lock instead of the call's own when it ends, or may have. Look at :meth:`is_done` after that."""
        self._wakeup = bell

    def sleep(self, timeout_s: float) -> None:
        self._wakeup.acquire(timeout=max(0.0, min(timeout_s, threading.TIMEOUT_MAX)))
