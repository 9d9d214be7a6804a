"""RoutingTable: kept contacts are right, near and alive."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from swarm_driver import NOW, make_contact, make_peer

from daaswarm.core.routing_table import (
    MAX_FAILURES,
    PER_SUBNET,
    PER_SUBNET_BUCKET,
    RoutingTable,
    compute_distance,
    get_node_id,
)
from daaswarm.messages import Contact
from daaswarm.types import PeerId

OWN = make_peer(0)
CONTACTS = [make_contact(n) for n in range(64)]
K = 4


class TableMachine(RuleBasedStateMachine):
    """Against a plain model: who was seen last, and how often each failed since."""

    def __init__(self) -> None:
        super().__init__()
        self.table = RoutingTable(OWN, K)
        self.seen: dict[str, int] = {}  # peer -> failures in a row since it was seen
        self.now = NOW

    @rule(n=st.integers(0, 63))
    def see(self, n: int) -> None:
        self.now += 1
        inside = self.table.note_seen(CONTACTS[n], self.now)
        assert inside == (CONTACTS[n].peer_id in self.table)
        if n:
            self.seen[CONTACTS[n].peer_id] = 0
        else:
            assert not inside

    @rule(n=st.integers(0, 63))
    def fail(self, n: int) -> None:
        peer = PeerId(CONTACTS[n].peer_id)
        was_in = peer in self.table
        self.table.note_failed(peer, self.now)
        if peer in self.seen:
            self.seen[peer] += 1
        if was_in and self.seen[peer] >= MAX_FAILURES:
            assert peer not in self.table

    @rule(n=st.integers(0, 63), count=st.integers(0, 10))
    def ask(self, n: int, count: int) -> None:
        target = get_node_id(CONTACTS[n].peer_id)
        found = [c.peer_id for c in self.table.closest(target, count)]
        healthy = [p for p in self.seen if p in self.table and not self.seen[p]]  # type: ignore[operator]
        nearest = sorted(healthy, key=lambda p: compute_distance(get_node_id(p), target))
        assert found == nearest[:count]
        for passed in nearest[:1]:
            assert [c.peer_id for c in self.table.closest(target, count, passed)] == nearest[1 : count + 1]

    @invariant()
    def holds_only_the_seen(self) -> None:
        self.table.validate()
        peers = {e.contact.peer_id for e in self.table.get_entries()}
        assert peers <= self.seen.keys()
        # The contacts nearest to us are all there: no neighbour that never failed is left out.
        never_failed = [p for p, failures in self.seen.items() if not failures]
        if len(self.seen) <= K:
            assert peers >= set(never_failed)


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_full_buckets_keep_the_old_and_hold_spares() -> None:
    table = RoutingTable(OWN, K)
    far = [c for c in CONTACTS[1:] if compute_distance(get_node_id(OWN), get_node_id(c.peer_id)).bit_length() == 256]
    near = [c for c in CONTACTS[1:] if c not in far]
    assert len(far) > K + 2 and len(near) > K
    for contact in near[: K + 1] + far:
        table.note_seen(contact, NOW)
    inside = [c for c in far if c.peer_id in table]
    assert inside == far[:K], "long-lived contacts stay"
    table.note_failed(PeerId(far[0].peer_id), NOW)
    assert far[0].peer_id not in table and far[-1].peer_id in table, "the freshest spare takes over at once"


def test_a_split_makes_the_far_half_due_for_a_refresh() -> None:
    table = RoutingTable(OWN, K)
    table.note_refreshed(get_node_id(OWN), NOW)
    assert table.get_stale_targets(NOW, 10, random.Random(0)) == []
    for n in range(1, K + 2):
        table.note_seen(make_contact(n), NOW)
    (target,) = table.get_stale_targets(NOW, 10, random.Random(0))
    assert compute_distance(target, get_node_id(OWN)).bit_length() == 256


def test_a_newcomer_takes_the_place_of_a_failing_contact() -> None:
    table = RoutingTable(OWN, K)
    far = [c for c in CONTACTS[1:] if compute_distance(get_node_id(OWN), get_node_id(c.peer_id)).bit_length() == 256]
    near = [c for c in CONTACTS[1:] if c not in far]
    for contact in near[: K + 1] + far[:K]:
        table.note_seen(contact, NOW)
    table.note_failed(PeerId(far[2].peer_id), NOW)
    assert far[2].peer_id in table
    assert table.note_seen(far[K], NOW)
    table.validate()
    assert [c.peer_id in table for c in far[: K + 1]] == [True, True, False, True, True]


def test_neighbours_are_all_kept() -> None:
    table = RoutingTable(OWN)
    for n in range(1, 400):
        table.note_seen(make_contact(n), NOW)
    table.validate()
    everyone = sorted(
        (make_peer(n) for n in range(1, 400)), key=lambda p: compute_distance(get_node_id(p), get_node_id(OWN))
    )
    assert [c.peer_id for c in table.closest(get_node_id(OWN), 20)] == everyone[:20]
    assert len(table) < 399


def test_a_contact_without_spares_gets_a_second_chance_and_new_addresses() -> None:
    table = RoutingTable(OWN)
    contact = make_contact(1)
    table.note_seen(contact, NOW)
    table.note_failed(PeerId(contact.peer_id), NOW)
    assert contact.peer_id in table and table.closest(bytes(32), 5) == []
    moved = type(contact)(peer_id=contact.peer_id, addrs=["/ip4/9.9.9.9/tcp/9"])
    table.note_seen(moved, NOW)
    assert table.closest(bytes(32), 5) == [moved]
    table.note_failed(PeerId(contact.peer_id), NOW)
    table.note_failed(PeerId(contact.peer_id), NOW)
    assert contact.peer_id not in table


def test_stale_targets_fall_into_their_buckets_that_have_room() -> None:
    def get_prefix(target: bytes) -> int:
        return 256 - compute_distance(target, get_node_id(OWN)).bit_length()

    table = RoutingTable(OWN, K)
    for n in range(1, 64):
        table.note_seen(make_contact(n), NOW)
    rng = random.Random(1)
    prefixes = [get_prefix(get_node_id(entry.contact.peer_id)) for entry in table.get_entries()]
    full = {prefix for prefix in prefixes if prefixes.count(prefix) == K}
    assert len(full) > 1
    (far,) = [e for e in table.get_entries() if get_prefix(get_node_id(e.contact.peer_id)) == 1][:1]
    for _ in range(12):  # its spares and itself
        table.note_failed(PeerId(far.contact.peer_id), NOW)
        in_bucket = [e for e in table.get_entries() if get_prefix(get_node_id(e.contact.peer_id)) == 1]
        if len(in_bucket) < K:
            break
        (far,) = in_bucket[:1]
    targets = table.get_stale_targets(NOW, 100, rng)
    assert 1 in {get_prefix(target) for target in targets} and 0 not in {get_prefix(target) for target in targets}
    for target in targets:
        table.note_refreshed(target, NOW)
    assert table.get_stale_targets(NOW, 100, rng) == [], "each target was in a bucket of its own"
    assert len(table.get_stale_targets(NOW + 1, 1, rng)) == 1


def at(n: int, *addrs: str) -> Contact:
    return Contact(peer_id=make_peer(n), addrs=list(addrs))


def test_few_contacts_of_one_public_network_are_taken() -> None:
    table = RoutingTable(OWN)
    taken = [table.note_seen(at(n, f"/ip4/8.8.8.{n % 250}/tcp/1"), NOW) for n in range(1, 400)]
    table.validate()
    assert len(table) == sum(taken) <= PER_SUBNET
    others = [table.note_seen(at(n, f"/ip4/9.9.{n % 250}.1/tcp/1"), NOW) for n in range(400, 430)]
    assert all(others)
    assert not table.note_seen(at(500, "/ip4/9.1.1.1/tcp/1", "/ip4/8.8.8.8/tcp/1"), NOW), "each address counts"
    table.validate()


def test_a_bucket_takes_fewer_and_gives_the_place_back() -> None:
    table = RoutingTable(OWN)
    contacts = [at(n, "/ip4/8.8.8.8/tcp/1") for n in range(1, PER_SUBNET_BUCKET + 2)]
    assert [table.note_seen(c, NOW) for c in contacts] == [True] * PER_SUBNET_BUCKET + [False]
    for _ in range(MAX_FAILURES):
        table.note_failed(PeerId(contacts[0].peer_id), NOW)
    table.validate()
    assert table.note_seen(contacts[-1], NOW)
    # Whoever moves into a full network goes; whoever moves out of it makes room.
    assert table.note_seen(at(60, "/ip4/9.9.9.9/tcp/1"), NOW)
    assert not table.note_seen(at(60, "/ip4/8.8.8.8/tcp/1"), NOW)
    assert make_peer(60) not in table
    assert table.note_seen(at(2, "/ip4/9.9.9.9/tcp/1"), NOW)
    assert table.note_seen(at(60, "/ip4/8.8.8.8/tcp/1"), NOW)
    table.validate()


def test_spares_count_for_their_network_too() -> None:
    table = RoutingTable(OWN, K)
    far = [n for n in range(1, 200) if compute_distance(get_node_id(OWN), get_node_id(make_peer(n))) >> 255]
    near = [n for n in range(1, 200) if n not in far]
    for n in near[: K + 1] + far[:K]:
        table.note_seen(make_contact(n), NOW)
    for n in far[K:]:
        table.note_seen(at(n, "/ip4/8.8.8.8/tcp/1"), NOW)
    table.validate()
    table.note_failed(make_peer(far[0]), NOW)
    table.note_failed(make_peer(far[1]), NOW)
    assert [n for n in far if make_peer(n) in table] == [*far[2:K], *far[K : K + PER_SUBNET_BUCKET]]
    table.validate()


def test_private_networks_and_swarms_of_friends_are_not_limited() -> None:
    for limit, address in ((True, "/ip4/10.0.0.{}/tcp/1"), (False, "/ip4/8.8.8.{}/tcp/1")):
        table = RoutingTable(OWN, limit_subnets=limit)
        assert all(table.note_seen(at(n, address.format(n)), NOW) for n in range(1, 20))
        table.validate()


def test_what_is_exported_comes_from_all_distances_and_is_healthy() -> None:
    table = RoutingTable(OWN, K)
    for n in range(1, 64):
        table.note_seen(make_contact(n), NOW + n)
    table.note_failed(PeerId(table.closest(get_node_id(OWN), 1)[0].peer_id), NOW)
    failing = [e.contact for e in table.get_entries() if e.failures]
    exported = table.export(6)
    assert len(exported) == 6 and not [c for c in exported if c in failing]
    prefixes = {compute_distance(get_node_id(c.peer_id), get_node_id(OWN)).bit_length() for c in exported}
    assert len(prefixes) >= 4
    assert len(table.export(1000)) == len(table) - len(failing)


def test_who_was_silent_for_long_or_failed_is_due_once_seen_no_more() -> None:
    silent_s, failing_s = 300.0, 5.0
    table = RoutingTable(OWN, K)
    first, second = make_contact(1), make_contact(2)
    table.note_seen(first, NOW)
    table.note_seen(second, NOW + 100)
    assert table.get_due(NOW + 100, silent_s, failing_s) == ([], NOW + 300)
    due, again_at = table.get_due(NOW + 300, silent_s, failing_s)
    assert [entry.contact for entry in due] == [first] and again_at == NOW + 300
    table.note_seen(first, NOW + 301)
    assert table.get_due(NOW + 302, silent_s, failing_s) == ([], NOW + 400)
    table.note_failed(PeerId(first.peer_id), NOW + 303)
    assert table.get_due(NOW + 304, silent_s, failing_s) == ([], NOW + 308)
    assert [entry.contact for entry in table.get_due(NOW + 308, silent_s, failing_s)[0]] == [first]
    table.shift(-100)
    assert [entry.contact for entry in table.get_due(NOW + 208, silent_s, failing_s)[0]] == [first]
    table.validate()
