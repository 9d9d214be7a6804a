"""Nodes that chose their ids near what others look for, and lie."""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nacl.signing import SigningKey

from daaswarm.core.places import get_places
from daaswarm.core.routing_table import K, get_node_number
from daaswarm.core.signing import MAX_TTL_S, get_peer_id
from daaswarm.messages import (
    Adverts,
    Contact,
    Doubt,
    Doubted,
    ExpertCall,
    Failure,
    FindNode,
    FindValue,
    Found,
    GetAdverts,
    Ping,
    Pointer,
    Pong,
    PullAdverts,
    Pulled,
    PushAdverts,
    Pushed,
    Signed,
    Store,
    Stored,
)
from daaswarm.sim.scenario import Lie

if TYPE_CHECKING:
    from daaswarm.sim.node import SimNode

TRIES = 32  # keys made for each that a liar keeps: ids come five bits nearer to what it wants to hide


class Gang:
    """All hostile nodes, who know each other. Each tells its own kind of lie."""

    def __init__(self, lies: Sequence[Lie], rng: random.Random) -> None:
        self._members: list[tuple[int, int]] = []  # (node number, which it is), ascending
        self._contacts: dict[int, Contact] = {}
        self._lies = lies
        self._rng = rng

    def choose_keys(self, keys: Sequence[bytes], count: int) -> list[SigningKey]:
        """Keys whose ids are near to all places of what shall be hidden: of :data:`TRIES` for each, the nearest."""
        goals = [int.from_bytes(place, "big") for key in keys for place in get_places(key)]
        self._rng.shuffle(goals)
        made = [SigningKey(self._rng.randbytes(32)) for _ in range(TRIES * count)]
        pool = sorted((get_node_number(get_peer_id(bytes(key.verify_key))), i) for i, key in enumerate(made))
        chosen: list[SigningKey] = []
        for n in range(count):
            goal = goals[n % len(goals)]
            (nearest,) = _get_nearest(pool, goal, 1)
            pool.remove(nearest)
            chosen.append(made[nearest[1]])
        return chosen

    def add(self, node: SimNode) -> None:
        """Another member."""
        insort(self._members, (get_node_number(node.peer_id), node.number))
        self._contacts[node.number] = node.contact

    def answer(self, node: SimNode, message: Any, now: float) -> Any:
        """What a member says; ``None`` for silence. Pings are answered: the dead would soon be forgotten."""
        if isinstance(message, FindNode | FindValue):
            return self._find(node, message, now)
        if isinstance(message, Store):
            return Stored()
        if isinstance(message, ExpertCall):
            return None
        return _POLITE.get(type(message), Failure(code="unsupported", message=""))

    def _find(self, node: SimNode, message: FindNode | FindValue, now: float) -> Any:
        lie = self._lies[node.number % len(self._lies)]
        if lie == "nothing":
            return Found()
        if lie == "the dead":
            return Found(contacts=[self._make_up() for _ in range(K)])
        if lie == "garbage":
            junk = Signed(public_key=bytes(32), signature=bytes(64), payload=self._rng.randbytes(50))
            nobody = Contact(peer_id="1" * 52, addrs=["/ip4/10.255.255.255/tcp/1"])
            return Found(contacts=[nobody], records=[junk])
        wanted = message.target if isinstance(message, FindNode) else message.place or message.key
        nearest = _get_nearest(self._members, int.from_bytes(wanted, "big"), K + 1)
        friends = [self._contacts[which] for _, which in nearest if which != node.number][:K]
        if lie == "own records" and isinstance(message, FindValue):
            pointer = Pointer(
                key=message.key,
                peer_id=node.peer_id,
                addrs=node.contact.addrs,
                seq=int(now * 1000),
                expires_at=now + MAX_TTL_S,
            )
            return Found(contacts=friends, records=[node.notary.seal_pointer(pointer)])
        return Found(contacts=friends)

    def _make_up(self) -> Contact:
        public_key = hashlib.sha256(self._rng.randbytes(8)).digest()
        return Contact(peer_id=get_peer_id(public_key), addrs=["/ip4/10.255.255.255/tcp/1"])


def _get_nearest(ascending: list[tuple[int, int]], goal: int, n: int) -> list[tuple[int, int]]:
    """The ``n`` nearest by XOR: who shares the longest prefix with the goal stands next to it."""
    at = bisect_left(ascending, (goal, 0))
    return sorted(ascending[max(at - 2 * n, 0) : at + 2 * n], key=lambda known: known[0] ^ goal)[:n]


_POLITE: dict[type, Any] = {
    Ping: Pong(),
    PushAdverts: Pushed(),
    PullAdverts: Pulled(),
    Doubt: Doubted(),
    GetAdverts: Adverts(adverts=[]),
}
