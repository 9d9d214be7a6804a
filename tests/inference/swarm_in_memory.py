"""Hosts with real experts over the in-memory network, and ways for them to misbehave."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import trio

from daaswarm.core.router import ReplicaRouter
from daaswarm.errors import RemoteProtocolError
from daaswarm.experts.service import ExpertService, HostedModel, Layer
from daaswarm.inference.plan import HostPlan
from daaswarm.inference.swarm_experts import SwarmExperts
from daaswarm.messages import Contact, ExpertCall, Reply, Request
from daaswarm.models.experts import load_experts
from daaswarm.models.sources import LocalModel
from daaswarm.net.handshake import Identity
from daaswarm.net.memory import MemoryHub
from daaswarm.net.pool import ConnectionPool
from daaswarm.types import Dtype, ExpertId, PeerId

SWARM = bytes(32)
Held = dict[int, list[int]]
Behaviour = Callable[["Host", ExpertCall, memoryview], Awaitable[tuple[Reply, Sequence[Any]]]]


class Host:
    """One host; ``behave`` answers its expert calls instead of it while it is set."""

    def __init__(self, model: LocalModel, held: Held, dtype: Dtype) -> None:
        self.held = held
        self.calls: list[ExpertCall] = []
        self.behave: Behaviour | None = None
        self.service = ExpertService()
        layers: dict[int, Layer] = dict(load_experts(model, held, dtype))
        self.service.add(HostedModel(model.root, model.name, model.kind, model.hidden, dtype, layers))
        self.pool: ConnectionPool

    @property
    def contact(self) -> Contact:
        assert self.pool.contact is not None
        return self.pool.contact

    async def handle(
        self, peer: PeerId, contact: Contact | None, message: Request, body: memoryview, deadline_s: float
    ) -> tuple[Reply, Sequence[Any]]:
        if not isinstance(message, ExpertCall):
            raise RemoteProtocolError("expert calls only", reject=False)
        if self.behave is not None:
            self.calls.append(message)
            return await self.behave(self, message, body)
        return await self.service.serve(peer, message, body, deadline_s)

    def handle_inline(
        self, peer: PeerId, message: Request, body: memoryview, deadline_s: float
    ) -> tuple[Reply, Sequence[Any]] | None:
        if self.behave is not None or not isinstance(message, ExpertCall):
            return None
        self.calls.append(message)
        answer = self.service.serve_inline(peer, message, body, deadline_s)
        if answer is None:
            self.calls.pop()
        return answer


class Swarm:
    """Some hosts and a requester that is connected to them."""

    def __init__(self, model: LocalModel, dtype: Dtype, hub: MemoryHub) -> None:
        self.model = model
        self.dtype: Dtype = dtype
        self.hub = hub
        self.hosts: list[Host] = []
        self.requester: ConnectionPool
        self.refreshes = 0

    def make_plan(self, hosts: Sequence[Host] | None = None) -> HostPlan:
        holders: dict[ExpertId, list[PeerId]] = {}
        hosts = self.hosts if hosts is None else hosts
        for host in hosts:
            for layer, experts in host.held.items():
                for expert in experts:
                    holders.setdefault(ExpertId(layer, expert), []).append(host.pool.peer_id)
        contacts = {host.pool.peer_id: host.contact for host in hosts}
        return HostPlan(self.model.root, self.dtype, self.model.layers, holders, contacts, kind=self.model.kind)

    def make_experts(
        self, plan: HostPlan | None = None, refreshed: HostPlan | None = None, **changes: Any
    ) -> SwarmExperts:
        def refresh() -> HostPlan:
            self.refreshes += 1
            return refreshed or plan or self.make_plan()

        return SwarmExperts(
            plan or self.make_plan(),
            self.requester,
            ReplicaRouter(random.Random(0)),
            **{"refresh": refresh, "call_timeout_s": 10.0, "model_name": self.model.name, **changes},
        )

    def kill(self, host: Host) -> None:
        self.hub.kill(host.pool.peer_id)


@asynccontextmanager
async def open_swarm(model: LocalModel, *held: Held, dtype: Dtype = "f32") -> AsyncIterator[Swarm]:
    hub = MemoryHub()
    swarm = Swarm(model, dtype, hub)
    async with AsyncExitStack() as stack:
        for number, part in enumerate(held, start=1):
            host = await trio.to_thread.run_sync(Host, model, part, dtype)
            host.pool = await stack.enter_async_context(
                hub.open_node(make_identity(number), handler=host.handle, fast_handler=host.handle_inline)
            )
            swarm.hosts.append(host)
        swarm.requester = await stack.enter_async_context(
            hub.open_node(make_identity(0), handler=Host.handle, dialable=False)  # type: ignore[arg-type]
        )
        for host in swarm.hosts:
            await swarm.requester.connect(host.contact)
        yield swarm


def make_identity(number: int) -> Identity:
    return Identity.from_seed(bytes([number + 1]) * 32, SWARM, "test")
