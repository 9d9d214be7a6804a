"""A quarter of all peers lie, with ids chosen to be near a key: lookups find what was published all the same."""

from __future__ import annotations

import hashlib
import random

import pytest
from swarm_driver import NOW, SWARM, Driver, Hostile, make_contact, make_key, make_peer

from daaswarm.core.kademlia_events import SendRequest
from daaswarm.core.places import get_places
from daaswarm.core.record_store import POINTER_KIND
from daaswarm.core.routing_table import get_node_number
from daaswarm.core.signing import seal
from daaswarm.messages import FindValue, Found, Pointer, Signed, Store, Stored

KEY = hashlib.sha256(b"a model").digest()
HONEST, LIARS = 64, 21  # more liars than peers that keep a record
PUBLISHERS = [3, 17, 42]
CHOICES = range(10_000, 12_000)  # keys that the liars made to choose from


def choose(places: list[bytes]) -> list[int]:
    """The liars: those of :data:`CHOICES` that are nearest to the places, as many near each."""
    chosen: list[int] = []
    for i, place in enumerate(places):
        goal = int.from_bytes(place, "big")
        nearest = sorted((n for n in CHOICES if n not in chosen), key=lambda n: get_node_number(make_peer(n)) ^ goal)
        chosen += nearest[: LIARS * (i + 1) // len(places) - len(chosen)]
    return chosen


def make_lie(kind: str, liars: list[int], rng: random.Random) -> Hostile:
    def forge(n: int) -> Signed:
        addrs = ["/ip4/10.9.9.9/tcp/1"]
        pointer = Pointer(key=KEY, peer_id=make_peer(n), addrs=addrs, seq=1, expires_at=NOW + 800)
        return seal(pointer, POINTER_KIND, make_key(n), SWARM)

    forged = [forge(n) for n in liars] if kind == "records of their own" else []

    def lie(request: SendRequest) -> object:
        if isinstance(request.message, Store):
            return Stored()
        if kind == "the dead":
            return Found(contacts=[make_contact(rng.randrange(20_000, 21_000)) for _ in range(20)])
        if kind == "nothing":
            return Found()
        if kind == "garbage":
            return Found(records=[Signed(public_key=bytes(32), signature=bytes(64), payload=rng.randbytes(50))])
        friends = [make_contact(n) for n in rng.sample(liars, min(20, len(liars)))]
        return Found(contacts=friends, records=forged if isinstance(request.message, FindValue) else [])

    return lie


@pytest.mark.parametrize(
    ("places", "kind"),
    [
        (1, "each other"),
        (1, "records of their own"),
        (1, "the dead"),
        (3, "each other"),
        (3, "records of their own"),
        (3, "garbage"),
    ],
)
def test_a_quarter_of_liars_near_a_key_do_not_hide_it(places: int, kind: str) -> None:
    """``places``: the liars sit at the key alone, or, knowing the other places, at each of them."""
    driver = Driver(places)
    driver.is_checking = False
    liars = choose(list(get_places(KEY)[:places]))
    for n in [*range(1, HONEST + 1), *liars]:
        driver.add(n, make_contact(1) if n > 1 else None)
    lie = make_lie(kind, liars, random.Random(1))
    driver.hostile.update({make_peer(n): lie for n in liars})  # until now they seemed honest
    driver.tick(2.0)
    for n in PUBLISHERS:
        driver.publish(driver.nodes[make_peer(n)], KEY)
    wanted = {make_peer(n) for n in PUBLISHERS}
    found = 0
    for n in range(1, HONEST + 1):
        done = driver.lookup(driver.nodes[make_peer(n)], KEY)
        found += wanted <= {pointer.peer_id for pointer in done.records}
    assert found >= 0.99 * HONEST
