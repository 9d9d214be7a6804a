"""What a session keeps of each call under way, and what it tells its owner. No decisions here."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from daaswarm.errors import DaaswarmError
from daaswarm.limits import WINDOW_BYTES
from daaswarm.messages import Reply, Request
from daaswarm.net.frames import Buffer
from daaswarm.net.inbound import InboundBody


class RequestReceived(NamedTuple):
    call: int
    message: Request
    body: memoryview  # writable
    deadline_s: float


class ReplyReceived(NamedTuple):
    ticket: object  # what send_request was given
    message: Reply
    body: memoryview  # writable


class CallFailed(NamedTuple):
    """Our own call can't be answered any more, though the connection lives."""

    ticket: object
    error: DaaswarmError


class CallCancelled(NamedTuple):
    """The peer no longer waits for the answer to its call."""

    call: int


Event = RequestReceived | ReplyReceived | CallFailed | CallCancelled


class Outgoing:
    """A message on its way out: the first frame's head and header, then the body in chunks."""

    __slots__ = ("call", "first", "granted", "parts", "sent", "total")

    def __init__(self, call: int, first: bytes, parts: list[Buffer], total: int) -> None:
        self.call = call
        self.first: bytes | None = first
        self.parts = deque(parts)
        self.total = total
        self.sent = 0
        self.granted = WINDOW_BYTES

    def take(self, size: int) -> list[Buffer]:
        """The next ``size`` body bytes, sliced without copying."""
        taken: list[Buffer] = []
        self.sent += size
        while size:
            part = self.parts.popleft()
            if len(part) > size:
                view = memoryview(part)
                self.parts.appendleft(view[size:])
                part = view[:size]
            taken.append(part)
            size -= len(part)
        return taken


class Incoming(InboundBody):
    """A body on its way in. ``body`` grows with what arrived, whatever ``total`` says."""

    __slots__ = ("body", "deadline_s", "granted", "message", "total")

    def __init__(self, message: Request | Reply, body: bytearray, total: int, deadline_s: float) -> None:
        super().__init__()
        self.message = message
        self.body = body
        self.total = total
        self.deadline_s = deadline_s
        self.granted = WINDOW_BYTES


class Served:
    """A call of the peer's: charged to the node until it's answered, or until the work for it has really ended.

    ``cancelled``: nobody waits for the answer any more, but the work still goes on.
    """

    __slots__ = ("cancelled", "charged", "checks", "incoming")

    def __init__(self) -> None:
        self.charged = 0
        self.cancelled = False
        self.checks = 0  # how often drop_stalled saw its body, or then its answer, under way
        self.incoming: Incoming | None = None


class Own:
    """A call of ours."""

    __slots__ = ("incoming", "ticket")

    def __init__(self, ticket: object) -> None:
        self.ticket = ticket
        self.incoming: Incoming | None = None
