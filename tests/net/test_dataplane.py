from __future__ import annotations

import trio
from net_helpers import get_call, get_identity, serve

from daaswarm.messages import ExpertReply, Ping, Pong, Reply
from daaswarm.net.dataplane import open_tcp_network


async def test_calls_over_tls():
    async with (
        open_tcp_network(get_identity(1), handler=serve) as a,
        open_tcp_network(get_identity(2), handler=serve) as b,
        open_tcp_network(get_identity(3), handler=serve, listen=[]) as c,
    ):
        assert b.contact is not None and c.contact is None
        assert (await a.call(b.contact, Ping(), deadline_s=5))[0] == Pong()
        big = bytes(range(256)) * 40_000
        _, body = await b.call(a.contact, get_call(), [big[:1000], big[1000:]], deadline_s=30)
        assert body == big
        assert len(a.connections) == len(b.connections) == 1
        assert (await c.connect_addr(b.contact.addrs[0])).peer_id == b.peer_id

        def work() -> Reply:
            for _ in range(100):
                reply, body = c.submit(b.contact, get_call(), [b"x" * 2000], deadline_s=5).wait()
                assert body == b"x" * 2000
            return reply

        assert isinstance(await trio.to_thread.run_sync(work), ExpertReply)
