"""Who serves a model, asked of the hosts themselves: no answer is begun with one that died unnoticed."""

from __future__ import annotations

import heapq
import logging
import math
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
from daaswarm.errors import DaaswarmError, LocalProtocolError, RemoteProtocolError, unwrap_groups
from daaswarm.messages import Advert, Adverts, Contact, GetAdverts, Pointer, Signed
from daaswarm.net.network import Network
from daaswarm.net.spreading import Spreader
from daaswarm.types import ModelRoot, PeerId

ADVERT_S = 5.0  # to dial one host and ask for its adverts; the dead cost this once, all at the same time
DOUBTED_S = 0.5  # ... of one that didn't answer before, or doesn't answer others: enough for one that is back
ASKED_AT_ONCE = 32  # hosts asked for adverts at the same time
ASKED = 256  # hosts asked for adverts at most: more than serve one answer, fewer than a flood of pointers names
UNANSWERED, MODELS = 16, 64  # hosts that are remembered as silent, of so many models: for saying why
ADDRS = 8  # of one host that are tried; a contact has no more
ASKING_S = 15.0  # for all of them together: three rounds of hosts that are all dead
REST_S = 0.5  # for the others once enough have answered, or as long again as that took: the far ones are wanted least

OnRecords = Callable[[list[Pointer]], object]
LookUp = Callable[[bytes, Want, OnRecords | None], Awaitable[LookupDone]]
IsEnough = Callable[[list[Known]], bool]
"""Whether these adverts do."""
Rank = tuple[bool, bool]

logger = logging.getLogger(__name__)


class _Asking:
    """Asks hosts as they become known, :data:`ASKED_AT_ONCE` at a time, those that rank first first.

    Attributes:
        contacts: all that were added.
    """

    def __init__(
        self,
        own: PeerId,
        nursery: trio.Nursery,
        ask: Callable[[Contact], Awaitable[object]],
        get_rank: Callable[[PeerId], Rank],
    ) -> None:
        self.contacts: dict[PeerId, Contact] = {}
        self._own, self._nursery, self._ask, self._get_rank = own, nursery, ask, get_rank
        self._waiting: list[tuple[Rank, int, PeerId]] = []  # a heap
        self._open: set[PeerId] = set()  # in it, or being asked
        self._asked = self._pushed = self._workers = 0

    def add(self, contacts: Iterable[Contact]) -> None:
        """Those that aren't known yet are asked, in their turn; those with an address that wasn't known, once more."""
        for contact in contacts:
            peer = PeerId(contact.peer_id)
            known = self.contacts.get(peer)
            if known is not None and known.addrs != contact.addrs:
                addrs = [*contact.addrs, *(addr for addr in known.addrs if addr not in contact.addrs)]
                contact = Contact(peer_id=peer, addrs=addrs[:ADDRS])
            if peer == self._own or (known is not None and set(contact.addrs) <= set(known.addrs)):
                continue
            self.contacts[peer] = contact
            if peer not in self._open:
                self._push(peer)
        for _ in range(min(len(self._waiting), ASKED_AT_ONCE - self._workers)):
            self._workers += 1
            self._nursery.start_soon(self._work)

    def _push(self, peer: PeerId) -> None:
        self._open.add(peer)
        self._pushed += 1
        heapq.heappush(self._waiting, (self._get_rank(peer), self._pushed, peer))

    async def _work(self) -> None:
        while self._waiting and self._asked < ASKED:
            self._asked += 1
            peer = heapq.heappop(self._waiting)[2]
            contact = self.contacts[peer]
            await self._ask(contact)
            self._open.remove(peer)
            if self.contacts[peer] is not contact:
                self._push(peer)
        self._workers -= 1


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
        found = await self._look_up(bytes.fromhex(root), "records", None)
        return _get_pointed(found.records)

    async def find(self, root: ModelRoot, is_enough: IsEnough | None = None) -> list[Known]:
        """The adverts of all live hosts of a model, each fetched from its host just now; this node's own included.

        Asked are those known from before and the hosts that the swarm points to, as soon as it does, :data:`ASKED` at
        most, connected ones first; who doesn't answer is left out. Where there are none, all neighbours are asked. When
        ``is_enough`` says so of those that have answered, the others are waited for :data:`REST_S` longer, or as long
        again as it took.
        """
        membership, started = self._membership, trio.current_time()
        self._spreader.perform(membership.follow(root, time.time()))
        serving: set[PeerId] = set()
        if root in membership.own:
            membership.own.get_signed(root, time.time())  # signed lately
            serving.add(self._network.peer_id)
        silent: list[Contact] = []

        def get_found() -> list[Known]:
            return [
                known for known in membership.book.get_adverts(root, time.time()) if known.advert.peer_id in serving
            ]

        async def fetch(contact: Contact) -> None:
            if contact.peer_id in serving:
                return
            if not await self._fetch(contact, root, serving):
                silent.append(contact)
            elif is_enough is not None and enough.deadline == math.inf and is_enough(get_found()):
                enough.deadline = trio.current_time() + max(REST_S, trio.current_time() - started)

        with unwrap_groups(), trio.CancelScope() as enough:
            async with trio.open_nursery() as nursery:
                asking = _Asking(self._network.peer_id, nursery, fetch, self._get_rank)
                asking.add(_get_contact(known) for known in membership.book.get_adverts(root, time.time()))
                found = await self._look_up(
                    bytes.fromhex(root), "records", lambda records: asking.add(_get_pointed(records))
                )
                asking.add(_get_pointed(found.records))
                if not asking.contacts:
                    asking.add(_get_contact(known) for known in await self._spreader.ask(model_root=root))
                nursery.cancel_scope.deadline = trio.current_time() + ASKING_S
        self._spreader.perform(membership.introduce(root, asking.contacts.values(), time.time()))
        self._unanswered.pop(root, None)  # the latest goes last
        self._unanswered[root] = [contact for contact in silent if contact.peer_id not in serving][:UNANSWERED]
        if len(self._unanswered) > MODELS:
            del self._unanswered[next(iter(self._unanswered))]
        return get_found()

    async def find_all(self, *, name: str = "", tag: str = "", layer: int = -1, expert: int = -1) -> list[Known]:
        """What the peers that this node knows serve, of any model, and what their neighbours tell of others; this
        node's own included. No lookup can ask for that: the swarm's keys are models' roots.

        Of what is told, only what ``name``, ``tag``, ``layer`` and ``expert`` ask for.
        """
        contacts = list(self._get_known())
        book = self._membership.book
        now = time.time()
        told = [known for root in book.get_models(now) for known in book.get_adverts(root, now)]
        try:
            told += await self._spreader.ask(name=name, tag=tag, layer=layer, expert=expert)
        except LocalProtocolError as error:
            logger.info("the neighbours aren't asked: %s", error)
        found: list[Known] = []

        async def fetch(contact: Contact) -> None:
            found.extend(await self._fetch_all(contact))

        with trio.move_on_after(ASKING_S):
            async with trio.open_nursery() as nursery:
                asking = _Asking(self._network.peer_id, nursery, fetch, self._get_rank)
                asking.add([*contacts, *map(_get_contact, told)])
        for root in self._membership.own:
            signed = self._membership.own.get_signed(root, time.time())
            if signed is not None:
                found.append(self._notary.open_advert(signed, time.time()))
        return found

    def _get_rank(self, peer: PeerId) -> Rank:
        """Those in doubt come last, and connected ones first."""
        return self._membership.get_state(peer) is not State.UP, not self._network.is_connected(peer)

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


def _get_pointed(records: Iterable[Pointer]) -> list[Contact]:
    return [Contact(peer_id=pointer.peer_id, addrs=pointer.addrs) for pointer in records]


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
