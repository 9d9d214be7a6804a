"""What a simulation measures."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from daaswarm.core.kademlia_events import LookupDone
from daaswarm.messages import Pointer
from daaswarm.types import ModelRoot, PeerId

if TYPE_CHECKING:
    from daaswarm.sim.node import SimNode
    from daaswarm.sim.world import World

GRACE_S = 10.0  # after its start a host need not be found yet
DEAD_S = 60.0  # after its death a host must not be offered any more
STEP_S = 10.0  # of the series that plots show


class Figures:
    """Counts and samples, as they come."""

    def __init__(self) -> None:
        # lookups of an expert's hosts
        self.lookups = self.found = self.stale = 0
        self.pointers = self.dead_pointers = self.live_hosts = self.found_hosts = 0
        self.record_hops = array("l")
        self.lookup_s = array("d")
        self.requests = 0
        # lookups of random ids
        self.probes = self.nearest = 0
        self.hops = array("l")
        # calls
        self.calls = self.failed = self.abandoned = self.retried = self.refused = self.silent = 0
        self.hedged = 0
        self.call_s = array("d")  # hosts were known
        self.first_s = array("d")  # hosts had to be found
        self.offers = self.dead_offers = self.long_dead_offers = 0
        self.misbehaved = 0
        self.series: list[dict[str, float]] = []
        self._step = (0, 0)

    def note_lookup(
        self, world: World, node: SimNode, root: ModelRoot, records: Sequence[Pointer], done: LookupDone, seconds: float
    ) -> None:
        """A lookup of records ended. Succeeded: it found a host that lives and can be reached, if there is one."""
        now = world.heap.now
        live = {
            host.peer_id
            for host in world.get_hosts(root)
            if host is not node
            and now - host.known_since >= GRACE_S
            and not world.wires.is_cut(host.number, node.number)
        }
        self.pointers += len(records)
        dead = 0
        for pointer in records:
            host = world.carrier.peers.get(pointer.peer_id)
            dead += host is None or not host.is_alive or host.root != root
        self.dead_pointers += dead
        self.stale += dead > 0
        self.requests += done.requests
        if not live:
            return
        got = live.intersection(pointer.peer_id for pointer in records)
        self.lookups += 1
        self.found += bool(got)
        self.live_hosts += len(live)
        self.found_hosts += len(got)
        self.lookup_s.append(seconds)
        self.record_hops.append(done.hops)

    def note_probe(self, hops: int, *, is_right: bool) -> None:
        """A lookup of a random id ended, with the nearest of those that live or not."""
        self.probes += 1
        self.nearest += is_right
        self.hops.append(hops)

    def note_offered(self, world: World, node: SimNode, offered: Sequence[PeerId]) -> None:
        """These hosts may be called for a user."""
        now = world.heap.now
        self.offers += len(offered)
        for peer in offered:
            died_at = world.died_at.get(peer)
            if died_at is not None:
                self.dead_offers += 1
                self.long_dead_offers += now - died_at > DEAD_S

    def note_step(self, elapsed_s: float) -> None:
        """For plots: what the calls since the last step took."""
        calls, hops = self._step
        recent = sorted(self.call_s[calls:])
        steps = sorted(self.record_hops[hops:])
        self._step = len(self.call_s), len(self.record_hops)
        self.series.append(
            {
                "at_s": elapsed_s,
                "calls": len(recent),
                "p50_ms": get_percentile(recent, 0.5) * 1_000,
                "p99_ms": get_percentile(recent, 0.99) * 1_000,
                "hops_p50": get_percentile(steps, 0.5),
                "hops_p99": get_percentile(steps, 0.99),
            }
        )

    def summarise(self) -> dict[str, Any]:
        """The part of the result that comes from here."""
        calls, first, every = sorted(self.call_s), sorted(self.first_s), sorted([*self.call_s, *self.first_s])
        hops, lookup_s = sorted(self.hops), sorted(self.lookup_s)
        record_hops = sorted(self.record_hops)
        return {
            "lookups": self.lookups,
            "lookup_success": _share(self.found, self.lookups),
            "lookup_hosts_found": _share(self.found_hosts, self.live_hosts),
            "lookup_requests_mean": round(self.requests / max(self.lookups, 1), 2),
            "lookup_p50_ms": _ms(get_percentile(lookup_s, 0.5)),
            "lookup_p99_ms": _ms(get_percentile(lookup_s, 0.99)),
            "hops_p50": get_percentile(hops, 0.5),
            "hops_p99": get_percentile(hops, 0.99),
            "record_hops_p50": get_percentile(record_hops, 0.5),
            "record_hops_p99": get_percentile(record_hops, 0.99),
            "probes": self.probes,
            "probe_success": _share(self.nearest, self.probes),
            "stale_answers": _share(self.stale, self.lookups, of_nothing=0.0),
            "stale_pointers": _share(self.dead_pointers, self.pointers, of_nothing=0.0),
            "stale_offers": _share(self.dead_offers, self.offers, of_nothing=0.0),
            "stale_offers_60_s": _share(self.long_dead_offers, self.offers, of_nothing=0.0),
            "calls": self.calls,
            "calls_answered": len(every),
            "calls_failed": self.failed,
            "calls_abandoned": self.abandoned,
            "call_success": _share(len(every), len(every) + self.failed),
            "calls_retried": self.retried,
            "calls_hedged": self.hedged,
            "calls_refused": self.refused,
            "calls_to_silent_hosts": self.silent,
            "call_p50_ms": _ms(get_percentile(every, 0.5)),
            "call_p95_ms": _ms(get_percentile(every, 0.95)),
            "call_p99_ms": _ms(get_percentile(every, 0.99)),
            "known_call_p50_ms": _ms(get_percentile(calls, 0.5)),
            "known_call_p99_ms": _ms(get_percentile(calls, 0.99)),
            "first_call_p50_ms": _ms(get_percentile(first, 0.5)),
            "first_call_p99_ms": _ms(get_percentile(first, 0.99)),
            "misbehaved": self.misbehaved,
        }


def get_percentile(ascending: Sequence[float], share: float) -> float:
    """The nearest rank; 0 of nothing."""
    if not ascending:
        return 0.0
    return ascending[max(math.ceil(share * len(ascending)) - 1, 0)]


def _share(part: int, whole: int, of_nothing: float = 1.0) -> float:
    return round(part / whole, 6) if whole else of_nothing


def _ms(seconds: float) -> float:
    return round(seconds * 1_000, 3)
