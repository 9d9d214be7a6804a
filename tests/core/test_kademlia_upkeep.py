"""What the Kademlia machine does besides looking up: batches, newcomers, restarts, late answers."""

from __future__ import annotations

import hashlib

from swarm_driver import NOW, Driver, make_contact, make_key, make_peer

from daaswarm.core.kademlia import EXPORTED, PROBE_FAILING_S, RESEED_S, Kademlia
from daaswarm.core.kademlia_events import (
    LATE_S,
    LookupDone,
    PublishDone,
    ReplyReceived,
    RequestFailed,
    RequestLate,
    SendRequest,
)
from daaswarm.core.lookup import ALPHA
from daaswarm.core.publishing import BATCH, REPUBLISH_S
from daaswarm.core.record_store import RecordStore
from daaswarm.core.replication import REPLICATE_S
from daaswarm.core.routing_table import compute_distance, get_node_id
from daaswarm.core.signing import get_swarm_id
from daaswarm.messages import Found, Store, Stored

KEY = hashlib.sha256(b"a model").digest()
SWARM = get_swarm_id("test")


def build(n: int, seed: int = 0) -> Driver:
    driver = Driver(seed)
    driver.is_checking = False
    for i in range(1, n + 1):
        driver.add(i, make_contact(1) if i > 1 else None)
    driver.tick(2.0)
    return driver


def count_stores(driver: Driver) -> list[int]:
    """From now on, how many records each Store message carries."""
    stores: list[int] = []
    send = driver._exchange

    def exchange(asker: object, request: SendRequest) -> object:
        if isinstance(request.message, Store):
            stores.append(len(request.message.records))
        return send(asker, request)  # type: ignore[arg-type]

    driver._exchange = exchange  # type: ignore[method-assign, assignment]
    return stores


def test_many_records_travel_in_few_messages_now_and_when_they_are_due_again() -> None:
    driver = build(5)
    node = driver.nodes[make_peer(2)]
    stores = count_stores(driver)
    keys = [hashlib.sha256(bytes([i])).digest() for i in range(100)]
    driver.perform(node, node.publish_all(keys, driver.now))
    assert sorted(stores) == [100 - BATCH] * 4 + [BATCH] * 4
    done = [e for e in driver.done[node.peer_id] if isinstance(e, PublishDone)]
    assert {e.key for e in done} == set(keys) and all(e.stored == e.asked == 4 and not e.refused for e in done)
    stores.clear()
    driver.tick(REPUBLISH_S)
    assert sorted(stores) == [100 - BATCH] * 4 + [BATCH] * 4
    assert all(len(n.store) == 100 for n in driver.nodes.values())


def test_the_caller_learns_which_limit_was_reached() -> None:
    driver = build(4)
    for i in (3, 4):
        driver.nodes[make_peer(i)].store = RecordStore(SWARM, records_per_giver=0)
    done = driver.publish(driver.nodes[make_peer(2)], KEY)
    assert done.stored == 1 and done.refused == {"you brought 0 records already": 2}


def test_a_newcomer_near_a_key_is_given_its_records_before_they_are_published_again() -> None:
    driver = build(30)
    for i in (3, 17):
        driver.publish(driver.nodes[make_peer(i)], KEY)
    driver.tick(2.0)
    # Of many newcomers, the one nearest to the key.
    nearest = min(range(100, 300), key=lambda n: compute_distance(get_node_id(make_peer(n)), KEY))
    newcomer = driver.add(nearest, make_contact(1))
    assert len(newcomer.store) == 0
    stores = count_stores(driver)
    driver.tick(REPLICATE_S)
    assert {p.peer_id for p, _ in newcomer.store.get(KEY, driver.now)} == {make_peer(3), make_peer(17)}
    assert 1 <= len(stores) <= 12, "a few tell it, not everybody who keeps them"
    stores.clear()
    driver.tick(REPLICATE_S)
    driver.tick(REPLICATE_S)
    assert not stores, "and only once"


def test_whoever_should_have_known_learns_it_from_a_lookup_and_forgets_it_in_time() -> None:
    driver = build(12)
    done = driver.publish(driver.nodes[make_peer(2)], KEY)
    forgetful = driver.nodes[make_peer(7)]
    forgetful.store = RecordStore(SWARM)
    for i in range(1, 13):
        driver.lookup(driver.nodes[make_peer(i)], KEY)
    ((pointer, _),) = forgetful.store.get(KEY, driver.now)
    assert done.asked == 11 and pointer.expires_at == NOW + 2.0 + 900
    driver.nodes[make_peer(2)].publisher.publications.clear()
    driver.tick(899)
    assert len(forgetful.store) == 1
    driver.tick(1.5)
    assert forgetful.store.get(KEY, driver.now) == []


def test_a_late_peer_does_not_hold_a_lookup_up_but_may_still_answer_it() -> None:
    driver = build(30)
    node = driver.nodes[make_peer(2)]
    first = [e for e in node.start_lookup("x", KEY, driver.now) if isinstance(e, SendRequest)]
    assert all(e.late_s == LATE_S for e in first)
    late = first[0]
    (instead,) = node.handle(RequestLate(rpc_id=late.rpc_id), driver.now)
    assert isinstance(instead, SendRequest) and instead.contact not in [e.contact for e in first]
    assert node.handle(RequestLate(rpc_id=late.rpc_id), driver.now) == []
    driver.perform(node, [*first[1:], instead])
    (done,) = [e for e in driver.done[node.peer_id] if isinstance(e, LookupDone)]
    assert len(done.contacts) == 20 and late.contact not in done.contacts
    assert node.handle(RequestLate(rpc_id=late.rpc_id), driver.now) == []
    assert node.handle(ReplyReceived(rpc_id=late.rpc_id, message=Found()), driver.now) == []
    assert late.contact.peer_id in node.table
    node.validate()


def test_a_lookup_of_nothing_but_late_peers_waits_for_them() -> None:
    driver = build(3)
    node = driver.nodes[make_peer(2)]
    sent = [e for e in node.start_lookup("x", KEY, driver.now) if isinstance(e, SendRequest)]
    assert [node.handle(RequestLate(rpc_id=e.rpc_id), driver.now) for e in sent] == [[], []]
    assert node.handle(RequestFailed(rpc_id=sent[0].rpc_id), driver.now) == []
    (done,) = node.handle(ReplyReceived(rpc_id=sent[1].rpc_id, message=Found()), driver.now)
    assert isinstance(done, LookupDone) and done.contacts == [sent[1].contact] and done.hops == 1


def test_a_restart_needs_no_bootstrap_peer() -> None:
    driver = build(40)
    before = driver.nodes[make_peer(9)]
    exported = before.export_contacts()
    assert 0 < len(exported) <= EXPORTED and before.peer_id not in {c.peer_id for c in exported}
    driver.dead |= {make_peer(1), *(c.peer_id for c in exported[:5])}  # type: ignore[arg-type]
    fresh = Kademlia(make_key(9), SWARM, before.contact, driver.rng)
    driver.nodes[fresh.peer_id] = fresh
    driver.perform(fresh, fresh.restore(exported, driver.now))
    assert len(fresh.table) >= 20
    before_s = driver.sent
    for _ in range(4):
        driver.tick(RESEED_S)
    assert not [c for c in exported[:5] if c.peer_id in fresh.table] and driver.sent > before_s


def test_after_the_network_was_away_contacts_of_better_times_are_tried() -> None:
    driver = build(8)
    node = driver.nodes[make_peer(5)]
    node._seeds.clear()
    driver.tick(31.0)
    others = {peer for peer in driver.nodes if peer != node.peer_id}
    driver.dead |= others
    for _ in range(30):
        driver.tick(PROBE_FAILING_S + 60)
    assert len(node.table) == 0 and len(node.export_contacts()) == 7
    driver.dead.clear()
    driver.tick(60)
    assert len(node.table) == 7


def test_swarms_in_one_public_network_still_find_each_other() -> None:
    driver = Driver()
    driver.is_checking = False
    seed = None
    for n in range(1, 31):
        node = Kademlia(make_key(n), SWARM, None, driver.rng)
        contact = type(make_contact(n))(peer_id=node.peer_id, addrs=[f"/ip4/8.8.8.{n}/tcp/1"])
        node.set_contact(contact)
        driver.nodes[node.peer_id], driver.done[node.peer_id] = node, []
        driver.perform(node, node.join(driver.now, [seed] if seed else []))
        seed = seed or contact
    driver.tick(2.0)
    driver.publish(driver.nodes[make_peer(3)], KEY)
    assert max(len(node.table) for node in driver.nodes.values()) <= 10
    for node in driver.nodes.values():
        assert [p.peer_id for p in driver.lookup(node, KEY).records] == [make_peer(3)]


def test_hops_are_counted() -> None:
    driver = build(60)
    driver.publish(driver.nodes[make_peer(3)], KEY)
    for n in (5, 40, 60):
        found = driver.lookup(driver.nodes[make_peer(n)], KEY)
        assert found.hops <= 3 and 0 < found.requests <= 9 * ALPHA
    assert driver.lookup(driver.nodes[make_peer(5)], KEY, "nodes").hops >= 1


def test_an_answer_to_a_store_that_nobody_counts_changes_nothing() -> None:
    driver = build(3)
    node = driver.nodes[make_peer(2)]
    request = node._send(make_contact(3), Store(records=[]))
    assert node.handle(ReplyReceived(rpc_id=request.rpc_id, message=Stored(refused={5: "odd"})), driver.now) == []
