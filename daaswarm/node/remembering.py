"""What a node carries from one run to the next: whom it knows, who serves what, who asked whom for how much."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import trio

from daaswarm.config import get_cache_dir
from daaswarm.errors import ConfigError, DaaswarmError, RemoteProtocolError, StorageError
from daaswarm.messages import Contact, ExpertCall
from daaswarm.models.sources import LocalModel
from daaswarm.net.dataplane import TcpNetwork
from daaswarm.net.discovery import Discovery
from daaswarm.node.rounds import Rounds
from daaswarm.store.node_store import NodeStore
from daaswarm.store.records import AdvertRecord, ModelRecord, PeerRecord
from daaswarm.types import ModelRoot, PeerId

if TYPE_CHECKING:
    from daaswarm.experts.service import ExpertService
    from daaswarm.net.frames import Buffer

SAVE_S = 30.0  # how much of what is learnt all the time a crash may cost
SEEDS = 64  # peers asked at a start; enough to find the swarm again without the bootstrap peer

logger = logging.getLogger(__name__)


class Remembering:
    """Moves what a node knows into its store and back.

    Args:
        is_owner: this node runs on the data directory, rather than for one answer: its peers are kept.
    """

    def __init__(self, store: NodeStore, network: TcpNetwork, discovery: Discovery, *, is_owner: bool) -> None:
        self.store = store
        self._network = network
        self._discovery = discovery
        self._is_owner = is_owner

    async def recall(self) -> list[Contact]:
        """Believe again the adverts that still hold; returns peers through which to find the swarm."""
        for record in await self.store.get_adverts():
            try:
                self._discovery.membership.put(record.signed, time.time())
            except RemoteProtocolError as error:  # of another swarm, or the disk altered it
                logger.debug("an advert on disk is not believed: %s", error)
        return [record.contact for record in await self.store.get_peers(SEEDS)]

    async def keep_saving(self) -> None:
        """Write now and then, until cancelled."""
        saving = Rounds("saving", logger)
        while True:
            await trio.sleep(SAVE_S)
            with saving.round():
                await self.save()

    async def save(self) -> bool:
        """Write what there is to write. False if the disk refuses, which is said once."""
        if self._is_owner:
            return await self.store.save(list(self._get_peers()), list(self._get_adverts()))
        return await self.store.save([], []) if len(self.store.tally) else True

    def _get_peers(self) -> Iterable[PeerRecord]:
        agents = {connection.peer_id: connection.peer.agent for connection in self._network.connections}
        for entry in self._discovery.kademlia.table.get_entries():
            peer = PeerId(entry.contact.peer_id)
            yield PeerRecord(
                peer_id=peer,
                addrs=list(entry.contact.addrs),
                agent=agents.get(peer, ""),
                first_seen=entry.seen_at,
                last_seen=entry.seen_at,
                failures=entry.failures,
            )

    def _get_adverts(self) -> Iterable[AdvertRecord]:
        now = time.time()
        book = self._discovery.book
        for root in book.get_models(now):
            for known in book.get_adverts(root, now):
                peer = PeerId(known.advert.peer_id)
                if peer != self._network.peer_id:
                    yield AdvertRecord(
                        peer_id=peer,
                        model_root=ModelRoot(root),
                        seq=known.advert.seq,
                        expires_at=known.advert.expires_at,
                        signed=known.signed,
                    )

    # -- calls --------------------------------------------------------------------------------------------------

    def note_served(self, peer: PeerId, call: ExpertCall, body: memoryview, reply: Sequence[Buffer]) -> None:
        """One call of a peer was answered with the parts of ``reply``."""
        bytes_out = sum(memoryview(part).nbytes for part in reply)
        self.store.tally.note(
            "served",
            peer,
            call.model_root,
            time.time(),
            calls=1,
            rows=call.rows,
            bytes_in=body.nbytes,
            bytes_out=bytes_out,
        )

    @contextlib.contextmanager
    def noting_refusal(self, peer: PeerId, call: ExpertCall, service: ExpertService) -> Iterator[None]:
        """Count the call as failed if the block refuses it."""
        try:
            yield
        except DaaswarmError:
            # Peers may name any model: those that aren't held are counted together.
            root = call.model_root if any(root == call.model_root for root, _ in service.models) else ""
            self.store.tally.note("served", peer, root, time.time(), failures=1)
            raise

    def note_asked(self, result: dict[str, Any]) -> None:
        """An answer came of calls to others; ``result`` is that of ``infer``."""
        now = time.time()
        for host in result["hosts"]:
            if host["peer_id"] != self._network.peer_id:
                self.store.tally.note(
                    "asked",
                    host["peer_id"],
                    result["model_root"],
                    now,
                    calls=host["calls"],
                    rows=round(host["rows"]),
                    bytes_in=round(host["bytes_received"]),
                    bytes_out=round(host["bytes_sent"]),
                )

    # -- models -------------------------------------------------------------------------------------------------

    async def note_model(self, model: LocalModel) -> None:
        """Remember where a model was that isn't in the cache. Not being able to costs nothing else."""
        folder = model.folder.absolute()
        if folder.is_relative_to(get_cache_dir().absolute()):
            return
        record = ModelRecord(
            folder=str(folder), model_root=model.root, name=model.name, kind=model.kind, used_at=time.time()
        )
        try:
            await self.store.put_model(record)
        except (StorageError, ConfigError) as error:
            logger.info("the folder of %s is not remembered: %s", model.name, error)
