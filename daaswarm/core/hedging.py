"""When a call that takes long is asked of another replica too, and how often that may be.

Dean and Barroso, "The Tail at Scale" (CACM 56:2, 2013): ask again after the 95th percentile of what such a call takes,
and take whichever answer comes first. That shortens the tail for about 5 % more calls. Where everything is slow at once
it would only add load, so a budget, earned by calls, ends it.
"""

from __future__ import annotations

from collections import deque

from daaswarm.types import PeerId

SHARE = 0.1  # further calls for each call: twice the 5 % that a 95th percentile means, and never much load
BURST = 20.0  # further calls saved up at most: a few hosts fall silent at once, while each has several calls
PERCENTILE = 0.95
KEPT = 64  # latencies by peer and size class; the 4th longest of them is the 95th percentile
LEAST = 16  # latencies, before they have a percentile worth the name
LOOK_EVERY = 8  # latencies between two sortings
DELAY_MIN_S = 1e-3  # before it, a further call costs about what it may save
TABLE = 16_384  # peers times size classes; the longest unused goes


class _Latencies:
    """Of one peer and size class, or of all peers in a size class."""

    __slots__ = ("_delay_s", "_fresh", "_kept")

    def __init__(self) -> None:
        self._kept: deque[float] = deque(maxlen=KEPT)
        self._fresh = 0  # since the last sorting
        self._delay_s: float | None = None

    def note(self, seconds: float) -> None:
        self._kept.append(seconds)
        self._fresh += 1
        if len(self._kept) >= LEAST and (self._delay_s is None or self._fresh >= LOOK_EVERY):
            self._fresh = 0
            self._delay_s = sorted(self._kept)[int(PERCENTILE * len(self._kept))]

    @property
    def delay_s(self) -> float | None:
        return self._delay_s


class Hedging:
    """One requester's. ``work`` is rows times experts of a call.

    Attributes:
        calls: noted so far.
        hedges: further calls that the budget gave.
    """

    def __init__(self) -> None:
        self.calls = self.hedges = 0
        self._tokens = BURST
        self._by_peer: dict[tuple[PeerId, int], _Latencies] = {}
        self._by_size: dict[int, _Latencies] = {}

    def note_call(self) -> None:
        """A call goes to a host for the first time; each earns :data:`SHARE` of a further one."""
        self.calls += 1
        self._tokens = min(BURST, self._tokens + SHARE)

    def note_latency(self, peer: PeerId, work: int, seconds: float) -> None:
        """``peer`` answered after so long, or hadn't yet when another replica had."""
        size = _get_size_class(work)
        key = peer, size
        latencies = self._by_peer.pop(key, None)
        if latencies is None:
            while len(self._by_peer) >= TABLE:
                del self._by_peer[next(iter(self._by_peer))]
            latencies = _Latencies()
        self._by_peer[key] = latencies  # the last used comes last
        latencies.note(seconds)
        self._by_size.setdefault(size, _Latencies()).note(seconds)

    def note_busy(self) -> None:
        """A host refused a call for want of room. It costs a further call: where a tenth of the calls is refused,
        none is left."""
        self._tokens = max(0.0, self._tokens - 1.0)

    def get_delay_s(self, peer: PeerId, work: int) -> float | None:
        """How long to wait for ``peer`` alone. ``None``: nobody answered enough such calls yet to tell.

        A peer that answered few of them is judged by what all peers take.
        """
        size = _get_size_class(work)
        own, every = self._by_peer.get((peer, size)), self._by_size.get(size)
        delay_s = own.delay_s if own is not None else None
        if delay_s is None and every is not None:
            delay_s = every.delay_s
        return None if delay_s is None else max(delay_s, DELAY_MIN_S)

    def take(self, calls: int) -> bool:
        """May so many further calls be made now? Then they count."""
        if calls > self._tokens:
            return False
        self._tokens -= calls
        self.hedges += calls
        return True

    def validate(self) -> None:
        """Asserts the invariants."""
        assert 0.0 <= self._tokens <= BURST
        assert self.hedges <= BURST + SHARE * self.calls + 1e-6
        assert len(self._by_peer) <= TABLE


def _get_size_class(work: int) -> int:
    """1 → 0, 2-7 → 1, 8-31 → 2 ...: within a class the largest call has four times the work of the smallest."""
    return max(work, 1).bit_length() // 2
