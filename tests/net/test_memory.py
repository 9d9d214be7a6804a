from __future__ import annotations

import pytest
import trio
from net_helpers import get_call, get_identity, serve

from daaswarm.errors import Busy, ConnectionLost, DeadlineExceeded, ExpertError, Unreachable
from daaswarm.messages import ExpertReply, FindNode, GetAdverts, Ping, Pong, Reply
from daaswarm.net.memory import MemoryHub


async def test_calls_both_ways(autojump_clock):
    hub = MemoryHub()
    async with hub.open_node(get_identity(1), handler=serve) as a, hub.open_node(get_identity(2), handler=serve) as b:
        assert b.contact is not None and a.contact is not None
        assert await a.connect(b.contact) == b.peer_id
        assert isinstance((await a.call(b.contact, Ping(), deadline_s=5))[0], Pong)
        reply, body = await a.call(b.contact, get_call(), [b"1234", b"5678" * 7], deadline_s=5)
        assert reply == ExpertReply(rows=1, hidden=8) and bytes(body) == b"1234" + b"5678" * 7
        body[0] = 0  # writable
        big = bytes(range(256)) * 40_000  # 10 MB: chunks and windows
        _, body = await b.call(a.contact, get_call(), [big], deadline_s=30)
        assert body == big
        assert len(a.connections) == len(b.connections) == 1


async def test_errors_keep_their_names(autojump_clock):
    hub = MemoryHub()
    async with hub.open_node(get_identity(1), handler=serve) as a, hub.open_node(get_identity(2), handler=serve) as b:
        with pytest.raises(ExpertError, match="layer 9") as info:
            await a.call(b.contact, get_call(9), deadline_s=5)
        assert info.value.hint == "ask another"
        with pytest.raises(Busy) as busy:
            await a.call(b.contact, GetAdverts(), deadline_s=5)
        assert busy.value.retry_after_s == 0.5
        with pytest.raises(DeadlineExceeded):
            await a.call(b.contact, FindNode(target=bytes(32)), deadline_s=1)
        async with trio.open_nursery() as nursery:

            async def lose():
                with pytest.raises(ConnectionLost):
                    await a.call(b.contact, FindNode(target=bytes(32)), deadline_s=20)

            nursery.start_soon(lose)
            await trio.sleep(1)
            hub.kill(b.peer_id)
        with pytest.raises(Unreachable):
            await a.call(b.contact, Ping(), deadline_s=5)
        hub.revive(b.peer_id)
        await a.call(b.contact, Ping(), deadline_s=5)
        hub.partition([a.peer_id], [b.peer_id])
        with pytest.raises(DeadlineExceeded):
            await a.call(b.contact, Ping(), deadline_s=5)
        hub.heal()
        await a.call(b.contact, Ping(), deadline_s=5)


async def test_submit_from_a_thread():
    hub = MemoryHub()
    async with hub.open_node(get_identity(1), handler=serve) as a, hub.open_node(get_identity(2), handler=serve) as b:
        await a.connect(b.contact)

        def work() -> Reply:
            for _ in range(20):
                reply, body = a.submit(b.contact, get_call(), [b"x" * 2000], deadline_s=5).wait()
                assert body == b"x" * 2000
            return reply

        assert isinstance(await trio.to_thread.run_sync(work), ExpertReply)
