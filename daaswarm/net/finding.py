"""Who serves a model, asked of the hosts themselves: no answer is begun with one that died unnoticed."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable

import msgspec
import trio

from daaswarm import messages
from daaswarm.core.adverts import Known
from daaswarm.core.health import State
from daaswarm.core.kademlia_events import LookupDone
from daaswarm.core.lookup import Want
from daaswarm.core.notary import Notary
from daaswarm.core.signing import get_peer_id
from daaswarm.errors import DaaswarmError, LocalProtocolError, RemoteProtocolError
from daaswarm.messages import Advert, Adverts, Contact, GetAdverts, Signed
from daaswarm.net.network import Network
from daaswarm.net.spreading import Spreader
from daaswarm.types import ModelRoot, PeerId

ADVERT_S = 5.0  # to dial one host and ask for its adverts; the dead cost this once, all at the same time
DOUBTED_S = 0.5  # ... of one that didn't answer before, or doesn't answer others: enough for one that is back
ASKED_AT_ONCE = 32  # hosts asked for adverts at the same time
ASKED = 256  # hosts asked for adverts at most: more than serve one answer, fewer than a flood of pointers names
UNANSWERED, MODELS = 16, 64  # hosts that are remembered as silent, of so many models: for saying why
ASKING_S = 15.0  # for all of them together: three rounds of hosts that are all dead

LookUp = Callable[[bytes, Want], Awaitable[LookupDone]]

logger = logging.getLogger(__name__)


class Finder:
    """Asks hosts for their adverts, and remembers who didn't answer: nobody is waited for twice.

    Args:
        look_up: asks the DHT.
        get_known: the peers in the routing table.
    """

    def __init__(
        self,
        network: Network,
        notary: Notary,
        spreader: Spreader,
        look_up: LookUp,
        get_known: Callable[[], Iterable[Contact]],
    ) -> None:
        self._network = network
        self._notary = notary
        self._spreader = spreader
        self._membership = spreader.membership
        self._look_up = look_up
        self._get_known = get_known
        self._unanswered: dict[ModelRoot, list[Contact]] = {}  # of the last search

    def get_unanswered(self, root: ModelRoot) -> list[Contact]:
        """Hosts of a model that were asked in the last :meth:`find` and did not answer."""
        return self._unanswered.get(root, [])

    async def get_pointed(self, root: ModelRoot) -> list[Contact]:
        """Whom the DHT points to."""
        found = await self._look_up(bytes.fromhex(root), "records")
        return [Contact(peer_id=pointer.peer_id, addrs=pointer.addrs) for pointer in found.records]

    async def find(self, root: ModelRoot) -> list[Known]:
        """The adverts of all live hosts of a model, each fetched from its host just now; this node's own included.

        Asked are those known from before and the hosts that the swarm points to, :data:`ASKED` at most, connected ones
        first; who doesn't answer is left out. Where there are none, all neighbours are asked.
        """
        book = self._membership.book
        self._spreader.perform(self._membership.follow(root, time.time()))
        contacts = {PeerId(k.advert.peer_id): _get_contact(k) for k in book.get_adverts(root, time.time())}
        contacts |= {PeerId(contact.peer_id): contact for contact in await self.get_pointed(root)}
        if not contacts:
            contacts = {PeerId(k.advert.peer_id): _get_contact(k) for k in await self._spreader.ask(model_root=root)}
        contacts.pop(self._network.peer_id, None)
        self._spreader.perform(self._membership.introduce(root, contacts.values(), time.time()))
        serving: set[PeerId] = set()

        silent: list[Contact] = []

        async def fetch(contact: Contact) -> None:
            if not await self._fetch(contact, root, serving):
                silent.append(contact)

        await self._ask_each(contacts.values(), fetch)
        self._unanswered.pop(root, None)  # the latest goes last
        self._unanswered[root] = silent[:UNANSWERED]
        if len(self._unanswered) > MODELS:
            del self._unanswered[next(iter(self._unanswered))]
        if root in self._membership.own:
            self._membership.own.get_signed(root, time.time())  # signed lately
            serving.add(self._network.peer_id)
        return [known for known in book.get_adverts(root, time.time()) if known.advert.peer_id in serving]

    async def find_all(self, *, name: str = "", tag: str = "", layer: int = -1, expert: int = -1) -> list[Known]:
        """What the peers that this node knows serve, of any model, and what their neighbours tell of others; this
        node's own included. No lookup can ask for that: the swarm's keys are models' roots.

        Of what is told, only what ``name``, ``tag``, ``layer`` and ``expert`` ask for.
        """
        contacts = {PeerId(contact.peer_id): contact for contact in self._get_known()}
        book = self._membership.book
        now = time.time()
        told = [known for root in book.get_models(now) for known in book.get_adverts(root, now)]
        try:
            told += await self._spreader.ask(name=name, tag=tag, layer=layer, expert=expert)
        except LocalProtocolError as error:
            logger.info("the neighbours aren't asked: %s", error)
        for known in told:
            contacts.setdefault(PeerId(known.advert.peer_id), _get_contact(known))
        contacts.pop(self._network.peer_id, None)
        found: list[Known] = []

        async def fetch(contact: Contact) -> None:
            found.extend(await self._fetch_all(contact))

        await self._ask_each(contacts.values(), fetch)
        for root in self._membership.own:
            signed = self._membership.own.get_signed(root, time.time())
            if signed is not None:
                found.append(self._notary.open_advert(signed, time.time()))
        return found

    async def _ask_each(self, contacts: Iterable[Contact], fetch: Callable[[Contact], Awaitable[None]]) -> None:
        """Those in doubt come last, and connected ones first."""

        def get_rank(contact: Contact) -> tuple[bool, bool]:
            peer = PeerId(contact.peer_id)
            return self._membership.get_state(peer) is not State.UP, not self._network.is_connected(peer)

        asked = sorted(contacts, key=get_rank)[:ASKED]
        waiting = iter(asked)

        async def ask_some() -> None:
            for contact in waiting:  # shared by all tasks, so hosts are asked in order
                await fetch(contact)

        with trio.move_on_after(ASKING_S):
            async with trio.open_nursery() as nursery:
                for _ in range(min(ASKED_AT_ONCE, len(asked))):
                    nursery.start_soon(ask_some)

    async def _call(self, contact: Contact, message: GetAdverts) -> list[Signed] | None:
        """Its answer; ``None`` if there was none."""
        peer = PeerId(contact.peer_id)
        deadline_s = ADVERT_S if self._membership.get_state(peer) is State.UP else DOUBTED_S
        try:
            with self._spreader.noting(peer, doubted_s=DOUBTED_S):
                reply, _ = await self._network.call(contact, message, deadline_s=deadline_s)
        except DaaswarmError as error:
            logger.info("%s can't be asked what it serves: %s", peer, error)
            return None
        if not isinstance(reply, Adverts):
            logger.info("%s answered GetAdverts with %s", peer, type(reply).__name__)
            return None
        return reply.adverts

    async def _fetch_all(self, contact: Contact) -> list[Known]:
        """All adverts of one peer, checked; none if it doesn't answer."""
        found: dict[ModelRoot, Known] = {}
        for signed in await self._call(contact, GetAdverts()) or []:
            try:
                known = self._notary.open_advert(signed, time.time())
            except RemoteProtocolError as error:
                logger.info("an advert from %s is refused: %s", contact.peer_id, error)
                continue
            if known.advert.peer_id == contact.peer_id and not known.advert.withdrawn:
                found[ModelRoot(known.advert.model_root)] = known
        return list(found.values())

    async def _fetch(self, contact: Contact, root: ModelRoot, serving: set[PeerId]) -> bool:
        """Ask a host; it joins ``serving`` if it answers that it has the model. Whether it answers."""
        peer = PeerId(contact.peer_id)
        adverts = await self._call(contact, GetAdverts(model_root=root))
        if adverts is None:
            return False
        for signed in adverts:
            if not _is_advert_of(signed, peer, root):
                logger.info("an advert from %s is ignored: it was not asked for", peer)
                continue
            try:
                self._membership.put(signed, time.time())
            except RemoteProtocolError as error:
                logger.info("an advert from %s is refused: %s", peer, error)
            else:
                serving.add(peer)
        if peer not in serving:
            self._membership.book.withdraw(peer, root)  # it says itself that it left; next time it isn't even asked
        return True


def _get_contact(known: Known) -> Contact:
    return Contact(peer_id=known.advert.peer_id, addrs=known.advert.addrs)


def _is_advert_of(signed: Signed, peer: PeerId, root: ModelRoot) -> bool:
    """Whether it says that it is the peer's own advert of that model: others would fill the book with what nobody
    asked for."""
    if get_peer_id(signed.public_key) != peer:
        return False
    try:
        advert = messages.decode(Advert, signed.payload)
    except msgspec.DecodeError:
        return False
    return isinstance(advert, Advert) and advert.model_root == root
