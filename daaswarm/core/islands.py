"""How far other peers are, from what calls take anyway, and which of them are near: this node's island.

A sharded answer costs a round trip per layer and token, so it belongs on peers that are near; a round trip is what
tells them. Each call gives a sample ``elapsed = round trip + bytes / bandwidth + service``. Noise only ever adds to
it, so the round trip is the least of a window (as BBR's filter: Cardwell et al., "BBR", ACM Queue 2016), and the
bandwidth the most that a large sample shows beyond the round trip.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from daaswarm.core.marks import get_mark
from daaswarm.types import ExpertId, PeerId

SMALL_BYTES = 8_192  # of a call, both ways: at 10 MB/s under a millisecond, so it tells the round trip
LARGE_BYTES = 65_536  # tells the bandwidth: over a network that is fast for round trips of milliseconds, most of it
WINDOW_S = 60.0  # of the filters; a route that changed is noticed within two
BELIEVED_SERVICE = 0.9  # of a call's time at most: a peer can't talk itself nearer than a tenth of where it is
PEERS = 8_192  # with samples; the longest unheard of goes

NEAR_S = 0.005  # a peer this near joins the island: 30 layers then cost 150 ms a token
LEFT_S = 0.008  # and stays until it is this far, so that one at the edge isn't in and out
TOLD = 64  # peers near it that one peer may name; 512 bytes of its answer to a ping

FLOOR_S = 1e-6  # of a round trip; clocks are no finer


class Link(NamedTuple):
    """The way to a peer. ``bytes_per_s`` is ``None`` before a large call has told."""

    rtt_s: float
    bytes_per_s: float | None


class _Samples:
    """The best of two windows of :data:`WINDOW_S`: this one's and the last one's."""

    __slots__ = ("bandwidth", "began_at", "old_bandwidth", "old_rtt_s", "rtt_s", "told", "used_at")

    def __init__(self, now: float) -> None:
        self.began_at = self.used_at = now
        self.rtt_s = self.old_rtt_s = float("inf")
        self.bandwidth = self.old_bandwidth = 0.0
        self.told: tuple[int, ...] = ()  # marks of the peers that it finds near


class Links:
    """What one node knows of the way to each peer it calls."""

    def __init__(self, *, peers: int = PEERS) -> None:
        self._limit = peers
        self._peers: dict[PeerId, _Samples] = {}
        self._near: set[PeerId] = set()

    def note(self, peer: PeerId, nbytes: int, elapsed_s: float, service_s: float, now: float) -> None:
        """A call was answered.

        Args:
            nbytes: of its body and its answer's.
            elapsed_s: from sending to the answer, measured here.
            service_s: what the peer says it spent on it; 0 where it says nothing. Believed as far as
                :data:`BELIEVED_SERVICE` allows.
        """
        samples = self._peers.get(peer)
        if samples is None:
            if len(self._peers) >= self._limit:
                oldest = min(self._peers, key=lambda known: self._peers[known].used_at)
                del self._peers[oldest]
                self._near.discard(oldest)
            samples = self._peers[peer] = _Samples(now)
        elif not 0 <= now - samples.began_at < WINDOW_S:
            # An answer after a long silence finds both windows old: nothing of them is kept beside it.
            is_last = 0 <= now - samples.began_at < 2 * WINDOW_S
            samples.old_rtt_s = samples.rtt_s if is_last else float("inf")
            samples.old_bandwidth = samples.bandwidth if is_last else 0.0
            samples.rtt_s, samples.bandwidth, samples.began_at = float("inf"), 0.0, now
        samples.used_at = now
        travelled_s = max(elapsed_s - min(max(service_s, 0.0), BELIEVED_SERVICE * elapsed_s), FLOOR_S)
        # A large call that was quicker than every small one tells the round trip too: it is no longer than that.
        if nbytes <= SMALL_BYTES or travelled_s < min(samples.rtt_s, samples.old_rtt_s):
            samples.rtt_s = min(samples.rtt_s, travelled_s)
        if nbytes >= LARGE_BYTES:
            # What a round trip alone explains says nothing of the bandwidth, so that it is at least this much.
            beyond_s = travelled_s - min(samples.rtt_s, samples.old_rtt_s)
            samples.bandwidth = max(samples.bandwidth, nbytes / max(beyond_s, travelled_s / 2))
        rtt_s = min(samples.rtt_s, samples.old_rtt_s)
        if rtt_s <= (LEFT_S if peer in self._near else NEAR_S):
            self._near.add(peer)
        else:
            self._near.discard(peer)

    def note_told(self, peer: PeerId, near: Iterable[int]) -> None:
        """A peer that was called says which peers it finds near: marks, of which :data:`TOLD` count."""
        samples = self._peers.get(peer)
        if samples is not None:
            samples.told = tuple(near)[:TOLD]

    def get(self, peer: PeerId) -> Link | None:
        """``None`` for a peer that was never called."""
        samples = self._peers.get(peer)
        if samples is None:
            return None
        rtt_s = min(samples.rtt_s, samples.old_rtt_s)
        return Link(rtt_s, max(samples.bandwidth, samples.old_bandwidth) or None)

    def get_island(self) -> frozenset[PeerId]:
        """The peers near this node: within :data:`NEAR_S`, and until they are beyond :data:`LEFT_S`."""
        return frozenset(self._near)

    def find_islands(self, own: PeerId) -> list[list[PeerId]]:
        """All peers that were called, in islands: see :func:`find_islands`."""
        marks = {get_mark(peer): peer for peer in self._peers}
        told = {peer: [marks[mark] for mark in samples.told if mark in marks] for peer, samples in self._peers.items()}
        rtts = {peer: min(samples.rtt_s, samples.old_rtt_s) for peer, samples in self._peers.items()}
        return find_islands(own, self._near, rtts, told)

    def validate(self) -> None:
        """Asserts the invariants."""
        assert len(self._peers) <= self._limit and self._near <= self._peers.keys()
        for peer, samples in self._peers.items():
            assert len(samples.told) <= TOLD
            rtt_s = min(samples.rtt_s, samples.old_rtt_s)
            assert FLOOR_S <= rtt_s < float("inf")
            assert rtt_s <= LEFT_S if peer in self._near else rtt_s > NEAR_S


def find_islands(
    own: PeerId, near: Collection[PeerId], rtts: Mapping[PeerId, float], told: Mapping[PeerId, Collection[PeerId]]
) -> list[list[PeerId]]:
    """All peers in islands: this node's own first, then the others', the nearest first.

    An island is those whom its first peer finds near, so it follows from measurements that one of its peers made
    itself. Of the peers left over, the one with the smallest PeerId is the next to be a first: the same figures give
    the same islands, whatever order they came in.

    Args:
        near: the peers near this node, by its own word.
        rtts: s, to every peer there is to place.
        told: whom other peers find near, by theirs. It moves nobody into or out of this node's own island.
    """
    islands = [[own, *sorted(set(near) & rtts.keys() - {own})]]
    left = sorted(rtts.keys() - set(islands[0]))
    others: list[list[PeerId]] = []
    placed: set[PeerId] = set()
    for first in left:
        if first not in placed:
            known = set(told.get(first, ()))
            island = [first, *(peer for peer in left if peer != first and peer in known and peer not in placed)]
            placed.update(island)
            others.append(sorted(island))
    others.sort(key=lambda island: (min(rtts[peer] for peer in island), island))
    return islands + others


def choose_preferred(
    layers: Mapping[int, int], holders: Mapping[ExpertId, Collection[PeerId]], island: Collection[PeerId]
) -> frozenset[PeerId]:
    """Whom a sharded answer asks first: the hosts on the requester's island if they hold all of the model. Otherwise
    nobody in particular: part of each pass would be far anyway, and then the fastest hosts are as good as the near.

    Args:
        layers: how many experts (or slices) each layer has.
        island: the requester's own, itself included where it hosts.
    """
    wanted = set(island)
    preferred: set[PeerId] = set()
    for expert in _list_experts(layers):
        near = wanted.intersection(holders.get(expert, ()))
        if not near:
            return frozenset()
        preferred |= near
    return frozenset(preferred)


def _list_experts(layers: Mapping[int, int]) -> Iterable[ExpertId]:
    return (ExpertId(layer, expert) for layer in sorted(layers) for expert in range(layers[layer]))
