"""Requests and answers on their way: who gets them when, or why nobody does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from daaswarm.messages import Contact
from daaswarm.sim.heap import Heap
from daaswarm.sim.sizes import get_size
from daaswarm.sim.wires import DIAL_BYTES, NEVER, Wires
from daaswarm.types import PeerId

if TYPE_CHECKING:
    from daaswarm.sim.node import SimNode

HANDLE_S = 0.0005  # for a node to read a request, decide and write the answer; measured 0.2 to 0.6 ms on loopback

Done = Callable[["Rpc", Any], None]


class Rpc:
    """One request. ``done(rpc, answer)`` is called once at its asker, with ``None`` if there was no answer in time;
    ``late(rpc)`` before that, if it takes longer than ``late_s``. ``given_up_at``: when the target hears that nobody
    waits any more."""

    __slots__ = (
        "asker",
        "deadline_s",
        "done",
        "given_up_at",
        "is_over",
        "late",
        "late_s",
        "message",
        "note",
        "sent",
        "target",
    )

    def __init__(
        self,
        asker: SimNode,
        target: SimNode | None,
        message: Any,
        deadline_s: float,
        done: Done,
        note: Any,
        sent: float,
        late_s: float | None,
        late: Callable[[Rpc], None] | None,
    ) -> None:
        self.asker = asker
        self.target = target
        self.message = message
        self.deadline_s = deadline_s
        self.done = done
        self.note = note
        self.sent = sent
        self.late_s = late_s
        self.late = late
        self.given_up_at = NEVER
        self.is_over = False


class Carrier:
    """Attributes:

    peers: every node there ever was.
    trace: is told of each request if set: ``(asker, peer asked, message)``.
    """

    def __init__(self, heap: Heap, wires: Wires, contact_bytes: int) -> None:
        self.peers: dict[str, SimNode] = {}
        self.trace: Callable[[PeerId, str, Any], None] | None = None
        self.messages = 0
        self.bytes = 0
        self.by_kind: defaultdict[type, int] = defaultdict(int)
        self._heap = heap
        self._wires = wires
        self._contact_bytes = contact_bytes

    def send(
        self,
        asker: SimNode,
        contact: Contact,
        message: Any,
        deadline_s: float,
        done: Done,
        note: Any = None,
        *,
        late_s: float | None = None,
        late: Callable[[Rpc], None] | None = None,
        body_bytes: int = 0,
    ) -> Rpc:
        """Asks a peer."""
        heap = self._heap
        if self.trace is not None:
            self.trace(asker.peer_id, contact.peer_id, message)
        target = self.peers.get(contact.peer_id)
        rpc = Rpc(asker, target, message, deadline_s, done, note, heap.now, late_s, late)
        seconds = NEVER
        if target is not None:
            size = self._count(asker, message, body_bytes)
            before = self._wires.dialled
            seconds = self._wires.ask(asker.number, target.number, size)
            if self._wires.dialled != before:
                self.bytes += DIAL_BYTES
                asker.bytes_sent += DIAL_BYTES // 2
                target.bytes_sent += DIAL_BYTES // 2
        if seconds >= deadline_s:
            self._will_end(rpc, deadline_s, _fail)
            return rpc
        if late_s is not None and seconds >= late_s:
            heap.at(heap.now + late_s, _tell_late, rpc)
            rpc.late_s = None
        heap.at(heap.now + seconds, self._arrive, rpc)
        return rpc

    def cancel(self, rpc: Rpc) -> None:
        """The asker doesn't wait for it any more. The frame that says so has a few bytes, which don't count here."""
        if not rpc.is_over:
            rpc.is_over = True
            if rpc.target is not None:
                rpc.given_up_at = self._heap.now + self._wires.carry(rpc.asker.number, rpc.target.number, 0)

    def answer(self, rpc: Rpc, message: Any, body_bytes: int = 0) -> None:
        """The target's answer to a request that it has."""
        assert rpc.target is not None
        size = self._count(rpc.target, message, body_bytes)
        seconds = self._wires.carry(rpc.target.number, rpc.asker.number, size) + HANDLE_S
        elapsed = self._heap.now - rpc.sent + seconds
        if elapsed >= rpc.deadline_s:
            self._will_end(rpc, rpc.deadline_s, _fail)
        else:
            self._will_end(rpc, elapsed, _deliver, message)

    def _arrive(self, rpc: Rpc, _: None) -> None:
        target = rpc.target
        assert target is not None
        if not target.is_alive:
            self._will_end(rpc, rpc.deadline_s, _fail)
        elif not target.serve(rpc):
            self._will_end(rpc, rpc.deadline_s, _fail)  # unless it answers before that

    def _will_end(self, rpc: Rpc, after_s: float, act: Callable[[Any, Any], object], message: Any = None) -> None:
        """``after_s`` since it was sent."""
        if rpc.late_s is not None and after_s > rpc.late_s:
            self._heap.at(max(rpc.sent + rpc.late_s, self._heap.now), _tell_late, rpc)
            rpc.late_s = None
        self._heap.at(rpc.sent + after_s, act, rpc, message)

    def _count(self, sender: SimNode, message: Any, body_bytes: int) -> int:
        size = get_size(message, self._contact_bytes) + body_bytes
        self.messages += 1
        self.bytes += size
        sender.bytes_sent += size
        self.by_kind[type(message)] += 1
        return size


def _deliver(rpc: Rpc, message: Any) -> None:
    if not rpc.is_over:
        rpc.is_over = True
        if rpc.asker.is_alive:
            rpc.done(rpc, message)


def _fail(rpc: Rpc, _: None) -> None:
    _deliver(rpc, None)


def _tell_late(rpc: Rpc, _: None) -> None:
    if not rpc.is_over and rpc.asker.is_alive and rpc.late is not None:
        rpc.late(rpc)
