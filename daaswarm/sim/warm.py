"""A swarm that has run for long when the simulation begins, without simulating how it came to be.

What a node knows at the start is what the rules of the core lead to in the long run:

* each bucket holds up to k contacts, drawn at random of those who belong there, seen within the last probing interval;
  a bucket was last refreshed at a random time within the refreshing interval; there are connections to all contacts;
* every pointer lies with the peers nearest to its places, and was published at a random time within the republishing
  interval; its publisher knows them, and republishes when that has passed;
* hosts of one expert know each other's adverts. So do the ``settled`` among those whose users ask for it: they follow
  it, have called each of its hosts, and asked some of the others who follow it for news lately.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

from daaswarm.core.kademlia import PROBE_S, REFRESH_S
from daaswarm.core.membership import MEMBER_S, PULL_S, WANT_S
from daaswarm.core.places import get_places, get_replicas
from daaswarm.core.publishing import KEPT_ROUNDS, REPUBLISH_S, Publication
from daaswarm.core.routing_table import ID_BITS, SPARES, K, get_node_id, get_node_number
from daaswarm.core.signing import MAX_TTL_S
from daaswarm.messages import Contact, Pointer
from daaswarm.types import ModelRoot, PeerId

if TYPE_CHECKING:
    from daaswarm.sim.node import SimNode
    from daaswarm.sim.world import World

Ring = list[tuple[int, "SimNode"]]
"""By node number, ascending."""


def warm_up(world: World, nodes: Sequence[SimNode], rng: random.Random) -> None:
    """``nodes`` have known each other for long."""
    ring: Ring = sorted(((get_node_number(node.peer_id), node) for node in nodes), key=lambda entry: entry[0])
    for node in nodes:
        _fill_table(world, node, ring, rng)
    hosts = [node for node in nodes if node.root is not None]
    for node in hosts:
        _place_pointer(world, node, ring, rng)
    _exchange_adverts(world, hosts, rng)
    for node in hosts:
        if rng.random() < world.scenario.settled:
            for root in world.favourites[node.slot]:
                _acquaint(world, node, root, rng)


def get_nearest(ring: Ring, goal: int, n: int) -> list[SimNode]:
    """The ``n`` nodes nearest to a point: all that share the longest prefix with it that ``n`` of them share."""
    low, high, bits = 0, len(ring), 0
    while high - low > n and bits < ID_BITS:
        bits += 1
        first = goal >> (ID_BITS - bits) << (ID_BITS - bits)
        start = bisect_left(ring, first, low, high, key=_get_number)
        end = bisect_left(ring, first + (1 << (ID_BITS - bits)), low, high, key=_get_number)
        if end - start < n:
            break
        low, high = start, end
    return [node for _, node in sorted(ring[low:high], key=lambda entry: entry[0] ^ goal)[:n]]


def _get_number(entry: tuple[int, SimNode]) -> int:
    return entry[0]


def _fill_table(world: World, node: SimNode, ring: Ring, rng: random.Random) -> None:
    own = get_node_number(node.peer_id)
    table, now = node.kademlia.table, world.heap.now
    low, high = 0, len(ring)
    for shared in range(ID_BITS):
        # Of those who share ``shared`` bits with us, the other half is a bucket, ours is cut again.
        bit = ID_BITS - 1 - shared
        border = (own >> (bit + 1) << (bit + 1)) | (1 << bit)
        middle = bisect_left(ring, border, low, high, key=_get_number)
        if own >> bit & 1:
            theirs, low = range(low, middle), middle
        else:
            theirs, high = range(middle, high), middle
        wanted = min(len(theirs), K + SPARES)
        for i in rng.sample(theirs, wanted):
            other = ring[i][1]
            table.note_seen(other.contact, now - PROBE_S * rng.random())
            world.wires.note_link(node.number, other.number)
        if high - low <= 1:
            break
    for entry in table.get_entries():  # several of a bucket: the last counts
        table.note_refreshed(get_node_id(entry.contact.peer_id), now - REFRESH_S * rng.random())


def _place_pointer(world: World, node: SimNode, ring: Ring, rng: random.Random) -> None:
    assert node.root is not None
    now = world.heap.now
    age_s = REPUBLISH_S * rng.random()
    key = bytes.fromhex(node.root)
    pointer = Pointer(
        key=key,
        peer_id=node.peer_id,
        addrs=node.contact.addrs,
        seq=int((now - age_s) * 1000),
        expires_at=now - age_s + MAX_TTL_S,
    )
    signed = node.notary.seal_pointer(pointer)
    node.kademlia.store.put(signed, now)
    keepers: dict[PeerId, Contact] = {}
    for i, place in enumerate(get_places(key)):
        for keeper in get_nearest(ring, int.from_bytes(place, "big"), get_replicas(K, i)):
            if keeper is not node and keeper.liar is None:
                keeper.kademlia.store.put(signed, now, node.peer_id)
                keepers[keeper.peer_id] = keeper.contact
    node.kademlia.publisher.publications[key] = Publication(
        signed,
        pointer.seq,
        due_at=now + REPUBLISH_S - age_s,
        asked=len(keepers),
        stored=len(keepers),
        keepers=list(keepers.values()),
        rounds=int((KEPT_ROUNDS + 1) * rng.random()),
    )
    node.known_since = now - age_s


def _exchange_adverts(world: World, hosts: Sequence[SimNode], rng: random.Random) -> None:
    now = world.heap.now
    for node in hosts:
        node.membership.advertise(node.make_advert(), now - REPUBLISH_S * rng.random())
    for node in hosts:
        assert node.root is not None
        others = [other for other in world.get_hosts(node.root) if other is not node]
        for other in others:
            signed = other.membership.own.get_signed(node.root, now)
            assert signed is not None
            node.membership.put(signed, now)
        # Looked for members some time ago: what it would have asked them then is long answered.
        contacts = [other.contact for other in others]
        node.membership.introduce(node.root, contacts, now - WANT_S * rng.random())


def _acquaint(world: World, node: SimNode, root: ModelRoot, rng: random.Random) -> None:
    """The node's users have asked for an expert before."""
    now, membership = world.heap.now, node.membership
    membership.follow(root, now)
    hosts = [host for host in world.get_hosts(root) if host is not node]
    for host in hosts:
        signed = host.membership.own.get_signed(root, now)
        assert signed is not None
        membership.put(signed, now)
        world.wires.note_link(node.number, host.number)
        service_s = host.host.get_service_s()
        node.router.note_reply(
            host.peer_id, 1, world.wires.get_rtt_s(node.number, host.number) + service_s, service_s, 0, now
        )
    membership.introduce(root, [host.contact for host in hosts], now - WANT_S * rng.random())
    topic = membership.topics.followed[root]
    topic.pull_at = now + PULL_S * rng.random()
    for host in rng.sample(hosts, min(len(hosts), int(MEMBER_S / PULL_S))):
        host.membership.topics.add_member(root, node.contact, now + MEMBER_S * rng.random())
    node.found.add(root)
