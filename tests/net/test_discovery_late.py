"""A peer that takes long: lookups go on without it."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from test_discovery import open_nodes

from daaswarm.core.kademlia_events import LATE_S, REQUEST_S
from daaswarm.errors import Unreachable


async def test_a_silent_peer_costs_half_a_second_and_not_its_whole_deadline(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    async with open_nodes(6) as (_, nodes):
        asker, silent = nodes[3], nodes[5]
        real = asker.pool.call

        async def call(contact: Any, *args: Any, **options: Any) -> Any:
            if contact.peer_id != silent.peer_id:
                return await real(contact, *args, **options)
            await trio.sleep(options["deadline_s"])
            raise Unreachable("silent")

        monkeypatch.setattr(asker.pool, "call", call)
        begin = trio.current_time()
        found = await asker.discovery.lookup(bytes(32), "nodes")
        assert LATE_S <= trio.current_time() - begin < REQUEST_S
        assert {c.peer_id for c in found.contacts} == {nodes[i].peer_id for i in (0, 1, 2, 4)}
