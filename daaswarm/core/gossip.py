"""Questions to the whole swarm: who serves this model, tag or expert, with what load and price?

For what the DHT has no key for. A query, signed by its asker, goes from neighbour to neighbour while its hops last;
each node says what it serves or knows, and asks others only for what is still missing. **Answers go back the way the
query came**, as replies over connections that are there: nobody is ever dialled, or sent a byte, on a stranger's word,
so a query can't be turned against a third party. What comes back are signed adverts, checked by each node on the way.

Sans-IO, in the shape of :class:`~daaswarm.core.membership.Membership`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import msgspec

from daaswarm.core.adverts import Known, from_bitmap, has_tag
from daaswarm.core.membership import Membership
from daaswarm.core.membership_events import (
    Effect,
    Event,
    Misbehaved,
    QueryDone,
    Reply,
    ReplyReceived,
    RequestReceived,
)
from daaswarm.core.notary import Notary
from daaswarm.core.outbox import Outbox
from daaswarm.core.quotas import Quotas
from daaswarm.core.rng import Rng, pick
from daaswarm.errors import LocalProtocolError, RemoteProtocolError
from daaswarm.messages import Advert, AskSwarm, Contact, Failure, Offers, Query, Signed
from daaswarm.types import ModelRoot, PeerId

HOPS = 3  # of a query
FANOUT = 4  # neighbours that each asks: 4 + 16 + 64 nodes at most
WAIT_S = 6.0  # that an asker waits; each node on the way leaves HOP_S of it for the way back
HOP_S = 1.0
QUERY_TTL_S = 60.0
SEEN = 4_096  # queries remembered, so that each is answered once
ASKING = 256  # queries under way in one node; beyond, it answers with what it knows itself
OFFERS = 64  # adverts in one answer
OFFER_BYTES = 256 * 1024  # of one answer
LOAD_S = 30.0  # how old the load in an own advert may be when it is offered
QUERIES_PER_S, QUERIES_BURST = 2.0, 32.0  # handed on by one neighbour
ORIGINS_PER_S, ORIGINS_BURST = 0.1, 8.0  # of one asker, whoever brings them


class _Asking(msgspec.Struct, eq=False):
    """``request_id``: whom to answer; ``None`` for this node's own."""

    query: Query
    wanted: int
    until: float
    request_id: int | None
    query_id: str
    out: int = 0
    asked: int = 1
    size: int = 0
    found: dict[tuple[PeerId, ModelRoot], Known] = {}


class _Note(msgspec.Struct, frozen=True):
    asking: _Asking
    peer: PeerId


class Gossip:
    """One node's part.

    Args:
        membership: what is served here, and known of others.
        get_neighbours: whom to ask; contacts of the routing table, connected ones first or not as the caller likes.
        get_load: calls that wait in this node now.
    """

    def __init__(
        self,
        notary: Notary,
        membership: Membership,
        rng: Rng,
        get_neighbours: Callable[[], Sequence[Contact]],
        get_load: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.peer_id = notary.peer_id
        self._notary = notary
        self._membership = membership
        self._rng = rng
        self._get_neighbours = get_neighbours
        self._get_load = get_load
        self._outbox: Outbox[_Note] = Outbox()
        self._seen: OrderedDict[tuple[str, bytes], None] = OrderedDict()
        self._asking: list[_Asking] = []
        self._neighbours = Quotas(QUERIES_PER_S, QUERIES_BURST)
        self._origins = Quotas(ORIGINS_PER_S, ORIGINS_BURST)
        self._loaded_at = 0.0

    def ask(
        self,
        query_id: str,
        now: float,
        *,
        model_root: str = "",
        name: str = "",
        tag: str = "",
        layer: int = -1,
        expert: int = -1,
        wanted: int = OFFERS,
    ) -> list[Effect]:
        """Ends in one :class:`QueryDone` with this ``query_id``, after :data:`WAIT_S` at the latest.

        Raises:
            LocalProtocolError: too many queries are under way.
        """
        if len(self._asking) >= ASKING:
            raise LocalProtocolError(f"{ASKING} queries are under way")
        query = Query(
            peer_id=self.peer_id,
            nonce=self._rng.getrandbits(128).to_bytes(16, "big"),
            model_root=model_root,
            name=name,
            tag=tag,
            layer=layer,
            expert=expert,
            expires_at=now + QUERY_TTL_S,
        )
        self._note_seen(query)
        asking = _Asking(query, wanted, now + WAIT_S, None, query_id)
        self._find(asking, now)
        return self._hand_on(asking, self._notary.seal_query(query), HOPS, None, now)

    def tick(self, now: float) -> list[Effect]:
        """Ends what has waited long enough."""
        effects: list[Effect] = []
        for asking in [asking for asking in self._asking if asking.until <= now]:
            effects += self._finish(asking)
        return effects

    def handle(self, event: Event, now: float) -> list[Effect]:
        """One event in, effects out. Late or unknown ``rpc_id``s are nobody's fault and change nothing."""
        if isinstance(event, RequestReceived):
            return self._on_request(event, now)
        note = self._outbox.take(event.rpc_id)
        if note is None or note.asking not in self._asking:
            return []
        effects: list[Effect] = []
        asking = note.asking
        asking.out -= 1
        if isinstance(event, ReplyReceived) and isinstance(event.message, Offers):
            asking.asked = min(asking.asked + event.message.asked, 1 << 20)
            effects += self._take(asking, event.message.adverts, note.peer, now)
        if not asking.out or len(asking.found) >= asking.wanted:
            effects += self._finish(asking)
        return effects

    def shift(self, by_s: float) -> None:
        """The clock was set by so much."""
        self._neighbours.shift(by_s)
        self._origins.shift(by_s)
        self._loaded_at += by_s
        for asking in self._asking:
            asking.until += by_s

    def validate(self) -> None:
        """Asserts the invariants."""
        assert len(self._seen) <= SEEN and len(self._asking) <= ASKING
        self._neighbours.validate()
        self._origins.validate()
        for asking in self._asking:
            assert asking.out > 0 and len(asking.found) < asking.wanted
            assert asking.size <= OFFER_BYTES

    def _on_request(self, event: RequestReceived, now: float) -> list[Effect]:
        message = event.message
        if not isinstance(message, AskSwarm):
            failure = Failure(code="unsupported", message=f"{type(message).__name__} is no query")
            return [Reply(request_id=event.request_id, message=failure)]
        wait_s = self._neighbours.take(event.peer, now)
        if wait_s:
            return [_refuse(event.request_id, "from this peer", wait_s)]
        try:
            query = self._notary.open_query(message.query, now)
        except RemoteProtocolError as error:
            failure = Failure(code="remote_protocol_error", message=error.message[:1000])
            reply = Reply(request_id=event.request_id, message=failure)
            return [Misbehaved(peer=event.peer, reason=error.message), reply] if error.reject else [reply]
        if (query.peer_id, query.nonce) in self._seen:
            return [Reply(request_id=event.request_id, message=Offers(asked=0))]
        wait_s = self._origins.take(PeerId(query.peer_id), now)
        if wait_s:
            return [_refuse(event.request_id, f"of {query.peer_id}", wait_s)]
        self._note_seen(query)
        until = now + min(max(message.wait_s, 0.0), WAIT_S) - HOP_S
        asking = _Asking(query, min(message.wanted, OFFERS), until, event.request_id, "")
        self._find(asking, now)
        return self._hand_on(asking, message.query, min(message.hops, HOPS), event.peer, now)

    def _find(self, asking: _Asking, now: float) -> None:
        """What this node serves or knows that matches."""
        query = asking.query
        own = [root for root in self._membership.own if query.model_root in ("", root)]
        if own and now - self._loaded_at >= LOAD_S:
            self._loaded_at = now
            self._membership.own.set_load(self._get_load(), now)
        book = self._membership.book
        # What is served here first: that is told by who knows best.
        for root in own:
            known = book.get(self.peer_id, root)
            if known is not None:
                self._add(asking, known)
        for root in self._membership.topics.followed:  # of others the book may be old
            if query.model_root not in ("", root):
                continue
            for known in self._membership.get_adverts(root, now):
                self._add(asking, known)

    def _add(self, asking: _Asking, known: Known) -> None:
        advert = known.advert
        size = len(known.signed.payload) + 128
        if len(asking.found) >= asking.wanted or asking.size + size > OFFER_BYTES or not matches(advert, asking.query):
            return
        key = PeerId(advert.peer_id), ModelRoot(advert.model_root)
        before = asking.found.get(key)
        if before is None or before.advert.seq < advert.seq:
            asking.size += size - (len(before.signed.payload) + 128 if before is not None else 0)
            asking.found[key] = known

    def _take(self, asking: _Asking, adverts: Iterable[Signed], peer: PeerId, now: float) -> list[Effect]:
        for signed in adverts:
            try:
                said = self._notary.peek_advert(signed)
                before = asking.found.get((PeerId(said.peer_id), ModelRoot(said.model_root)))
                if before is not None and before.advert.seq >= said.seq:
                    continue
                known = self._notary.open_advert(signed, now)
            except RemoteProtocolError as error:
                if error.reject:
                    return [Misbehaved(peer=peer, reason=error.message)]
                continue
            if not known.advert.withdrawn:
                self._add(asking, known)
        return []

    def _hand_on(self, asking: _Asking, signed: Signed, hops: int, sender: PeerId | None, now: float) -> list[Effect]:
        wait_s = asking.until - now
        missing = asking.wanted - len(asking.found)
        if hops <= 0 or missing <= 0 or wait_s <= 0 or len(self._asking) >= ASKING:
            return self._finish(asking)
        not_asked = (sender, asking.query.peer_id, self.peer_id)
        others = [contact for contact in self._get_neighbours() if contact.peer_id not in not_asked]
        chosen = pick(self._rng, others, FANOUT)
        if not chosen:
            return self._finish(asking)
        asking.out = len(chosen)
        self._asking.append(asking)
        message = AskSwarm(query=signed, hops=hops - 1, wanted=missing, wait_s=wait_s)
        return [
            self._outbox.send(contact, message, wait_s, _Note(asking, PeerId(contact.peer_id))) for contact in chosen
        ]

    def _finish(self, asking: _Asking) -> list[Effect]:
        if asking in self._asking:
            self._asking.remove(asking)
        found = [known.signed for known in asking.found.values()]
        if asking.request_id is None:
            return [QueryDone(query_id=asking.query_id, found=found, asked=asking.asked)]
        return [Reply(request_id=asking.request_id, message=Offers(adverts=found, asked=asking.asked))]

    def _note_seen(self, query: Query) -> None:
        self._seen[query.peer_id, query.nonce] = None
        if len(self._seen) > SEEN:
            self._seen.popitem(last=False)


def matches(advert: Advert, query: Query) -> bool:
    """Whether an advert is an answer. A name is compared without case; a root may be named by its beginning."""
    if query.model_root and advert.model_root != query.model_root:
        return False
    if query.name:
        name = query.name.lower()
        is_prefix = len(name) >= 6 and advert.model_root.startswith(name)
        if advert.model_name.lower() != name and not is_prefix:
            return False
    if query.tag and not has_tag(advert, query.tag):
        return False
    if query.layer >= 0 or query.expert >= 0:
        bitmaps = [advert.held.get(query.layer, b"")] if query.layer >= 0 else list(advert.held.values())
        return any(bitmap and (query.expert < 0 or query.expert in from_bitmap(bitmap)) for bitmap in bitmaps)
    return True


def _refuse(request_id: int, whose: str, wait_s: float) -> Reply:
    failure = Failure(code="busy", message=f"too many queries {whose}", retry_after_s=round(wait_s, 3))
    return Reply(request_id=request_id, message=failure)
