"""Whether both sides of a cut find everything again, and how soon."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from daaswarm.types import ModelRoot, PeerId

if TYPE_CHECKING:
    from daaswarm.sim.node import SimNode
    from daaswarm.sim.world import World

WATCHED = 200  # nodes looked at each second; of more, some evenly
EXPECTED_S = 60.0  # after healing everything has to be found
WATCH_S = 180.0  # then nobody looks any more

Known = dict[tuple[int, ModelRoot], frozenset[PeerId]]


class Healing:
    """Compares what nodes offer with what there is, each second after a cut has ended."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._before: Known = {}
        self._healed_at: float | None = None
        self._result: dict[str, Any] = {}

    def note_cut(self) -> None:
        """Remembers who knew whom."""
        self._before = {
            (node.number, root): frozenset(PeerId(k.advert.peer_id) for k in node.membership.book.get_all(root))
            for node in self._get_watched()
            for root in node.membership.topics.followed
        }

    def note_healed(self) -> None:
        self._healed_at = self._world.heap.now
        self._result = {"healed_after_s": None, "coverage_60_s": 0.0, "expired_wrongly": self._count_expired()}

    def look(self, _: float) -> None:
        """Once a simulated second."""
        if self._healed_at is None:
            return
        since = self._world.heap.now - self._healed_at
        if since > WATCH_S or (self._result["healed_after_s"] is not None and since > EXPECTED_S):
            self._healed_at = None
            return
        there, seen = self._count_offered()
        if there == seen and self._result["healed_after_s"] is None:
            self._result["healed_after_s"] = round(since, 3)
        if since <= EXPECTED_S:
            self._result["coverage_60_s"] = round(seen / there, 6) if there else 1.0

    def summarise(self) -> dict[str, Any]:
        """Of the last cut; empty if there was none. ``healed_after_s``: when every watched node offered every host of
        each expert it follows; ``None`` if that never was."""
        return self._result

    def _get_watched(self) -> list[SimNode]:
        nodes = self._world.slots
        step = max(len(nodes) // WATCHED, 1)
        return [node for node in nodes[::step] if node.is_alive and node.liar is None]

    def _count_offered(self) -> tuple[int, int]:
        world, there, seen = self._world, 0, 0
        now = world.heap.now
        for node in self._get_watched():
            for root in node.membership.topics.followed:
                hosts = {host.peer_id for host in world.get_hosts(root) if host is not node}
                there += len(hosts)
                offered = {PeerId(known.advert.peer_id) for known in node.membership.get_adverts(root, now)}
                seen += len(hosts & offered)
        return there, seen

    def _count_expired(self) -> int:
        """Adverts of live hosts that a node knew before the cut and has lost in it."""
        lost = 0
        world = self._world
        for node in self._get_watched():
            for root in node.membership.topics.followed:
                kept = {known.advert.peer_id for known in node.membership.book.get_all(root)}
                for peer in self._before.get((node.number, root), ()):
                    lost += peer not in kept and world.carrier.peers[peer].is_alive
        return lost
