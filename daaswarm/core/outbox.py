"""Requests that a machine has sent and not heard of again, by their number."""

from __future__ import annotations

from typing import Generic, TypeVar

from daaswarm.core.membership_events import Asked, SendRequest
from daaswarm.messages import Contact

Note = TypeVar("Note")


class Outbox(Generic[Note]):
    """Each request carries a note of what it was for. The numbers of two machines of one node differ by ``start``."""

    def __init__(self, start: int = 0, step: int = 1) -> None:
        self._next = start
        self._step = step
        self._notes: dict[int, Note] = {}

    def __len__(self) -> int:
        return len(self._notes)

    def send(self, contact: Contact, message: Asked, deadline_s: float, note: Note) -> SendRequest:
        """The effect; its outcome comes back with the same ``rpc_id``."""
        self._next += self._step
        self._notes[self._next] = note
        return SendRequest(rpc_id=self._next, contact=contact, message=message, deadline_s=deadline_s)

    def take(self, rpc_id: int) -> Note | None:
        """The note, once; ``None`` for what was never sent, or was reported before."""
        return self._notes.pop(rpc_id, None)
