"""What a host lets in: bounded by count and by expected waiting time, served in turn among peers."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from itertools import islice, zip_longest
from math import inf

import msgspec

from daaswarm.limits import CALLS_PER_HOST, CALLS_PER_PEER
from daaswarm.types import PeerId

QUEUE_SHARE = 0.5  # of its deadline that a call may wait; the rest is for computing and the way back
SMOOTHING = 0.2  # weight of the newest call's time and work: five calls to follow a change
FEW_IN_A_ROW = 8  # calls of few rows that go before a large one that waits; decoding takes a tenth of a prefill
BATCH_S = 0.2  # of computing together, as expected: more rows at once gain little, but nobody's turn comes meanwhile
HELD_BYTES = 512 << 20  # of bodies that wait or are computed, of all peers: two of the largest calls
HELD_BYTES_PER_PEER = 256 << 20  # one peer's part of that: one of the largest calls
RETRY_MIN_S = 0.01
RETRY_MAX_S = 5.0


class Ticket(msgspec.Struct, frozen=True, eq=False):
    """An admitted call. ``late_at`` (Unix time, s): after it nobody waits for the answer.

    Attributes:
        group: calls of one group can be computed together; ``None`` for one that can't.
        share: of the largest batch that it fills; above 1 it is computed alone.
        is_few: it has few rows, as in decoding, and goes before those that have many.
        nbytes: memory that it holds until it is finished.
    """

    peer: PeerId
    work_rows: int
    late_at: float
    group: Hashable = None
    share: float = 1.0
    is_few: bool = False
    nbytes: int = 0


class Admitted(msgspec.Struct, frozen=True):
    ticket: Ticket


class Refused(msgspec.Struct, frozen=True):
    retry_after_s: float
    reason: str


class Admission:
    """The queue before the experts. Call :meth:`try_admit`, :meth:`next` or :meth:`next_batch`, then :meth:`finish` for
    each ticket.
    """

    def __init__(self, *, calls_per_peer: int = CALLS_PER_PEER, calls_per_host: int = CALLS_PER_HOST) -> None:
        self._calls_per_peer = calls_per_peer
        self._calls_per_host = calls_per_host
        self._queues: OrderedDict[PeerId, deque[Ticket]] = OrderedDict()  # whose turn is next comes first
        self._per_peer: dict[PeerId, int] = {}  # waiting and running
        self._running: set[Ticket] = set()
        self._held: dict[PeerId, int] = {}  # bytes of calls that wait or run
        self._few_in_a_row = 0
        # Smoothed time and work of the calls done. Their ratio is the time of a row, in which small calls, which cost
        # more per row, weigh as little as they are. Until the first is done, calls are admitted by count alone.
        self._done_s = 0.0
        self._done_rows = 0.0

    @property
    def queue_depth(self) -> int:
        """Calls that wait; rides on every reply for the requesters' routers."""
        return sum(map(len, self._queues.values()))

    def get_wait_s(self, peer: PeerId) -> float:
        """How long a further call of ``peer`` would wait. Peers take turns, so of each other peer's queue only as many
        calls come before it as ``peer`` has calls itself: who asks for much makes nobody wait but itself.
        """
        if not self._done_rows:
            return 0.0
        turns = len(self._queues.get(peer, ())) + 1
        rows = sum(ticket.work_rows for ticket in self._running)
        for queue in self._queues.values():
            rows += sum(ticket.work_rows for ticket in islice(queue, turns))
        return rows * self._done_s / self._done_rows

    def try_admit(
        self,
        peer: PeerId,
        work_rows: int,
        deadline_s: float,
        now: float,
        *,
        group: Hashable = None,
        share: float = 1.0,
        is_few: bool = False,
        nbytes: int = 0,
    ) -> Admitted | Refused:
        """Takes a call of ``work_rows`` (rows x experts) that is worth nothing after ``deadline_s`` from now.

        Args:
            group, share, is_few, nbytes: as in :class:`Ticket`.
        """
        refused = self.get_refusal(peer, deadline_s, nbytes)
        if refused is not None:
            return refused
        ticket = Ticket(peer, work_rows, now + deadline_s, group, share, is_few, nbytes)
        self._queues.setdefault(peer, deque()).append(ticket)
        self._per_peer[peer] = self._per_peer.get(peer, 0) + 1
        if nbytes:
            self._held[peer] = self._held.get(peer, 0) + nbytes
        return Admitted(ticket)

    def get_refusal(self, peer: PeerId, deadline_s: float, nbytes: int = 0) -> Refused | None:
        """Why :meth:`try_admit` would refuse a call now; ``None`` if it wouldn't."""
        wait_s = self.get_wait_s(peer)
        if self._per_peer.get(peer, 0) >= self._calls_per_peer:
            return self._refuse(wait_s, f"{self._calls_per_peer} calls of this peer are in flight")
        if sum(self._per_peer.values()) >= self._calls_per_host:
            return self._refuse(wait_s, f"{self._calls_per_host} calls are in flight")
        if self._held.get(peer, 0) + nbytes > HELD_BYTES_PER_PEER and peer in self._held:
            return self._refuse(wait_s, "this peer's calls hold all the memory that one peer may take")
        if sum(self._held.values()) + nbytes > HELD_BYTES and self._held:
            return self._refuse(wait_s, "the calls that wait hold all the memory there is for them")
        if wait_s > QUEUE_SHARE * deadline_s:
            return self._refuse(
                wait_s - QUEUE_SHARE * deadline_s, f"the queue takes {wait_s:.2f} s, the deadline is {deadline_s:.2f} s"
            )
        return None

    def next(self) -> Ticket | None:
        """The call to compute now: each waiting peer in turn, in order within a peer. None when nothing waits."""
        if not self._queues:
            return None
        peer, queue = next(iter(self._queues.items()))
        ticket = queue[0]
        self._take(ticket)
        if peer in self._queues:
            self._queues.move_to_end(peer)
        return ticket

    def next_batch(self) -> list[Ticket]:
        """The calls to compute together now; empty when nothing waits.

        The first is the next of few rows or, after :data:`FEW_IN_A_ROW` of those, the next of many. With it go others
        of its group, one of each peer in turn, until the batch is full or would take longer than :data:`BATCH_S`.
        """
        few_first = self._few_in_a_row < FEW_IN_A_ROW
        first = self._next_of(few_first) or self._next_of(not few_first)
        if first is None:
            return []
        self._few_in_a_row = self._few_in_a_row + 1 if first.is_few else 0
        batch, room = [first], 1 - first.share
        if first.group is None or room <= 0:
            return batch
        rows = BATCH_S * self._done_rows / self._done_s - first.work_rows if self._done_s else inf
        mates = [[t for t in queue if t.group == first.group] for queue in self._queues.values()]
        for turn in zip_longest(*mates):
            for ticket in turn:
                if ticket is not None and ticket.share <= room and ticket.work_rows <= rows:
                    room -= ticket.share
                    rows -= ticket.work_rows
                    batch.append(ticket)
        for ticket in batch[1:]:
            self._take(ticket)
        return batch

    def _next_of(self, is_few: bool) -> Ticket | None:
        for peer, queue in self._queues.items():
            ticket = next((ticket for ticket in queue if ticket.is_few == is_few), None)
            if ticket is not None:
                self._take(ticket)
                if peer in self._queues:
                    self._queues.move_to_end(peer)
                return ticket
        return None

    def _take(self, ticket: Ticket) -> None:
        queue = self._queues[ticket.peer]
        queue.remove(ticket)
        if not queue:
            del self._queues[ticket.peer]
        self._running.add(ticket)

    def finish(self, ticket: Ticket, service_s: float | None = None) -> None:
        """``ticket`` was computed in ``service_s``, or (None) came to nothing: cancelled, late or failed."""
        if ticket in self._running:
            self._running.remove(ticket)
        else:
            queue = self._queues.get(ticket.peer)
            if queue is None or ticket not in queue:
                return
            queue.remove(ticket)
            if not queue:
                del self._queues[ticket.peer]
        self._per_peer[ticket.peer] -= 1
        if not self._per_peer[ticket.peer]:
            del self._per_peer[ticket.peer]
        if ticket.nbytes:
            self._held[ticket.peer] -= ticket.nbytes
            if not self._held[ticket.peer]:
                del self._held[ticket.peer]
        if service_s is not None:
            keep = 1 - SMOOTHING
            self._done_s = keep * self._done_s + SMOOTHING * service_s
            self._done_rows = keep * self._done_rows + SMOOTHING * max(ticket.work_rows, 1)

    def validate(self) -> None:
        """Asserts the invariants."""
        tickets = [t for queue in self._queues.values() for t in queue] + list(self._running)
        assert all(self._queues.values()), "an empty queue takes a turn"
        assert len(tickets) == sum(self._per_peer.values()) <= self._calls_per_host
        assert sum(self._held.values()) == sum(t.nbytes for t in tickets) and all(self._held.values())
        for peer, count in self._per_peer.items():
            assert 0 < count == sum(t.peer == peer for t in tickets) <= self._calls_per_peer

    def _refuse(self, retry_after_s: float, reason: str) -> Refused:
        return Refused(min(max(retry_after_s, RETRY_MIN_S), RETRY_MAX_S), reason)
