"""Dialling a peer back, so that it learns whether others can dial it: only where it is seen, seldom, and its PeerId
has to be there."""

from __future__ import annotations

import ipaddress
import logging
from typing import TYPE_CHECKING

import trio

from daaswarm.core.quotas import Quotas
from daaswarm.errors import Busy, DaaswarmError, RemoteProtocolError
from daaswarm.messages import CheckReach, Contact, Reached
from daaswarm.net.addresses import get_host_address, get_origin
from daaswarm.types import PeerId

if TYPE_CHECKING:
    from daaswarm.net.dataplane import TcpNetwork

log = logging.getLogger(__name__)

DIAL_BACK_S = 4.0  # for all ports together; who needs longer is as good as unreachable
AT_ONCE = 8  # dial-backs of this node
ASKER_RATE, ASKER_BURST = 1 / 60, 4.0  # of one peer: a start, an address change, and then one in a while
ORIGIN_RATE, ORIGIN_BURST = 1 / 10, 16.0  # of one IP address: PeerIds cost nothing


class DialBack:
    """The asked side of one node."""

    def __init__(self, network: TcpNetwork) -> None:
        self._network = network
        self._askers = Quotas(ASKER_RATE, ASKER_BURST)
        self._origins = Quotas(ORIGIN_RATE, ORIGIN_BURST)
        self._running = 0

    async def answer(self, peer: PeerId, message: CheckReach) -> Reached:
        """Raises:
        RemoteProtocolError: the asker is behind a relay, so it's seen nowhere.
        Busy: it asked too often, or too many ask.
        """
        host = self._network.get_direct_host(peer)
        if host is None:
            raise RemoteProtocolError("dialling back needs a direct connection", reject=False)
        now = trio.current_time()
        wait_s = self._askers.take(peer, now) or self._origins.take(PeerId(get_origin(host)), now)
        if wait_s or self._running >= AT_ONCE:
            raise Busy("too many dial-backs were asked for", retry_after_s=wait_s or DIAL_BACK_S)
        reached: list[int] = []

        async def dial(port: int) -> None:
            addr = str(get_host_address(host, port, peer))
            try:
                hands = await self._network.dial_directly(Contact(peer_id=peer, addrs=[addr]))
            except DaaswarmError as error:
                log.debug("dialling back: %s", error)
                return
            hands.carrier.shut_down()
            hands.carrier.close()
            reached.append(port)

        self._running += 1
        try:
            with trio.move_on_after(DIAL_BACK_S):
                async with trio.open_nursery() as nursery:
                    for port in dict.fromkeys(message.ports):
                        nursery.start_soon(dial, port)
        finally:
            self._running -= 1
        return Reached(host=str(ipaddress.ip_address(host.partition("%")[0])), ports=sorted(reached))
