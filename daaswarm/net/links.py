"""What calls tell of the way to each peer, for all threads of a node."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from time import monotonic

from daaswarm.core.islands import TOLD, Link, Links
from daaswarm.core.marks import get_mark, pack_marks, unpack_marks
from daaswarm.messages import ExpertReply, Pong, Reply
from daaswarm.net.frames import Buffer
from daaswarm.types import PeerId


class SharedLinks:
    """:class:`Links` behind a lock. Every answered call is noted here, whatever it was for: measuring costs no call."""

    def __init__(self) -> None:
        self._links = Links()
        self._lock = threading.Lock()

    def note(self, peer: PeerId, body: Sequence[Buffer], reply: Reply, answer: memoryview, elapsed_s: float) -> None:
        """A call to ``peer`` was answered after ``elapsed_s``."""
        nbytes = sum(memoryview(part).nbytes for part in body) + answer.nbytes
        self.note_sizes(peer, nbytes, elapsed_s, reply.service_us / 1e6 if isinstance(reply, ExpertReply) else 0.0)
        if isinstance(reply, Pong):
            with self._lock:
                self._links.note_told(peer, unpack_marks(reply.near))

    def note_sizes(self, peer: PeerId, nbytes: int, elapsed_s: float, service_s: float) -> None:
        """The same, where the sizes are known already."""
        with self._lock:
            self._links.note(peer, nbytes, elapsed_s, service_s, monotonic())

    def get(self, peer: PeerId) -> Link | None:
        with self._lock:
            return self._links.get(peer)

    def get_island(self) -> frozenset[PeerId]:
        with self._lock:
            return self._links.get_island()

    def find_islands(self, own: PeerId) -> list[list[PeerId]]:
        with self._lock:
            return self._links.find_islands(own)

    def pack_near(self) -> bytes:
        """What this node answers to a ping."""
        return pack_marks(get_mark(peer) for peer in sorted(self.get_island())[:TOLD])
