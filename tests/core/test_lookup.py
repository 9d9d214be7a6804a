"""One lookup: whom it asks, when it is done, and what it refuses to remember."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarm_driver import make_contact, make_peer

from daaswarm.core.lookup import (
    AGREEING,
    ALPHA,
    CANDIDATES,
    FALSE_WORDS,
    HOLDERS,
    LOOKUP_RECORDS,
    PATHS,
    REQUESTS,
    Lookup,
    Want,
)
from daaswarm.core.places import get_places, get_replicas
from daaswarm.core.routing_table import compute_distance, get_node_id
from daaswarm.messages import Contact, FindNode, FindValue, Pointer, Signed
from daaswarm.types import PeerId

TARGET = bytes(32)
K = 4


def by_distance(numbers: range, target: bytes = TARGET) -> list[int]:
    return sorted(numbers, key=lambda n: compute_distance(get_node_id(make_peer(n)), target))


def make(want: Want = "nodes", k: int = K) -> Lookup:
    return Lookup(TARGET, want, make_peer(0), k, random.Random(0))


def peer_of(contact: Contact) -> PeerId:
    return PeerId(contact.peer_id)


@given(st.lists(st.sets(st.integers(1, 40)), min_size=1, max_size=8), st.sets(st.integers(1, 40)))
def test_the_nearest_that_answer_are_found(batches: list[set[int]], dead: set[int]) -> None:
    lookup = make()
    rest = [[make_contact(n) for n in sorted(batch)] for batch in batches]
    lookup.start(rest.pop(0))
    asked: set[str] = set()
    in_flight: list[tuple[int, Contact]] = []
    while not lookup.is_done():
        in_flight += lookup.take_next()
        assert 0 < len(in_flight) <= PATHS * ALPHA
        path, contact = in_flight.pop(0)
        assert contact.peer_id not in asked, "nobody is asked twice, by whichever path"
        asked.add(contact.peer_id)
        if contact.peer_id in {make_peer(n) for n in dead}:
            lookup.note_failed(path, peer_of(contact))
        else:
            if rest:
                lookup.add(path, peer_of(contact), rest.pop(0))
            lookup.note_answered(path, peer_of(contact))
    heard = {n for batch in batches[: len(batches) - len(rest)] for n in batch}
    answered = [n for n in by_distance(range(1, 41)) if make_peer(n) in asked and n not in dead]
    assert [c.peer_id for c in lookup.get_closest(K)] == [make_peer(n) for n in answered[:K]]
    assert set(answered) <= heard and (answered or not heard - dead or len(heard) > FALSE_WORDS)


def test_a_flood_of_contacts_is_forgotten_but_for_the_nearest() -> None:
    lookup = make()
    everyone = by_distance(range(1, 2 * CANDIDATES))
    last = make_contact(everyone[-1])
    lookup.start([last], 0)
    assert lookup.take_next() == [(0, last)]
    lookup.start([make_contact(n) for n in everyone], 0)
    assert len(lookup.paths[0].order) == len(lookup.paths[0].known) == CANDIDATES
    assert [c.peer_id for _, c in lookup.take_next()] == [make_peer(n) for n in everyone[: ALPHA - 1]]
    lookup.note_answered(0, peer_of(last))
    assert last not in lookup.get_closest(K)


def test_a_contact_that_failed_stays_out_even_after_a_flood() -> None:
    lookup = make()
    near, *others = [make_contact(n) for n in by_distance(range(1, 2 * CANDIDATES))]
    lookup.start([near], 0)
    lookup.take_next()
    lookup.note_failed(0, peer_of(near))
    lookup = make()
    lookup.start([near, others[-1]], 0)
    lookup.take_next()
    lookup.note_failed(0, peer_of(near))
    lookup.add(0, peer_of(others[-1]), [*others, near])
    lookup.note_answered(0, peer_of(others[-1]))
    while not lookup.is_done():
        for path, contact in lookup.take_next():
            lookup.note_answered(path, peer_of(contact))
    assert lookup.get_closest(K) == others[:K]


def test_a_late_request_makes_room_and_still_counts() -> None:
    contacts = [make_contact(n) for n in by_distance(range(1, 9))]
    lookup = make()
    lookup.start(contacts, 0)
    assert [c for _, c in lookup.take_next()] == contacts[:3]
    assert lookup.take_next() == []
    lookup.note_late(0, peer_of(contacts[1]))
    lookup.note_late(0, peer_of(contacts[1]))  # said twice, counted once
    assert [c for _, c in lookup.take_next()] == contacts[3:4]
    for contact in (contacts[0], contacts[2], contacts[3]):
        lookup.note_answered(0, peer_of(contact))
    assert [c for _, c in lookup.take_next()] == contacts[4:5]
    lookup.note_answered(0, peer_of(contacts[1]))
    assert lookup.is_done()  # the four nearest answered, one of them late; the one asked in its place isn't waited for
    assert lookup.get_closest(K) == contacts[:4]


def test_the_late_are_waited_for_while_they_are_as_many_as_those_who_answered() -> None:
    contacts = [make_contact(n) for n in range(1, 4)]
    lookup = make()
    lookup.start(contacts, 0)
    for path, contact in lookup.take_next():
        lookup.note_late(path, peer_of(contact))
    assert not lookup.is_done()
    lookup.note_answered(0, peer_of(contacts[0]))
    assert not lookup.is_done()
    lookup.note_answered(0, peer_of(contacts[2]))
    assert lookup.is_done()


def test_who_names_the_dead_is_not_believed_any_further() -> None:
    liar, *others = [make_contact(n) for n in reversed(by_distance(range(1, 30)))]
    lookup = make()
    lookup.start([liar, others[0]], 0)
    lookup.take_next()
    lookup.add(0, peer_of(liar), others[5:])
    lookup.note_answered(0, peer_of(liar))
    lookup.add(0, peer_of(others[0]), [others[5]])  # another peer says so too
    lookup.note_answered(0, peer_of(others[0]))
    for path, contact in lookup.take_next()[:FALSE_WORDS]:
        lookup.note_failed(path, peer_of(contact))
    assert lookup.take_next() == [(0, others[5])]
    lookup.note_answered(0, peer_of(others[5]))
    assert lookup.is_done() and lookup.get_requests() == 2 + FALSE_WORDS + 1


def test_a_path_that_is_flooded_leaves_the_others_their_requests() -> None:
    contacts = [make_contact(n) for n in by_distance(range(1, 500))]
    lookup = make()
    lookup.start(contacts[-1:], 0)
    lookup.start(contacts[-3:-1], 1)
    trail = iter(reversed(contacts[:-3]))
    by_path = {0: 0, 1: 0, 2: 0}
    while not lookup.is_done():
        for path, contact in lookup.take_next():
            by_path[path] += 1
            if path == 0:
                lookup.add(0, peer_of(contact), [next(trail)])
            lookup.note_answered(path, peer_of(contact))
    assert by_path == {0: REQUESTS, 1: 2, 2: 0}


def test_each_path_of_a_lookup_of_records_goes_to_a_place_of_its_own() -> None:
    lookup = make("records", k=20)
    places = get_places(TARGET)
    assert places[0] == TARGET and len(set(places)) == PATHS == len(lookup.paths)
    assert [path.k for path in lookup.paths] == [get_replicas(20, i) for i in range(PATHS)] == [20, 10, 10]
    messages = [FindValue(key=TARGET), *(FindValue(key=TARGET, place=place) for place in places[1:])]
    assert [path.message for path in lookup.paths] == messages
    assert make().paths[1].message == FindNode(target=TARGET)
    contacts = [make_contact(n) for n in range(1, 200)]
    for path in range(PATHS):
        lookup.start(contacts, path)
    taken = lookup.take_next()
    assert len({c.peer_id for _, c in taken}) == len(taken)
    for path, place in enumerate(places):
        nearest = [make_peer(n) for n in by_distance(range(1, 200), place)]
        asked = [c.peer_id for each, c in taken if each == path]
        assert len(asked) == min(AGREEING[path], ALPHA)
        assert asked[0] == nearest[0] and set(asked) <= set(nearest[: lookup.paths[path].k + PATHS])


@pytest.mark.parametrize("is_news", [False, True])
def test_a_path_ends_when_enough_of_the_nearest_gave_the_same(is_news: bool) -> None:
    lookup = make("records", k=20)
    contacts = [make_contact(n) for n in by_distance(range(1, 100))]
    lookup.start(contacts, 0)
    asked = 0
    while not lookup.is_done():
        for path, contact in lookup.take_next():
            asked += 1
            lookup.note_answered(path, peer_of(contact), gave=1, is_news=is_news or asked == 1)
    enough = lookup.paths[0].holders
    assert enough == 6
    assert asked == 20 if is_news else enough <= asked < enough + ALPHA


def answer_all(lookup: Lookup, gave: dict[str, int]) -> int:
    """Everybody answers; who isn't in ``gave`` gives one record, the first that answers a new one. Returns how many
    were asked."""
    asked = 0
    while not lookup.is_done():
        for path, contact in lookup.take_next():
            lookup.records.setdefault(make_peer(0), cast(Any, None))
            lookup.note_answered(path, peer_of(contact), gave=gave.get(contact.peer_id, 1), is_news=not asked)
            asked += 1
    return asked


def test_a_lookup_ends_when_holders_of_all_places_agree() -> None:
    lookup = make("records", k=20)
    for path in range(PATHS):
        lookup.start([make_contact(n) for n in range(1, 200)], path)
    assert answer_all(lookup, {}) == sum(AGREEING)


def test_one_who_gives_other_records_prolongs_it() -> None:
    lookup = make("records", k=20)
    for path in range(PATHS):
        lookup.start([make_contact(n) for n in range(1, 200)], path)
    nearest = make_peer(by_distance(range(1, 200))[0])
    assert answer_all(lookup, {nearest: 2}) >= sum(path.holders for path in lookup.paths)


def test_records_from_far_away_do_not_end_a_path() -> None:
    lookup = make("records", k=20)
    contacts = [make_contact(n) for n in by_distance(range(1, 100))]
    lookup.start(contacts[-HOLDERS - 2 :], 0)
    far = lookup.take_next()
    for path, contact in far:
        lookup.add(path, peer_of(contact), contacts[:20])
        lookup.note_answered(path, peer_of(contact), gave=1)
    assert not lookup.is_done()


def test_whoever_should_have_had_the_records_is_named() -> None:
    lookup = make("records")
    contacts = [make_contact(n) for n in by_distance(range(1, 4))]
    lookup.start(contacts, 0)
    for path, contact in lookup.take_next():
        lookup.note_answered(path, peer_of(contact), gave=0 if contact == contacts[1] else 2)
    assert lookup.get_lacking(2) == [contacts[1]]
    assert lookup.get_lacking(3) == [contacts[0]]


def test_records_are_bounded_and_the_newest_of_each_publisher() -> None:
    lookup = make("records")
    signed = Signed(public_key=bytes(32), signature=bytes(64), payload=b"")
    for seq in (1, 3, 2):
        for n in range(LOOKUP_RECORDS + 5):
            pointer = Pointer(key=TARGET, peer_id=make_peer(n), addrs=[], seq=seq, expires_at=1.0)
            assert lookup.add_record(pointer, signed) == (seq != 2 and n < LOOKUP_RECORDS)
    assert len(lookup.records) == LOOKUP_RECORDS
    assert {pointer.seq for pointer, _ in lookup.records.values()} == {3}
