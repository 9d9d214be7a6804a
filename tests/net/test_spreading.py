"""The membership on the in-memory network: the dead, the silent, those who leave, and questions to the swarm."""

from __future__ import annotations

import time
from typing import Any

import pytest
import trio
from test_discovery import HELD, OTHER, ROOT, Node, open_nodes, settle

from daaswarm.core.health import State
from daaswarm.messages import Contact
from daaswarm.net import finding
from daaswarm.net.finding import ADVERT_S, DOUBTED_S
from daaswarm.types import PeerId


@pytest.fixture(autouse=True)
def one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock follows trio's, which jumps."""
    began, real = time.time(), time.time

    def read() -> float:
        return began + trio.current_time() if trio.lowlevel.in_trio_run() else real()

    monkeypatch.setattr(time, "time", read)


def get_offered(node: Node) -> set[str]:
    """Without asking anybody."""
    return {known.advert.peer_id for known in node.discovery.membership.get_adverts(ROOT, time.time())}


async def test_a_killed_host_is_offered_by_nobody_after_a_minute(autojump_clock: Any) -> None:
    async with open_nodes(8) as (hub, nodes):
        for host in nodes[:5]:
            host.discovery.advertise(ROOT, "m", "moe", HELD, "f32")
        await settle()
        assert len(await nodes[5].find()) == len(await nodes[6].find()) == 5
        await trio.sleep(30)
        dead = nodes[1]
        assert all(dead.peer_id in get_offered(node) for node in nodes[:7])
        hub.kill(PeerId(dead.peer_id))
        await trio.sleep(60)
        for node in [nodes[0], *nodes[2:7]]:
            assert get_offered(node) == {nodes[n].peer_id for n in (0, 2, 3, 4)} - {None}
        begin = trio.current_time()
        assert dead.peer_id not in await nodes[6].find()
        assert trio.current_time() - begin <= DOUBTED_S


async def test_no_requester_waits_twice_for_a_silent_host(autojump_clock: Any) -> None:
    async with open_nodes(4) as (hub, nodes):
        host, silent, other, asker = nodes
        for node in (host, silent):
            node.discovery.advertise(ROOT, "m", "moe", HELD, "f32")
        await settle()
        hub.partition([silent.pool.peer_id], [n.pool.peer_id for n in (host, other, asker)])
        begin = trio.current_time()
        await asker.discovery.lookup(bytes.fromhex(ROOT), "records")
        waited = []
        for _ in range(3):
            begin = trio.current_time()
            with trio.fail_after(60):
                contact = Contact(peer_id=silent.peer_id, addrs=[f"/memory/{silent.peer_id}"])
                await asker.discovery.finder._fetch(contact, ROOT, set())
            waited.append(trio.current_time() - begin)
        assert [round(s, 1) for s in waited] == [ADVERT_S, DOUBTED_S, DOUBTED_S]
        hub.heal()
        await trio.sleep(60)
        assert silent.peer_id in await asker.find()
        assert asker.discovery.membership.get_state(PeerId(silent.peer_id)) is State.UP


async def test_who_asks_first_is_told_by_others_who_is_down(autojump_clock: Any) -> None:
    async with open_nodes(6) as (hub, nodes):
        for host in nodes[:4]:
            host.discovery.advertise(ROOT, "m", "moe", HELD, "f32")
        await trio.sleep(30)
        cut = [nodes[2].pool.peer_id]
        hub.partition(cut, [n.pool.peer_id for n in nodes if n is not nodes[2]])
        await trio.sleep(60)  # the others know by now; the asker has never heard of any of them
        asker = nodes[5]
        pointed = await asker.discovery.finder.get_pointed(ROOT)
        assert nodes[2].peer_id in {contact.peer_id for contact in pointed}
        begin = trio.current_time()
        assert set(await asker.find()) == {nodes[n].peer_id for n in (0, 1, 3)}
        assert trio.current_time() - begin < ADVERT_S
        hub.heal()


async def test_who_leaves_is_gone_at_once(autojump_clock: Any) -> None:
    async with open_nodes(5) as (_, nodes):
        for host in nodes[:3]:
            host.discovery.advertise(ROOT, "m", "moe", HELD, "f32")
        await settle()
        assert len(await nodes[4].find()) == 3
        await trio.sleep(25)
        with trio.fail_after(2):
            await nodes[1].discovery.leave()
        await trio.sleep(1)
        assert all(nodes[1].peer_id not in get_offered(node) for node in (nodes[0], nodes[2], nodes[4]))


async def test_a_change_is_heard_without_asking(autojump_clock: Any) -> None:
    async with open_nodes(4) as (_, nodes):
        nodes[1].discovery.advertise(ROOT, "m", "moe", HELD, "f32")
        await settle()
        await nodes[3].find()
        await trio.sleep(5)
        nodes[1].discovery.set_paused(True)
        await trio.sleep(1)
        (known,) = nodes[3].discovery.membership.get_adverts(ROOT, time.time())
        assert known.advert.paused


async def test_the_swarm_is_asked_where_the_dht_has_nothing(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    async with open_nodes(6) as (_, nodes):
        nodes[2].discovery.advertise(ROOT, "m", "moe", HELD, "f32")
        await settle()

        async def find_nobody(key: bytes, want: Any, on_records: Any) -> Any:
            return await nodes[5].discovery.lookup(bytes(32), want)

        monkeypatch.setattr(nodes[5].discovery.finder, "_look_up", find_nobody)
        assert await nodes[5].find() == {nodes[2].peer_id: HELD}
        assert await nodes[5].find(OTHER) == {}
        for name, found in (("M", 1), (ROOT[:8], 1), ("other", 0)):
            assert len(await nodes[5].discovery.spreader.ask(name=name)) == found
        assert {k.advert.peer_id for k in await nodes[4].discovery.finder.find_all(name="m")} == {nodes[2].peer_id}


async def test_find_all_asks_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch, autojump_clock: Any) -> None:
    monkeypatch.setattr(finding, "ASKED", 2)
    async with open_nodes(6) as (_, nodes):
        for node in nodes:
            node.discovery.advertise(ROOT, "m", "moe", HELD, "f32")
        await settle()
        found = await nodes[5].discovery.finder.find_all()
        assert len(found) == 3  # itself and two others
