"""Queries from neighbour to neighbour: who is asked, what comes back and which way, what it may cost."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from membership_driver import OTHER, ROOT, PlainNotary, make_advert
from swarm_driver import NOW, SWARM, make_contact, make_key, make_peer

from daaswarm import messages
from daaswarm.core.adverts import AdvertBook
from daaswarm.core.gossip import FANOUT, HOPS, OFFER_BYTES, WAIT_S, Gossip, matches
from daaswarm.core.membership import Membership
from daaswarm.core.membership_events import (
    Misbehaved,
    QueryDone,
    Reply,
    ReplyReceived,
    RequestFailed,
    RequestReceived,
    SendRequest,
)
from daaswarm.messages import AskSwarm, Failure, Offers, Query
from daaswarm.types import PeerId


class Net:
    """Nodes by number, who know the neighbours given; a dead one fails each request."""

    def __init__(self, links: dict[int, list[int]], seed: int = 1) -> None:
        self.nodes: dict[int, Gossip] = {}
        self.members: dict[int, Membership] = {}
        self.dead: set[int] = set()
        self.asked: list[tuple[int, int]] = []
        self.bytes: dict[tuple[int, int], int] = {}
        self.done: list[QueryDone] = []
        self.misbehaved: list[Misbehaved] = []
        self.forge: Callable[[int, AskSwarm], Any] = lambda number, message: None
        self.loads: dict[int, float] = {}
        self._numbers: dict[str, int] = {}
        self._queue: deque[tuple[int, SendRequest]] = deque()
        self._waiting: dict[int, tuple[int, int]] = {}  # request id -> (asker, its rpc)
        self._requests = 0
        self.rng = random.Random(seed)
        for number, others in links.items():
            notary = PlainNotary(make_key(number), SWARM)
            self.members[number] = Membership(notary, AdvertBook(SWARM), random.Random(number))
            self.nodes[number] = Gossip(
                notary,
                self.members[number],
                random.Random(number),
                lambda others=tuple(others): [make_contact(n) for n in others],
                lambda number=number: self.loads.get(number, 0.0),
            )
            self._numbers[make_peer(number)] = number

    def serve(self, number: int, **changes: Any) -> None:
        advert = msgspec.structs.replace(make_advert(number, {0: [number]}), **changes)
        self.members[number].advertise(advert, NOW)

    def ask(self, number: int, **what: Any) -> tuple[list[int], QueryDone]:
        self.done.clear()
        self._take(number, self.nodes[number].ask("q", NOW, **what))
        while self._queue:
            self._queue.rotate(self.rng.randrange(len(self._queue)))
            asker, request = self._queue.popleft()
            self._deliver(asker, request)
            for node in self.nodes.values():
                node.validate()
        (done,) = self.done
        notary = PlainNotary(make_key(1), SWARM)
        return sorted(self._numbers.get(notary.peek_advert(s).peer_id, 0) for s in done.found), done

    def _deliver(self, asker: int, request: SendRequest) -> None:
        number = self._numbers[request.contact.peer_id]
        self.asked.append((asker, number))
        message = msgspec.msgpack.decode(messages.encode(request.message), type=messages.Request)
        forged = self.forge(number, message)  # type: ignore[arg-type]
        if forged is not None:
            self._answer(asker, request.rpc_id, number, forged)
        elif number in self.dead:
            self._take(asker, self.nodes[asker].handle(RequestFailed(rpc_id=request.rpc_id), NOW))
        else:
            self._requests += 1
            self._waiting[self._requests] = asker, request.rpc_id
            event = RequestReceived(
                request_id=self._requests,
                peer=make_peer(asker),
                contact=None,
                message=message,  # type: ignore[arg-type]
            )
            self._take(number, self.nodes[number].handle(event, NOW))

    def _answer(self, asker: int, rpc_id: int, number: int, reply: Any) -> None:
        data = messages.encode(reply)
        self.bytes[number, asker] = self.bytes.get((number, asker), 0) + len(data)
        back = msgspec.msgpack.decode(data, type=messages.Reply)
        self._take(asker, self.nodes[asker].handle(ReplyReceived(rpc_id=rpc_id, message=back), NOW))  # type: ignore[arg-type]

    def _take(self, number: int, effects: list[Any]) -> None:
        for effect in effects:
            if isinstance(effect, SendRequest):
                self._queue.append((number, effect))
            elif isinstance(effect, Reply):
                asker, rpc_id = self._waiting.pop(effect.request_id)
                self._answer(asker, rpc_id, number, effect.message)
            elif isinstance(effect, QueryDone):
                self.done.append(effect)
            else:
                self.misbehaved.append(effect)


def make_random(count: int, degree: int = 6) -> Net:
    rng = random.Random(3)
    return Net({n: rng.sample([m for m in range(1, count + 1) if m != n], degree) for n in range(1, count + 1)})


def test_a_query_finds_who_serves_within_its_hops_and_each_is_asked_once() -> None:
    net = Net({1: [2, 3], 2: [1, 3, 4], 3: [2, 4], 4: [5, 2], 5: [6], 6: []})
    for number in (2, 4, 5, 6):
        net.serve(number)
    found, done = net.ask(1, name="tiny")
    assert found == [2, 4, 5]  # 6 is one hop too far
    assert done.asked == 5
    assert net.ask(1, name="tiny")[0] == [2, 4, 5]  # a second one isn't taken for the first


def test_what_is_known_of_others_is_told_too_but_not_of_the_dead() -> None:
    net = Net({1: [2], 2: [], 3: [], 4: []})
    for number in (3, 4):
        net.serve(number)
        known = net.members[number].book.get(make_peer(number), ROOT)
        assert known is not None
        net.members[2].follow(ROOT, NOW)
        net.members[2].book.keep(known)
        net.members[2].topics.note_advert(known)
    assert net.ask(1, model_root=ROOT)[0] == [3, 4]
    detector = net.members[2].detector
    detector.missed(PeerId(make_peer(3)), NOW, is_check=True)
    assert net.ask(1, model_root=ROOT)[0] == [4]


def test_answers_go_back_the_way_the_query_came() -> None:
    net = make_random(60)
    for number in range(1, 61):
        net.serve(number)
    net.ask(1, name="tiny")
    asks = set(net.asked)
    assert all((asker, number) in asks for number, asker in net.bytes)  # to nobody who didn't ask over that connection
    assert len(net.asked) <= FANOUT + FANOUT**2 + FANOUT**3


def test_enough_is_enough() -> None:
    net = make_random(60)
    for number in range(1, 61):
        net.serve(number)
    found, _ = net.ask(1, name="tiny", wanted=3)
    assert len(found) == 3 and len(net.asked) <= FANOUT + FANOUT**2  # none of them asked further
    net.asked.clear()
    assert net.ask(1, name="tiny", wanted=1)[0] == [1] and not net.asked  # it serves it itself


def test_load_and_price_come_with_it() -> None:
    net = Net({1: [2], 2: []})
    net.serve(2, price=0.5, tags=["code"])
    net.loads[2] = 7.0
    _, done = net.ask(1, tag="Code")
    advert = PlainNotary(make_key(1), SWARM).peek_advert(done.found[0])
    assert (advert.load, advert.price) == (7.0, 0.5)
    assert net.ask(1, tag="poetry")[0] == []


def test_the_dead_and_the_silent_cost_their_part_of_the_answer() -> None:
    net = Net({1: [2, 3, 4], 2: [5], 3: [], 4: [], 5: []})
    for number in (2, 3, 5):
        net.serve(number)
    net.dead = {4, 5}
    assert net.ask(1, name="tiny")[0] == [2, 3]
    node = net.nodes[1]
    effects = node.ask("silent", NOW, name="tiny")
    assert not any(isinstance(e, QueryDone) for e in effects) and node.tick(NOW + WAIT_S - 1) == []
    (done,) = node.tick(NOW + WAIT_S)
    assert isinstance(done, QueryDone) and done.query_id == "silent"
    for effect in effects:
        assert isinstance(effect, SendRequest) and effect.deadline_s <= WAIT_S
        assert node.handle(RequestFailed(rpc_id=effect.rpc_id), NOW) == []  # too late
    node.validate()


def test_lies_on_the_way_back() -> None:
    net = Net({1: [2, 3], 2: [], 3: []})
    net.serve(3)
    notary = PlainNotary(make_key(9), SWARM)
    fresh = {"seq": 5, "expires_at": NOW + 600}
    good = notary.seal_advert(msgspec.structs.replace(make_advert(9, {0: [1]}), **fresh))
    other = notary.seal_advert(msgspec.structs.replace(make_advert(9, {0: [1]}, OTHER), **fresh))
    gone = notary.seal_advert(msgspec.structs.replace(make_advert(9, {}), withdrawn=True, **fresh))
    forged = msgspec.structs.replace(good, signature=b"\1" * 64)
    for lie, blamed in ((forged, 1), (other, 0), (gone, 0)):
        net.misbehaved.clear()
        net.forge = lambda number, message, lie=lie: Offers(adverts=[lie]) if number == 2 else None
        assert net.ask(1, model_root=ROOT)[0] == [3]
        assert len(net.misbehaved) == blamed
    net.forge = lambda number, message: Failure(code="busy", message="") if number == 2 else None
    assert net.ask(1, model_root=ROOT)[0] == [3]


def test_an_answer_has_a_bound_in_bytes() -> None:
    net = Net({1: [2], 2: []})
    net.members[2].follow(ROOT, NOW)
    notary = PlainNotary(make_key(1), SWARM)
    for i in range(40):
        held = {layer: [0, 12_000] for layer in range(8)}
        advert = msgspec.structs.replace(make_advert(1, held), peer_id=f"12D3KooW{i:044d}", seq=1, expires_at=NOW + 60)
        net.members[2].put(notary.seal_advert(advert), NOW)
    _, done = net.ask(1, model_root=ROOT)
    assert 0 < sum(len(s.payload) for s in done.found) <= OFFER_BYTES and len(done.found) < 40


def test_who_asks_too_much_is_told_so_by_neighbour_and_by_asker() -> None:
    net = Net({1: [], 2: []})
    notaries = {n: PlainNotary(make_key(n), SWARM) for n in range(1, 100)}

    def ask(neighbour: int, asker: int, nonce: int, **changes: Any) -> Any:
        query = Query(peer_id=make_peer(asker), nonce=nonce.to_bytes(16, "big"), expires_at=NOW + 30)
        signed = msgspec.structs.replace(notaries[asker].seal_query(query), **changes)
        event = RequestReceived(request_id=1, peer=make_peer(neighbour), contact=None, message=AskSwarm(query=signed))
        return net.nodes[1].handle(event, NOW)

    codes = [ask(50 + i, 7, i)[0].message for i in range(20)]  # one asker through many
    assert isinstance(codes[0], Offers) and isinstance(codes[-1], Failure) and codes[-1].retry_after_s > 0
    codes = [ask(8, 10 + i % 80, 100 + i)[0].message for i in range(60)]  # many through one
    assert isinstance(codes[0], Offers) and isinstance(codes[-1], Failure) and codes[-1].code == "busy"
    assert ask(9, 7, 0)[0].message == Offers(asked=0)  # seen before
    blamed = ask(9, 9, 500, signature=b"\1" * 64)
    assert isinstance(blamed[0], Misbehaved) and isinstance(blamed[1].message, Failure)


@pytest.mark.parametrize(
    ("what", "is_match"),
    [
        ({}, True),
        ({"model_root": ROOT}, True),
        ({"model_root": OTHER}, False),
        ({"name": "TINY"}, True),
        ({"name": "abab"}, False),
        ({"name": "ababab"}, True),
        ({"layer": 3}, True),
        ({"layer": 4}, False),
        ({"layer": 3, "expert": 9}, True),
        ({"layer": 3, "expert": 8}, False),
        ({"expert": 9}, True),
        ({"expert": 1}, False),
        ({"tag": "code"}, True),
        ({"tag": "cod"}, False),
    ],
)
def test_what_matches(what: dict[str, Any], is_match: bool) -> None:
    advert = msgspec.structs.replace(make_advert(1, {3: [0, 9]}), tags=["Code"])
    query = Query(peer_id=make_peer(1), nonce=bytes(16), expires_at=NOW, **what)
    assert matches(advert, query) is is_match


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 25), st.integers(0, 20))
def test_any_graph_ends_in_an_answer_within_the_hops(seed: int, count: int, dead: int) -> None:
    rng = random.Random(seed)
    numbers = range(1, count + 1)
    links = {n: [m for m in numbers if m != n and rng.random() < 0.2] for n in numbers}
    net = Net(links, seed)
    net.dead = {n for n in numbers if n > 1 and n <= dead}
    for number in numbers:
        net.serve(number)
    found, done = net.ask(1, name="tiny")
    reach, edge = {1}, {1}
    for _ in range(HOPS):
        edge = {m for n in edge for m in links[n] if m not in net.dead} - reach
        reach |= edge
    assert 1 in found and set(found) <= reach and len(found) == done.asked
    if all(len(others) <= FANOUT for others in links.values()):
        assert {m for m in links[1] if m not in net.dead} <= set(found)
