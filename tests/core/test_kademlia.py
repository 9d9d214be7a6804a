"""The Kademlia machine among its like: joining, publishing, losing nodes, and hostile answers."""

from __future__ import annotations

import hashlib

import pytest
from swarm_driver import NOW, SWARM, Driver, make_contact, make_key, make_peer

from daaswarm.core.kademlia import MET, PROBE_FAILING_S, RESEED_S, SEED_S, Kademlia
from daaswarm.core.kademlia_events import (
    LookupDone,
    Misbehaved,
    PublishDone,
    ReplyReceived,
    RequestReceived,
    SendRequest,
)
from daaswarm.core.lookup import ALPHA, PATHS, REQUESTS
from daaswarm.core.places import get_places
from daaswarm.core.publishing import KEPT_ROUNDS, REPUBLISH_S
from daaswarm.core.record_store import POINTER_KIND, RecordStore
from daaswarm.core.routing_table import compute_distance, get_node_id
from daaswarm.core.signing import MAX_TTL_S, seal
from daaswarm.errors import LocalProtocolError
from daaswarm.messages import Contact, Failure, FindNode, FindValue, Found, Pointer, Signed, Store, Stored

KEY = hashlib.sha256(b"a model").digest()


def make_pointer(n: int, *, signer: int | None = None, key: bytes = KEY, seq: int = 1, ttl_s: float = 600.0) -> Signed:
    pointer = Pointer(key=key, peer_id=make_peer(n), addrs=["/ip4/1.2.3.4/tcp/1"], seq=seq, expires_at=NOW + ttl_s)
    return seal(pointer, POINTER_KIND, make_key(n if signer is None else signer), SWARM)


def build(n: int, seed: int = 0) -> Driver:
    driver = Driver(seed)
    driver.add(1)
    for i in range(2, n + 1):
        driver.add(i, make_contact(1))
    driver.tick(2.0)
    return driver


def test_fifty_nodes_from_one_bootstrap_find_all_publishers_and_survive_losses() -> None:
    driver = build(50)
    driver.is_checking = False  # what follows are tens of thousands of events; the upkeep below is checked
    publishers = [make_peer(i) for i in (3, 17, 42)]
    for peer in publishers:
        done = driver.publish(driver.nodes[peer], KEY)
        assert 20 < done.stored == done.asked <= 40  # near the key, and half as many near two other places
    for node in driver.nodes.values():
        found = driver.lookup(node, KEY)
        assert sorted(r.peer_id for r in found.records) == sorted(publishers)
        assert all(
            r.addrs == make_contact(i).addrs for i in (3, 17, 42) for r in found.records if r.peer_id == make_peer(i)
        )
        found = driver.lookup(node, KEY, "nodes")  # the nearest of the whole swarm, in order
        others = [p for p in driver.nodes if p != node.peer_id]
        nearest = sorted(others, key=lambda p: compute_distance(get_node_id(p), KEY))
        assert [c.peer_id for c in found.contacts] == nearest[:20]

    killed = [p for p in driver.nodes if p not in publishers][::5]
    assert len(killed) >= 9
    driver.dead.update(killed)
    for peer, node in driver.nodes.items():
        if peer not in driver.dead:
            found = driver.lookup(node, KEY)
            assert sorted(r.peer_id for r in found.records) == sorted(publishers)
            assert not driver.dead & {c.peer_id for c in found.contacts}

    # The dead are forgotten by everybody, and nobody hands them on.
    for _ in range(30):
        driver.tick(PROBE_FAILING_S + 60)
    for peer, node in driver.nodes.items():
        if peer not in driver.dead:
            assert not [d for d in driver.dead if d in node.table]


@pytest.mark.parametrize("n", [2, 3, 5])
def test_small_swarms_work_from_one_contact(n: int) -> None:
    driver = build(n, seed=n)
    for i in range(1, n + 1):
        assert driver.publish(driver.nodes[make_peer(i)], KEY).stored == n - 1
    for node in driver.nodes.values():
        assert len(node.table) == n - 1
        assert len(driver.lookup(node, KEY).records) == n


def test_alone_a_lookup_ends_at_once_and_a_published_record_is_found_locally() -> None:
    driver = Driver()
    node = driver.add(1)
    assert driver.lookup(node, KEY).records == []
    assert driver.publish(node, KEY).asked == 0
    assert [r.peer_id for r in driver.lookup(node, KEY).records] == [node.peer_id]


def test_join_is_retried_while_the_seed_is_down() -> None:
    driver = Driver()
    seed = driver.add(1)
    driver.dead.add(seed.peer_id)
    node = driver.add(2, make_contact(1))
    assert len(node.table) == 0
    driver.dead.clear()
    driver.tick(SEED_S - 1)
    assert len(node.table) == 0
    driver.tick(1)
    assert len(node.table) == len(seed.table) == 1


def test_a_restarted_seed_does_not_found_a_second_swarm() -> None:
    driver = build(6)
    driver.dead.add(make_peer(1))
    for _ in range(20):
        driver.tick(60)
    assert all(make_peer(1) not in n.table for p, n in driver.nodes.items() if p not in driver.dead)
    driver.dead.clear()
    fresh = driver.add(1)
    assert len(fresh.table) == 0
    driver.tick(RESEED_S)
    driver.tick(1)
    assert len(fresh.table) == 5


def test_of_the_peers_that_nobody_named_only_the_latest_count() -> None:
    driver = Driver()
    node = driver.add(1)
    for n in range(2, MET + 12):
        driver.perform(node, node.meet(make_contact(n), driver.now))
    assert [contact.peer_id for contact in node._met] == [make_peer(n) for n in range(12, MET + 12)]


def test_a_client_only_peer_finds_but_is_never_a_contact_and_cannot_publish() -> None:
    driver = build(5)
    driver.publish(driver.nodes[make_peer(2)], KEY)
    client = driver.add(99, make_contact(1), reachable=False)
    assert [r.peer_id for r in driver.lookup(client, KEY).records] == [make_peer(2)]
    assert all(client.peer_id not in node.table for node in driver.nodes.values())
    with pytest.raises(LocalProtocolError, match="address"):
        client.publish(KEY, driver.now)


def test_republishing_outlives_the_ttl_and_unpublishing_ends_it() -> None:
    driver = build(6)
    publisher = driver.nodes[make_peer(2)]
    driver.publish(publisher, KEY)
    first = driver.lookup(driver.nodes[make_peer(5)], KEY).records[0]
    for _ in range(8):
        driver.tick(REPUBLISH_S)
    newcomer = driver.add(7, make_contact(1))
    later = driver.lookup(newcomer, KEY).records[0]
    assert later.seq > first.seq and later.expires_at > first.expires_at + MAX_TTL_S
    # New addresses travel with the next round.
    publisher.set_contact(Contact(peer_id=publisher.peer_id, addrs=["/ip4/9.9.9.9/tcp/9"]))
    driver.tick(REPUBLISH_S)
    assert driver.lookup(newcomer, KEY).records[0].addrs == ["/ip4/9.9.9.9/tcp/9"]
    driver.perform(publisher, publisher.unpublish(KEY, driver.now))
    assert driver.lookup(newcomer, KEY).records == []  # at once: nobody is pointed there any more
    assert all(pointer.addrs == [] for node in driver.nodes.values() for pointer, _ in node.store.get(KEY, driver.now))
    for _ in range(4):
        driver.tick(REPUBLISH_S)
    assert driver.lookup(newcomer, KEY).records == []
    assert all(len(node.store) == 0 for node in driver.nodes.values())


def test_a_late_publisher_reaches_nodes_that_joined_after_it() -> None:
    driver = build(3)
    driver.publish(driver.nodes[make_peer(2)], KEY)
    newcomer = driver.add(4, make_contact(1))
    assert len(newcomer.store) == 0
    driver.tick(REPUBLISH_S)
    assert len(newcomer.store) == 1


def test_publishing_again_at_any_moment_ends_in_the_newest_record() -> None:
    driver = build(4)
    node, other = driver.nodes[make_peer(2)], driver.nodes[make_peer(4)]
    first = node.publish(KEY, driver.now)
    assert node.unpublish(KEY, driver.now) == []  # nobody keeps it yet
    assert node.publish(KEY, driver.now - 5.0) == []  # a clock set back, while the first lookup runs
    driver.done[node.peer_id].clear()
    driver.perform(node, first)
    assert driver.done[node.peer_id] == [PublishDone(key=KEY, stored=3, asked=3)]
    before = driver.lookup(other, KEY).records[0].seq
    assert before == int(driver.now * 1000) + 2
    driver.publish(node, KEY)
    assert driver.lookup(other, KEY).records[0].seq == before + 1


def test_replies_to_an_older_round_do_not_count() -> None:
    driver = build(3)
    node = driver.nodes[make_peer(2)]

    def publish_until_stored() -> list[SendRequest]:
        effects = node.publish(KEY, driver.now)
        while any(isinstance(e.message, FindNode) for e in effects):  # type: ignore[union-attr]
            replies = [ReplyReceived(rpc_id=e.rpc_id, message=Found()) for e in effects]  # type: ignore[union-attr]
            effects = [effect for reply in replies for effect in node.handle(reply, driver.now)]
        return effects  # type: ignore[return-value]

    old, new = publish_until_stored(), publish_until_stored()
    assert [len(old), len(new)] == [2, 2]
    stored = [node.handle(ReplyReceived(rpc_id=e.rpc_id, message=Stored()), driver.now) for e in (*old, new[0])]
    assert stored == [[], [], []]
    refused = ReplyReceived(rpc_id=new[1].rpc_id, message=Stored(refused={0: "full"}))
    assert node.handle(refused, driver.now) == [PublishDone(key=KEY, stored=1, asked=2, refused={"full": 1})]


def count_lookups(driver: Driver, node: Kademlia) -> int:
    """Requests of a republishing that look for places, the stores aside."""
    driver.now += REPUBLISH_S
    effects = node.tick(driver.now)
    sent = [e for e in effects if isinstance(e, SendRequest)]
    for effect in sent:
        if isinstance(effect.message, Store):
            node.handle(ReplyReceived(rpc_id=effect.rpc_id, message=Stored()), driver.now)
    return sum(isinstance(e.message, FindNode) and e.message.target in get_places(KEY) for e in sent)


def test_republishing_asks_who_is_near_every_sixth_time_only() -> None:
    driver = build(40)
    node = driver.nodes[make_peer(2)]
    assert driver.publish(node, KEY).stored >= 20
    for _ in range(KEPT_ROUNDS):
        seq = node.publisher.publications[KEY].seq
        assert count_lookups(driver, node) == 0
        assert node.publisher.publications[KEY].seq > seq
    assert count_lookups(driver, node) > 0


def test_keepers_that_are_gone_are_looked_for_at_once() -> None:
    driver = build(40)
    node = driver.nodes[make_peer(2)]
    driver.publish(node, KEY)
    publication = node.publisher.publications[KEY]
    publication.stored = publication.asked // 2
    assert count_lookups(driver, node) > 0


def test_a_node_whose_store_is_full_still_publishes() -> None:
    driver = build(3)
    node = driver.nodes[make_peer(2)]
    node.store = RecordStore(SWARM, records=1)
    node.store.put(make_pointer(9), NOW)
    assert driver.publish(node, KEY).stored == 2


def test_maintenance_leaves_room_for_lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = build(5)
    node = driver.nodes[make_peer(2)]
    for i in range(6):
        driver.publish(node, bytes([i]) * 32)
    monkeypatch.setattr("daaswarm.core.kademlia.LOOKUPS", 4)
    driver.now += REPUBLISH_S
    effects = node.tick(driver.now)
    node.validate()
    effects += node.start_lookup("mine", KEY, driver.now)
    while True:
        try:
            effects += node.start_lookup(f"more-{len(effects)}", KEY, driver.now)
        except LocalProtocolError as error:
            assert "4 lookups" in error.message
            break
    node.validate()
    driver.perform(node, effects)


def test_silent_contacts_are_probed_and_evicted() -> None:
    driver = build(3)
    node = driver.nodes[make_peer(2)]
    driver.dead.add(make_peer(3))
    assert make_peer(3) in node.table
    for _ in range(4):
        driver.tick(301)
        driver.tick(PROBE_FAILING_S)
    assert make_peer(3) not in node.table


def test_at_most_alpha_requests_are_out_at_once_on_each_path() -> None:
    driver = build(12)
    node = driver.nodes[make_peer(2)]
    effects = node.start_lookup("x", KEY, driver.now)
    assert len(effects) == PATHS * ALPHA and all(isinstance(e, SendRequest) for e in effects)
    assert len({e.contact.peer_id for e in effects if isinstance(e, SendRequest)}) == len(effects), "paths share none"
    assert all(e.deadline_s > 0 and e.message == FindNode(target=KEY) for e in effects if isinstance(e, SendRequest))
    with pytest.raises(LocalProtocolError):
        node.start_lookup("x", KEY, driver.now)


def test_late_and_unknown_replies_change_nothing() -> None:
    node = build(3).nodes[make_peer(2)]
    assert node.handle(ReplyReceived(rpc_id=10**9, message=Found()), NOW) == []


def test_a_busy_peer_stays_a_contact() -> None:
    driver = build(3)
    node = driver.nodes[make_peer(2)]
    driver.hostile[make_peer(3)] = lambda request: Failure(code="busy", message="full")
    assert [c.peer_id for c in driver.lookup(node, KEY).contacts] == [make_peer(1)]
    assert make_peer(3) in node.table and not driver.misbehaved(node)


def test_a_contact_of_somebody_else_is_refused() -> None:
    driver = build(2)
    node = driver.nodes[make_peer(1)]
    event = RequestReceived(request_id=1, peer=make_peer(8), contact=make_contact(9), message=FindNode(target=KEY))
    (effect,) = node.handle(event, NOW)
    assert isinstance(effect, Misbehaved) and effect.peer == make_peer(8)
    assert make_peer(9) not in node.table and make_peer(8) not in node.table


def test_store_says_what_it_refused() -> None:
    driver = build(2)
    node = driver.nodes[make_peer(1)]
    records = [make_pointer(5), make_pointer(6, signer=7), make_pointer(8, ttl_s=-1)]
    event = RequestReceived(request_id=1, peer=make_peer(9), contact=None, message=Store(records=records))
    (reply,) = node.handle(event, NOW)
    assert list(reply.message.refused) == [1, 2]  # type: ignore[union-attr]
    assert "another key" in reply.message.refused[1] and "expired" in reply.message.refused[2]  # type: ignore[union-attr]
    (reply,) = node.handle(
        RequestReceived(request_id=2, peer=make_peer(9), contact=None, message=FindValue(key=KEY)), NOW
    )
    assert reply.message.records == [records[0]]  # type: ignore[union-attr]


LIARS = {
    "another peer's key": lambda r: Found(records=[make_pointer(30, signer=31)]),
    "a bad signature": lambda r: Found(
        records=[Signed(public_key=make_pointer(30).public_key, signature=bytes(64), payload=make_pointer(30).payload)]
    ),
    "garbage": lambda r: Found(records=[Signed(public_key=bytes(32), signature=bytes(64), payload=b"\xff")]),
    "another DHT key": lambda r: Found(records=[make_pointer(30, key=bytes(32))]),
    "too large": lambda r: Found(records=[Signed(public_key=bytes(32), signature=bytes(64), payload=bytes(5000))]),
    "too many records": lambda r: Found(records=[make_pointer(30)] * 65),
    "too many contacts": lambda r: Found(contacts=[make_contact(i) for i in range(100, 121)]),
    "no PeerId": lambda r: Found(contacts=[Contact(peer_id="1" * 52, addrs=["/ip4/1.1.1.1/tcp/1"])]),
    "Stored": lambda r: Stored(),
}


@pytest.mark.parametrize("lie", LIARS)
def test_a_lying_answer_is_named_and_not_believed(lie: str) -> None:
    driver = build(6)
    publisher = driver.nodes[make_peer(2)]
    driver.publish(publisher, KEY)
    asker = driver.nodes[make_peer(5)]
    driver.hostile[make_peer(3)] = LIARS[lie]
    found = driver.lookup(asker, KEY)
    assert [r.peer_id for r in found.records] == [publisher.peer_id]
    assert [m.peer for m in driver.misbehaved(asker)] == [make_peer(3)]
    assert make_peer(3) not in {c.peer_id for c in found.contacts}


def test_expired_and_immortal_records_are_dropped_without_blame() -> None:
    driver = build(4)
    asker = driver.nodes[make_peer(4)]
    lies = [make_pointer(30, ttl_s=-1), make_pointer(31, ttl_s=MAX_TTL_S + 120), make_pointer(32, ttl_s=float("nan"))]

    def lie(request: SendRequest) -> Found | Stored:
        return Stored() if isinstance(request.message, Store) else Found(records=[*lies, make_pointer(33)])

    driver.hostile[make_peer(3)] = lie
    assert [r.peer_id for r in driver.lookup(asker, KEY).records] == [make_peer(33)]
    assert not driver.misbehaved(asker)


def test_the_highest_sequence_number_wins_across_answers() -> None:
    driver = build(4)
    asker = driver.nodes[make_peer(4)]
    driver.hostile[make_peer(3)] = lambda request: Found(records=[make_pointer(33, seq=9)])
    driver.hostile[make_peer(2)] = lambda request: Found(records=[make_pointer(33, seq=4)])
    driver.hostile[make_peer(1)] = lambda request: Found(records=[make_pointer(33, seq=2)])
    assert [r.seq for r in driver.lookup(asker, KEY).records] == [9]


def test_contacts_that_point_at_the_asker_or_nowhere_are_not_called() -> None:
    driver = build(4)
    asker = driver.nodes[make_peer(4)]
    nowhere = Contact(peer_id=make_peer(60), addrs=[])
    driver.hostile[make_peer(3)] = lambda request: Found(contacts=[make_contact(4), nowhere, make_contact(3)])
    before = driver.sent
    found = driver.lookup(asker, KEY)  # the driver asserts that nobody calls itself
    assert {c.peer_id for c in found.contacts} == {make_peer(i) for i in (1, 2, 3)}
    assert driver.sent - before == 3


def test_made_up_contacts_cannot_keep_a_lookup_alive_for_ever() -> None:
    driver = build(4)
    asker = driver.nodes[make_peer(4)]
    made_up = iter(range(1000, 10**9))

    def lie(request: SendRequest) -> Found:
        fresh = [make_contact(next(made_up)) for _ in range(20)]
        for contact in fresh:
            driver.hostile[contact.peer_id] = lie  # type: ignore[index]
        return Found(contacts=fresh)

    driver.hostile[make_peer(3)] = lie
    before = driver.sent
    assert isinstance(driver.lookup(asker, KEY), LookupDone)
    assert driver.sent - before <= REQUESTS


def test_ever_nearer_contacts_run_into_the_limit_of_requests() -> None:
    driver = build(4)
    asker = driver.nodes[make_peer(4)]
    contacts = [make_contact(n) for n in range(1000, 1400)]
    contacts.sort(key=lambda c: compute_distance(get_node_id(c.peer_id), KEY), reverse=True)
    trail = iter(contacts)

    def lead_on(request: SendRequest) -> Found:
        return Found(contacts=[c for c in (next(trail, None), next(trail, None)) if c])

    for contact in [make_contact(3), *contacts]:
        driver.hostile[contact.peer_id] = lead_on  # type: ignore[index]
    before = driver.sent
    driver.lookup(asker, KEY)
    assert driver.sent - before == REQUESTS


@pytest.mark.parametrize("seed", range(3))
def test_lookups_survive_a_network_that_loses_every_fifth_request(seed: int) -> None:
    driver = build(25, seed)
    driver.publish(driver.nodes[make_peer(7)], KEY)
    driver.loss = 0.2
    for _ in range(5):
        driver.tick(PROBE_FAILING_S)
        for node in driver.nodes.values():
            assert [r.peer_id for r in driver.lookup(node, KEY).records] == [make_peer(7)]


def test_records_nobody_asks_for_are_dropped_when_they_expire() -> None:
    driver = build(2)
    node = driver.nodes[make_peer(1)]
    node.store.put(make_pointer(9, ttl_s=100), NOW)
    driver.tick(59)
    assert len(node.store) == 1
    driver.tick(60)
    assert len(node.store) == 0


def test_a_failed_peer_is_not_called_again_on_others_word() -> None:
    driver = build(6)
    asker = driver.nodes[make_peer(5)]
    driver.dead.add(make_peer(3))
    driver.lookup(asker, KEY)
    before = driver.sent
    found = driver.lookup(asker, KEY)
    assert driver.sent - before == len(found.contacts) == 4


def test_a_key_published_by_many_is_returned_whole() -> None:
    driver = build(25)
    for i in range(1, 26):
        driver.publish(driver.nodes[make_peer(i)], KEY)
    found = driver.lookup(driver.nodes[make_peer(9)], KEY)
    assert len(found.records) == 25
