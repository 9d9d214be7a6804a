"""What the owner of a node may ask of it while it runs, besides answers: for ``expert``, ``peers`` and ``model``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from daaswarm.config import Config
from daaswarm.net.dataplane import TcpNetwork
from daaswarm.net.discovery import Discovery
from daaswarm.node.deploying import Deploying
from daaswarm.node.hosting import Hosting
from daaswarm.node.pulling import Pulling
from daaswarm.node.reporting import Emit, Event
from daaswarm.node.surveying import Surveying
from daaswarm.node.trusting import Trusting
from daaswarm.store.node_store import NodeStore

Bootstrap = Callable[[list[str]], Awaitable[None]]


class Operating:
    """Args:

    bootstrap: meets the swarm through the addresses that a command names.
    """

    def __init__(
        self,
        config: Config,
        network: TcpNetwork,
        discovery: Discovery,
        hosting: Hosting,
        store: NodeStore,
        trusting: Trusting,
        bootstrap: Bootstrap,
    ) -> None:
        self.deploying = Deploying(hosting, store, default_dtype=config.host.dtype)
        self.surveying = Surveying(network, discovery, hosting, store, trusting)
        self.pulling = Pulling(network, discovery)
        self._trusting = trusting
        self._hosting = hosting
        self._bootstrap = bootstrap

    async def run(self, method: str, params: Event, emit: Emit) -> Event | None:
        """The result of a method; None for one that isn't of these."""
        if method == "peers":
            return await self.surveying.list_peers()
        if method == "forgive":
            return {"peer_id": params["peer"], "known": await self._trusting.forgive(params["peer"])}
        if method == "experts":
            return {"running": True, "limit_bytes": self._hosting.limit_bytes, "hosted": self.deploying.describe()}
        if method == "deploy":
            return await self.deploying.deploy(params, emit)
        if method == "undeploy":
            return await self.deploying.remove(params, emit)
        if method == "pull":
            await self._bootstrap(params["bootstrap"])
            return await self.pulling.pull(params, emit)
        if method in ("available", "verify"):
            await self._bootstrap(params["bootstrap"])
            survey = self.surveying.verify if method == "verify" else self.surveying.list_available
            return await survey(params, emit)
        return None
