"""What this node learns of hosts by checking their answers: kept in the database, shared by all answers."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import trio

from daaswarm.core.reputation import PROBATION, Reputation, Standing, is_banned
from daaswarm.errors import DaaswarmError
from daaswarm.node.reporting import Event
from daaswarm.store.node_store import NodeStore
from daaswarm.types import PeerId

if TYPE_CHECKING:
    from daaswarm.inference.auditing import Ledger

logger = logging.getLogger(__name__)


class Trusting:
    """The ledger of a node. ``me``: this node, which believes itself."""

    def __init__(self, store: NodeStore, me: PeerId) -> None:
        self._store = store
        self._me = me
        self._ledger: Ledger | None = None
        self._opening = trio.Lock()

    async def get_ledger(self) -> Ledger:
        """For answers; imports torch. Read from the disk the first time."""
        async with self._opening:
            if self._ledger is None:
                from daaswarm.inference.auditing import Ledger

                self._ledger = Ledger(Reputation(await self._store.get_standings()))
                self._ledger.exempt.add(self._me)
            return self._ledger

    async def save(self) -> None:
        """Write down what changed. A disk that refuses costs what was learnt since, and a line in the log."""
        if self._ledger is None:
            return
        changed = self._ledger.take_changed()
        if not changed:
            return
        try:
            await self._store.put_standings(changed)
        except DaaswarmError as error:
            self._ledger.give_back(changed)
            logger.warning("what was learnt of hosts is not written down: %s", error)

    async def get_standings(self) -> list[Standing]:
        """Of all peers that were checked."""
        if self._ledger is not None:
            return self._ledger.get_standings()
        return await self._store.get_standings()

    async def get_banned(self) -> dict[PeerId, Standing]:
        """Who isn't asked, and why."""
        return {each.peer_id: each for each in await self.get_standings() if is_banned(each, time.time())}

    async def forgive(self, peer: PeerId) -> bool:
        """Amnesty: the peer is on probation again. Whether it was known."""
        found = (await self.get_ledger()).forgive(peer)
        await self.save()
        return found


def describe_trust(standings: list[Standing], now: float | None = None) -> dict[PeerId, Event]:
    """For ``peers list``: of each peer the standing for the model for which it is worst."""
    now = time.time() if now is None else now
    worst: dict[PeerId, Standing] = {}
    for standing in standings:
        known = worst.get(standing.peer_id)
        if known is None or (not standing.banned_at, standing.trust) < (not known.banned_at, known.trust):
            worst[standing.peer_id] = standing
    return {peer: _describe(standing, now) for peer, standing in worst.items()}


def _describe(standing: Standing, now: float) -> Event:
    passed, failed = round(standing.passed), round(standing.failed)
    if is_banned(standing, now):
        state, why = "banned", standing.reason
    elif standing.passed < PROBATION or standing.suspicion > 0:
        state, why = "probation", standing.reason if standing.suspicion > 0 else f"{passed} checked calls were right"
    else:
        state, why = "trusted", f"{passed} checked calls were right" + (f", {failed} wrong" if failed else "")
    return {"trust": round(standing.trust, 4), "state": state, "model_root": standing.model_root, "reason": why}
