"""What a node keeps an eye on while it runs: the clock, suspensions of the machine, and the files it read."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import trio

from daaswarm.core.clock_watch import ClockJump, ClockWatch, Gap
from daaswarm.net.dataplane import TcpNetwork
from daaswarm.net.discovery import Discovery
from daaswarm.node.hosting import Hosting
from daaswarm.node.rounds import Rounds

LOOK_S = 5.0  # between two looks at the clocks
FILES_EVERY = 6  # looks; files are looked at every half minute, which costs a stat each
LOG_JUMP_S = 30.0  # a jump that others notice: records may be refused by peers whose clocks differ by a minute

logger = logging.getLogger(__name__)


class Vigil:
    """Args:

    wall: Unix time, s.
    monotonic: s.
    """

    def __init__(
        self,
        network: TcpNetwork,
        discovery: Discovery,
        hosting: Hosting,
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._network = network
        self._discovery = discovery
        self._hosting = hosting
        self._wall, self._monotonic = wall, monotonic
        self._clocks = ClockWatch()

    async def keep(self) -> None:
        """Until cancelled."""
        clocks, files = Rounds("looking at the clocks", logger), Rounds("looking at the files", logger)
        looks = 0
        while True:
            with clocks.round():
                await self.look()
            looks += 1
            if looks % FILES_EVERY == 0:
                with files.round():
                    await self._hosting.check_files()
            await trio.sleep(LOOK_S)

    async def look(self) -> None:
        """One look at the clocks, and what follows from it."""
        for event in self._clocks.look(self._wall(), self._monotonic()):
            if isinstance(event, ClockJump):
                say = logger.warning if abs(event.by_s) > LOG_JUMP_S else logger.info
                say("the clock moved by %+.0f s beside the time that passed: adverts are signed anew", event.by_s)
                self._discovery.note_jump(event.by_s)
            elif isinstance(event, Gap):
                logger.info("nothing ran here for %.0f s: connections are checked", event.seconds)
                await self._network.check_connections()
                self._discovery.rejoin()
