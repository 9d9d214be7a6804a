"""One lookup: whom it asks, when it is done, and what it refuses to remember."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from swarm_driver import make_contact, make_peer

from daaswarm.core.lookup import ALPHA, CANDIDATES, LOOKUP_RECORDS, Lookup
from daaswarm.core.routing_table import compute_distance, get_node_id
from daaswarm.messages import Pointer, Signed
from daaswarm.types import PeerId

TARGET = bytes(32)
K = 4


def by_distance(numbers: range) -> list[int]:
    return sorted(numbers, key=lambda n: compute_distance(get_node_id(make_peer(n)), TARGET))


def make(k: int = K) -> Lookup:
    return Lookup(TARGET, "nodes", make_peer(0), k)


@given(st.lists(st.sets(st.integers(1, 40)), min_size=1, max_size=8), st.sets(st.integers(1, 40)))
def test_the_nearest_that_answer_are_found(batches: list[set[int]], dead: set[int]) -> None:
    lookup = make()
    rest = [[make_contact(n) for n in sorted(batch)] for batch in batches]
    lookup.add(rest.pop(0))
    asked: set[str] = set()
    while not lookup.is_done():
        taken = lookup.take_next()
        assert 0 < len(taken) <= ALPHA
        for contact in taken:
            assert contact.peer_id not in asked, "nobody is asked twice"
            asked.add(contact.peer_id)
            if contact.peer_id in {make_peer(n) for n in dead}:
                lookup.note_failed(PeerId(contact.peer_id))
            else:
                if rest:
                    lookup.add(rest.pop(0))
                lookup.note_answered(PeerId(contact.peer_id))
    heard = {n for batch in batches[: len(batches) - len(rest)] for n in batch}
    nearest = [n for n in by_distance(range(1, 41)) if n in heard - dead][:K]
    assert [c.peer_id for c in lookup.get_closest()] == [make_peer(n) for n in nearest]


def test_a_flood_of_contacts_is_forgotten_but_for_the_nearest() -> None:
    lookup = make()
    everyone = by_distance(range(1, 2 * CANDIDATES))
    last = make_contact(everyone[-1])
    lookup.add([last])
    assert lookup.take_next() == [last]
    lookup.add([make_contact(n) for n in everyone])
    assert len(lookup._heap.heap) == CANDIDATES and len(lookup._contacts) == CANDIDATES + 1
    assert [c.peer_id for c in lookup.take_next()] == [make_peer(n) for n in everyone[: ALPHA - 1]]
    lookup.note_answered(PeerId(last.peer_id))
    assert last not in lookup.get_closest()


def test_a_contact_that_failed_stays_out_even_after_a_flood() -> None:
    lookup = make()
    near, *others = [make_contact(n) for n in by_distance(range(1, 2 * CANDIDATES))]
    lookup.add([near])
    lookup.take_next()
    lookup.note_failed(PeerId(near.peer_id))
    lookup.add(others)
    lookup.add([near])
    while not lookup.is_done():
        for contact in lookup.take_next():
            lookup.note_answered(PeerId(contact.peer_id))
    assert lookup.get_closest() == others[:K]


def test_records_are_bounded_and_the_newest_of_each_publisher() -> None:
    lookup = make()
    signed = Signed(public_key=bytes(32), signature=bytes(64), payload=b"")
    for seq in (1, 3, 2):
        for n in range(LOOKUP_RECORDS + 5):
            lookup.add_record(Pointer(key=TARGET, peer_id=make_peer(n), addrs=[], seq=seq, expires_at=1.0), signed)
    assert len(lookup.records) == LOOKUP_RECORDS
    assert {pointer.seq for pointer, _ in lookup.records.values()} == {3}
