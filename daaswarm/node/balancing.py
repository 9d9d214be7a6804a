"""Keeps what a host chose by itself right while others come and go: the core decides, this loads and gives up."""

from __future__ import annotations

import logging
import random
import time
from typing import TYPE_CHECKING

import trio

from daaswarm.core.placement import Change, Placement
from daaswarm.errors import DaaswarmError
from daaswarm.net.discovery import Discovery
from daaswarm.node.reporting import Emit
from daaswarm.node.rounds import Rounds
from daaswarm.types import Dtype, ExpertId, ModelRoot, PeerId

if TYPE_CHECKING:
    from daaswarm.node.hosting import Hosting, Wish

logger = logging.getLogger(__name__)


class Balancing:
    """One ``host-expert`` without ranges.

    Args:
        held: what it serves, ``{layer: [experts]}``; kept up to date.
        own: this node.
    """

    def __init__(
        self,
        hosting: Hosting,
        discovery: Discovery,
        own: PeerId,
        wish: Wish,
        held: dict[int, list[int]],
        emit: Emit,
    ) -> None:
        self._hosting = hosting
        self._discovery = discovery
        self._model = wish.model
        self._dtype: Dtype = wish.dtype
        self._held = held
        self._emit = emit
        self.placement = Placement(
            own,
            self._model.layers,
            lambda layer: self._model.expert_bytes(layer, self._dtype),
            wish.memory_bytes,
            random.Random(),
        )

    async def keep(self) -> None:
        """Until cancelled."""
        rounds = Rounds("looking at who holds what", logger)
        while True:
            await trio.sleep(self.placement.get_pause_s())
            with rounds.round():
                await self.look(time.time())

    async def look(self, now: float) -> Change | None:
        """One look at who holds what, and what follows from it.

        Args:
            now: Unix time, s.
        """
        holders = await find_holders(self._discovery, self._model.root, self._dtype)
        async with self._hosting.changing:
            hosted = self._hosting.get_hosted(self._model.root)
            others = hosted.layers.keys() - self._held.keys() if hosted is not None else set[int]()
            change = self.placement.review(self._held, holders, now, closed=others)
            if change is None:
                return None
            try:
                await self._carry_out(change)
            except DaaswarmError as error:
                logger.warning("%s stays as it is placed: %s", self._model.name, error)
                return None
        from daaswarm.node.deploying import describe_served

        text = f"placed anew: {describe_served(self._model, self._hosting)}"
        logger.info("%s", text)
        await self._emit({"event": "message", "text": text})
        return change

    async def _carry_out(self, change: Change) -> None:
        """Give up first, so that both fit. What is served and what is said of it agree after each step.

        Raises:
            ModelError: the checkpoint was altered.
            ConfigError: the memory was given to others meanwhile.
        """
        from daaswarm.node.hosting import count_bytes

        model, dtype = self._model, self._dtype
        left = {layer: sorted(set(self._held[layer]) - set(ids)) for layer, ids in change.drop.items()}
        gone = [layer for layer, ids in left.items() if not ids]
        self._hosting.get_service().remove(model.root, dtype, gone)
        for layer in gone:
            del self._held[layer]
        self._hosting.advertise(model.root)
        await self._put({layer: ids for layer, ids in left.items() if ids})
        with self._hosting.reserving(count_bytes(model, dtype, change.add)):
            await self._put({layer: sorted({*self._held.get(layer, ()), *ids}) for layer, ids in change.add.items()})

    async def _put(self, layers: dict[int, list[int]]) -> None:
        """Serve these layers so, each in the place of what was served of it."""
        if layers:
            hosted, _ = await self._hosting.load(self._model, layers, self._dtype, _be_quiet)
            self._hosting.get_service().put(hosted)
            self._held.update(layers)
            self._hosting.advertise(self._model.root)


async def find_holders(discovery: Discovery, root: ModelRoot, dtype: Dtype) -> dict[ExpertId, list[PeerId]]:
    """Who holds each expert of a model in one dtype, as each host says just now: one answer never mixes dtypes, so
    replicas in another one are none.
    """
    holders: dict[ExpertId, list[PeerId]] = {}
    for known in await discovery.find_adverts(root):
        if known.advert.dtype == dtype:
            for layer, experts in known.experts.items():
                for expert in experts:
                    holders.setdefault(ExpertId(layer, expert), []).append(PeerId(known.advert.peer_id))
    return holders


async def _be_quiet(event: dict[str, object]) -> None:
    """Nobody watches a bar for hours."""
