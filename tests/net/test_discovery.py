"""Finding hosts and being found, over the in-memory network with the real Kademlia core."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio
from net_helpers import SWARM, get_identity

from daaswarm.core.adverts import ADVERT_KIND
from daaswarm.core.kademlia_events import LookupDone
from daaswarm.core.signing import MAX_TTL_S, seal
from daaswarm.errors import Unreachable
from daaswarm.messages import Advert, Adverts, Contact, Found, GetAdverts, Pointer, Pong, Signed, Spreading
from daaswarm.net import discovery as discovery_module
from daaswarm.net import finding
from daaswarm.net.discovery import Discovery
from daaswarm.net.memory import MemoryHub
from daaswarm.net.pool import ConnectionPool
from daaswarm.types import ModelRoot

ROOT, OTHER = ModelRoot("ab" * 32), ModelRoot("cd" * 32)
HELD = {0: [0, 1], 2: [5]}


class Node:
    """A network and the discovery on it; ``lies`` replaces its answers to GetAdverts."""

    def __init__(self) -> None:
        self.pool: ConnectionPool
        self.discovery: Discovery
        self.lies: Any = None

    async def handle(self, peer: Any, contact: Any, message: Any, body: Any, deadline_s: float) -> Any:
        if self.lies is not None and isinstance(message, GetAdverts):
            return self.lies, ()
        if isinstance(message, Spreading):
            return await self.discovery.spreader.answer(peer, contact, message), ()
        return self.discovery.answer(peer, contact, message), ()

    @property
    def peer_id(self) -> str:
        return self.pool.peer_id

    async def find(self, root: ModelRoot = ROOT) -> dict[str, dict[int, list[int]]]:
        return {known.advert.peer_id: known.experts for known in await self.discovery.find_adverts(root)}


@asynccontextmanager
async def open_nodes(count: int) -> AsyncIterator[tuple[MemoryHub, list[Node]]]:
    """Nodes that all joined through the first."""
    hub = MemoryHub()
    async with AsyncExitStack() as stack:
        nodes = [Node() for _ in range(count)]
        for number, node in enumerate(nodes, start=1):
            identity = get_identity(number)
            node.pool = await stack.enter_async_context(hub.open_node(identity, handler=node.handle))
            node.discovery = Discovery(node.pool, identity.key, SWARM, random.Random(number))
        nursery = await stack.enter_async_context(trio.open_nursery())
        for node in nodes:
            await nursery.start(node.discovery.run)
            if node is not nodes[0]:
                assert nodes[0].pool.contact is not None
                await node.pool.connect(nodes[0].pool.contact)
                node.discovery.join([nodes[0].pool.contact])
        await settle()
        yield hub, nodes
        nursery.cancel_scope.cancel()


async def settle() -> None:
    """Until nobody has anything to say any more."""
    await trio.testing.wait_all_tasks_blocked(0.01)


def make_advert(number: int, **changes: Any) -> Signed:
    """An advert signed by the node with that number, whatever it says."""
    identity = get_identity(number)
    fields: dict[str, Any] = {
        "peer_id": identity.peer_id,
        "model_root": ROOT,
        "model_name": "m",
        "kind": "moe",
        "held": {0: b"\x03"},
        "dtype": "f32",
        "device": "cpu",
        "addrs": [],
        "seq": 1,
        "expires_at": time.time() + 60,
    }
    return seal(Advert(**{**fields, **changes}), ADVERT_KIND, identity.key, SWARM)


def point_to(node: Node) -> None:
    """The DHT says that a node serves the model; what that node says is its own affair."""
    discovery = node.discovery
    discovery._apply(discovery.kademlia.publish(bytes.fromhex(ROOT), time.time()))


async def test_what_is_published_is_found() -> None:
    async with open_nodes(4) as (_, nodes):
        nodes[1].discovery.advertise(ROOT, "m", "moe", HELD, "f32")
        nodes[2].discovery.advertise(ROOT, "m", "moe", {1: [3]}, "bf16")
        await settle()
        for asker in (nodes[0], nodes[3]):
            assert await asker.find() == {nodes[1].peer_id: HELD, nodes[2].peer_id: {1: [3]}}
            assert await asker.find(OTHER) == {}
        assert await nodes[1].find() == {nodes[1].peer_id: HELD, nodes[2].peer_id: {1: [3]}}  # itself included
        known = await nodes[3].discovery.find_adverts(ROOT)
        assert {k.advert.dtype for k in known} == {"f32", "bf16"} and all(k.advert.addrs for k in known)
        assert len(nodes[3].discovery.get_known()) >= 1


async def test_a_changed_and_a_withdrawn_advert() -> None:
    async with open_nodes(3) as (_, nodes):
        host, asker = nodes[1], nodes[2]
        host.discovery.advertise(ROOT, "m", "moe", HELD, "f32")
        await settle()
        assert await asker.find() == {host.peer_id: HELD}
        await trio.sleep(0.002)  # the sequence number counts milliseconds
        host.discovery.advertise(ROOT, "m", "moe", {7: [1]}, "f32")
        assert await asker.find() == {host.peer_id: {7: [1]}}
        host.discovery.withdraw(ROOT)
        assert await asker.find() == {}
        assert await host.find() == {}
        await trio.sleep(0.002)
        host.discovery.advertise(ROOT, "m", "moe", HELD, "f32")
        await settle()
        assert await asker.find() == {host.peer_id: HELD}


async def test_a_dead_host_is_left_out_and_comes_back() -> None:
    async with open_nodes(4) as (hub, nodes):
        for host in nodes[1:3]:
            host.discovery.advertise(ROOT, "m", "moe", HELD, "f32")
        await settle()
        asker = nodes[3]
        assert len(await asker.find()) == 2
        hub.kill(nodes[1].pool.peer_id)
        assert await asker.find() == {nodes[2].peer_id: HELD}
        hub.revive(nodes[1].pool.peer_id)
        assert len(await asker.find()) == 2


async def test_a_silent_host_costs_one_deadline(autojump_clock: Any) -> None:
    async with open_nodes(3) as (hub, nodes):
        for host in nodes[:2]:
            host.discovery.advertise(ROOT, "m", "moe", HELD, "f32")
        await settle()
        asker = nodes[2]
        assert len(await asker.find()) == 2
        hub.partition([nodes[1].pool.peer_id], [asker.pool.peer_id])
        with trio.fail_after(15):  # the lookup waits for it once, and asking for its adverts once
            assert await asker.find() == {nodes[0].peer_id: HELD}
        hub.heal()


async def test_when_enough_have_answered_the_others_are_not_waited_for_much_longer(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    async with open_nodes(3) as (_, nodes):
        for host in nodes[:2]:
            host.discovery.advertise(ROOT, "m", "moe", HELD, "f32")
        await settle()
        asker, real, after_s = nodes[2], nodes[2].pool.call, {nodes[0].peer_id: 0.1, nodes[1].peer_id: 60.0}

        async def call(contact: Contact, *args: Any, **options: Any) -> Any:
            if isinstance(args[0], GetAdverts):
                await trio.sleep(after_s[contact.peer_id])
            return await real(contact, *args, **options)

        async def find(wanted: int) -> tuple[set[str], float]:
            begin = trio.current_time()
            found = await asker.discovery.find_adverts(ROOT, lambda known: len(known) >= wanted)
            return {known.advert.peer_id for known in found}, trio.current_time() - begin

        monkeypatch.setattr(finding, "ADVERT_S", 30.0)
        monkeypatch.setattr(asker.pool, "call", call)
        assert await find(1) == ({nodes[0].peer_id}, pytest.approx(0.1 + finding.REST_S, abs=0.01))
        assert (await find(2))[1] == pytest.approx(finding.ASKING_S, abs=0.01)  # never enough: all are waited for
        after_s[nodes[1].peer_id] = 0.3
        assert await find(1) == ({node.peer_id for node in nodes[:2]}, pytest.approx(0.3, abs=0.01))


async def test_hosts_are_asked_while_the_lookup_goes_on(monkeypatch: pytest.MonkeyPatch, autojump_clock: Any) -> None:
    async with open_nodes(3) as (_, nodes):
        host, asker = nodes[1:]
        host.discovery.advertise(ROOT, "m", "moe", HELD, "f32")
        await settle()
        real = asker.discovery.lookup
        looked_up: list[LookupDone] = []

        async def look_up(key: bytes, want: Any, on_records: Any) -> LookupDone:
            looked_up.append(await real(key, want, on_records))
            await trio.sleep(10)
            return looked_up[0]

        monkeypatch.setattr(asker.discovery.finder, "_look_up", look_up)
        begin = trio.current_time()
        found = await asker.discovery.find_adverts(ROOT, bool)
        assert [known.advert.peer_id for known in found] == [host.peer_id]
        assert trio.current_time() - begin == pytest.approx(finding.REST_S, abs=0.1)
        assert [pointer.peer_id for pointer in looked_up[0].records] == [host.peer_id]


async def test_a_host_that_moved_is_asked_at_its_new_address_too(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    async with open_nodes(3) as (_, nodes):
        host, asker = nodes[1:]
        host.discovery.advertise(ROOT, "m", "moe", HELD, "f32")
        await settle()
        assert await asker.find() == {host.peer_id: HELD}  # and remembered with its address
        real, tried = asker.pool.call, list[list[str]]()

        async def call(contact: Contact, *args: Any, **options: Any) -> Any:
            if isinstance(args[0], GetAdverts):
                tried.append(contact.addrs)
                await trio.sleep(1)
                if "/memory/new" not in contact.addrs:
                    raise Unreachable("nobody there")
            return await real(contact, *args, **options)

        async def look_up(key: bytes, want: Any, on_records: Any) -> LookupDone:
            await trio.sleep(0.5)
            pointer = Pointer(key=key, peer_id=host.peer_id, addrs=["/memory/new"], seq=9, expires_at=1e12)
            on_records([pointer])
            return LookupDone(lookup_id="", contacts=[], records=[pointer])

        monkeypatch.setattr(asker.pool, "call", call)
        monkeypatch.setattr(asker.discovery.finder, "_look_up", look_up)
        assert await asker.find() == {host.peer_id: HELD}
        assert [addrs[0] for addrs in tried] == [f"/memory/{host.peer_id}", "/memory/new"]
        assert asker.discovery.finder.get_unanswered(ROOT) == []


async def test_a_node_alone() -> None:
    async with open_nodes(1) as (_, nodes):
        assert await nodes[0].find() == {}
        nodes[0].discovery.advertise(ROOT, "m", "moe", HELD, "f32")
        assert await nodes[0].find() == {nodes[0].peer_id: HELD}
        nodes[0].discovery.withdraw(OTHER)  # was never served


async def test_hostile_adverts_are_ignored() -> None:
    async with open_nodes(4) as (_, nodes):
        liar, honest, asker = nodes[1:]
        point_to(liar)
        honest.discovery.advertise(ROOT, "m", "moe", HELD, "f32")
        await settle()
        own = make_advert(2)
        hostile: list[Any] = [
            Adverts(adverts=[]),
            Adverts(adverts=[make_advert(2, peer_id=honest.peer_id)]),  # in another's name
            Adverts(adverts=[make_advert(2, expires_at=0.0)]),
            Adverts(adverts=[make_advert(2, expires_at=1e12)]),
            Adverts(adverts=[make_advert(2, expires_at=float("nan"))]),
            Adverts(adverts=[make_advert(2, held={0: b"\0"})]),
            Adverts(adverts=[make_advert(2, price=-1.0)]),
            Adverts(adverts=[Signed(public_key=own.public_key, signature=bytes(64), payload=own.payload)]),
            Adverts(adverts=[Signed(public_key=own.public_key, signature=own.signature, payload=b"garbage")]),
            Pong(),
            Found(),
        ]
        for lies in hostile:
            liar.lies = lies
            assert await asker.find() == {honest.peer_id: HELD}, lies
        liar.lies = Adverts(adverts=[make_advert(2, expires_at=0.0), own])  # one good one among bad ones
        assert await asker.find() == {honest.peer_id: HELD, liar.peer_id: {0: [0, 1]}}


async def test_adverts_that_were_not_asked_for_are_not_kept() -> None:
    async with open_nodes(4) as (_, nodes):
        liar, honest, asker = nodes[1:]
        point_to(liar)
        honest.discovery.advertise(ROOT, "m", "moe", HELD, "f32")
        await settle()
        others = [make_advert(number) for number in range(100, 150)]  # good ones, of peers nobody asked
        liar.lies = Adverts(adverts=[make_advert(2), make_advert(2, model_root=OTHER), *others])
        assert await asker.find() == {honest.peer_id: HELD, liar.peer_id: {0: [0, 1]}}
        assert len(asker.discovery.book) == 2
        liar.lies = Adverts(adverts=[make_advert(2, model_root=OTHER)])  # only of a model that was not asked for
        assert await asker.find() == {honest.peer_id: HELD}
        assert await asker.find(OTHER) == {}


async def test_a_flood_of_pointers_costs_a_bounded_time_and_number_of_dials(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    monkeypatch.setattr(finding, "ASKED", 40)
    monkeypatch.setattr(finding, "ASKED_AT_ONCE", 4)
    async with open_nodes(3) as (_, nodes):
        host, asker = nodes[1:]
        host.discovery.advertise(ROOT, "m", "moe", HELD, "f32")
        await settle()
        assert await asker.find() == {host.peer_id: HELD}
        pointers = [
            Pointer(key=bytes(32), peer_id=get_identity(number).peer_id, addrs=[], seq=1, expires_at=1e12)
            for number in range(50, 150)
        ]
        asked: list[str] = []

        async def look_up(key: bytes, want: Any, on_records: Any) -> LookupDone:
            return LookupDone(lookup_id="", contacts=[], records=pointers)

        real = asker.pool.call

        async def call(contact: Contact, *args: Any, **options: Any) -> Any:
            if isinstance(args[0], GetAdverts):
                asked.append(contact.peer_id)
            if contact.peer_id == host.peer_id:
                return await real(contact, *args, **options)
            await trio.sleep(options["deadline_s"])  # dead
            raise Unreachable("dead")

        monkeypatch.setattr(asker.discovery.finder, "_look_up", look_up)
        monkeypatch.setattr(asker.pool, "call", call)
        begin = trio.current_time()
        assert await asker.find() == {host.peer_id: HELD}  # it's connected, so it's asked first
        assert trio.current_time() - begin <= finding.ASKING_S
        assert host.peer_id in asked[:4] and len(asked) <= 40
        asked.clear()
        monkeypatch.setattr(finding, "ASKED_AT_ONCE", 1000)
        await asker.find()
        assert len(asked) == 40


async def test_a_bug_in_handling_an_answer_costs_one_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, autojump_clock: Any
) -> None:
    async with open_nodes(3) as (_, nodes):
        with monkeypatch.context() as patch:
            patch.setattr(nodes[2].discovery.kademlia, "handle", lambda *args: {}["a bug"])
            assert (await nodes[2].discovery.lookup(bytes(32), "nodes")).contacts == []
        assert "a bug" in caplog.text
        assert (await nodes[2].discovery.lookup(bytes(32), "nodes")).contacts


async def test_adverts_are_signed_anew_before_they_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_nodes(1) as (_, nodes):
        node = nodes[0]
        node.discovery.advertise(ROOT, "m", "moe", HELD, "f32")
        ask = GetAdverts(model_root=ROOT)
        first = node.discovery.answer(get_identity(2).peer_id, None, ask)
        assert node.discovery.answer(get_identity(2).peer_id, None, ask) == first
        now = discovery_module.time.time()
        monkeypatch.setattr(discovery_module.time, "time", lambda: now + MAX_TTL_S / 2)
        later = node.discovery.answer(get_identity(2).peer_id, None, GetAdverts())
        assert isinstance(later, Adverts) and len(later.adverts) == 1 and later != first
        assert node.discovery.answer(get_identity(2).peer_id, None, GetAdverts(model_root=OTHER)) == Adverts(adverts=[])
