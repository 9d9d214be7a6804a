"""The peers that a model is pulled from: who they are, in which order they are asked, and who is asked no more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from daaswarm.errors import Busy, ConfigError, DaaswarmError, ExpertError, NoPeerCouldServe
from daaswarm.messages import Contact, GetModelPart, ModelPart
from daaswarm.net.addresses import get_origin, parse_address
from daaswarm.net.dataplane import TcpNetwork
from daaswarm.net.discovery import Discovery
from daaswarm.types import ModelRoot, PeerId

PIECE_S = 10.0  # for a piece of 512 KiB: who is slower than 50 kB/s is of no help
BUSY_S = 2.0  # between two tries of a piece, at most
BUSY_FOR_S = 60.0  # of one piece: a queue of pieces moves on in a second


@dataclass
class Source:
    """A peer that says it hosts the model.

    Attributes:
        dropped: why it is asked nothing more.
        lied: it is not asked again in this pull.
        late: how often it failed or was too slow: who never was is asked first.
        in_use: parts of tensors are asked of it now.
        right_bytes, right_s: of its units that were right.
    """

    contact: Contact
    nbytes: int = 0
    dropped: str = ""
    lied: bool = False
    late: int = 0
    in_use: bool = False
    right_bytes: int = 0
    right_s: float = 0.0


class Liar(DaaswarmError):
    """A peer sent what is not of the model."""


class Givers:
    """Args:

    say: told in a sentence about each peer that is dropped.
    """

    def __init__(
        self, network: TcpNetwork, discovery: Discovery, root: ModelRoot, say: Callable[[str], Awaitable[None]]
    ) -> None:
        self._network = network
        self._discovery = discovery
        self._root = root
        self._say = say
        self._sources: dict[PeerId, Source] = {}

    @property
    def all(self) -> list[Source]:
        return list(self._sources.values())

    async def find(self) -> None:
        """Those who host the model now. One that was merely slow or gone gets another chance if nobody else is left."""
        again: list[Source] = []
        for known in await self._discovery.find_adverts(self._root):
            peer = PeerId(known.advert.peer_id)
            source = self._sources.get(peer)
            if source is not None and source.dropped and not source.lied:
                again.append(source)
            elif source is None and peer != self._network.peer_id:
                self._sources[peer] = Source(Contact(peer_id=peer, addrs=known.advert.addrs))
        if all(source.dropped for source in self._sources.values()):
            for source in again:
                source.dropped = ""

    def rank(self) -> list[Source]:
        """Who may be asked, best first: who was never late; of those one of each address before a second of any, since
        names cost nothing."""
        before: Counter[str] = Counter()
        ranked: list[tuple[int, int, Source]] = []
        for source in self._sources.values():
            place = self._get_place(source)
            ranked.append((source.late, before[place], source))
            before[place] += 1
        ranked.sort(key=lambda item: item[:2])
        return [source for _, _, source in ranked if not source.dropped]

    async def ask(self, source: Source, kind: str, name: str, offset: int, size: int) -> tuple[int, memoryview]:
        """(bytes in all, those asked for), as the peer says.

        Raises:
            DaaswarmError: it has failed; never a ``ConfigError``, for it is nobody's fault here.
        """
        request = GetModelPart(model_root=self._root, kind=kind, name=name, offset=offset, size=size)
        until = trio.current_time() + BUSY_FOR_S
        while True:
            try:
                reply, body = await self._network.call(source.contact, request, deadline_s=PIECE_S)
            except Busy as busy:
                if trio.current_time() >= until:
                    raise
                await trio.sleep(min(max(busy.retry_after_s, 0.05), BUSY_S))
                continue
            except ConfigError as error:
                raise ExpertError(error.message) from None
            if not isinstance(reply, ModelPart):
                raise Liar(f"it answered with {type(reply).__name__}")
            source.nbytes += len(body)
            return reply.total, body

    async def drop(self, source: Source, error: DaaswarmError) -> None:
        """Ask it nothing more."""
        if not source.dropped:
            source.dropped = error.message
            source.late += 1
            source.lied = isinstance(error, Liar) or error.code in ("remote_protocol_error", "peer_id_mismatch")
            await self._say(f"{source.contact.peer_id} is asked nothing more: {error.message}")

    def give_up(self, what: str) -> NoPeerCouldServe:
        """The error that says why nobody gave ``what``."""
        failed = {peer: source.dropped or "too slow" for peer, source in self._sources.items() if source.late}
        reasons = "; ".join(f"{peer}: {why}" for peer, why in failed.items())
        nobody = f"no peer gave {what}: {reasons}" if reasons else "nobody in the swarm hosts it now"
        return NoPeerCouldServe(
            f"model {self._root[:12]} can't be pulled: {nobody}",
            hint="is the root right, and does a host-expert of it run? What was pulled is kept: run this again",
        )

    def _get_place(self, source: Source) -> str:
        """The address that it is connected from, or else says it has."""
        connection = self._network.get(source.contact.peer_id)
        addr = connection.remote_addr if connection is not None else next(iter(source.contact.addrs), "")
        try:
            return get_origin(parse_address(addr).host)
        except (ConfigError, ValueError):  # a name, or not of TCP
            return addr
