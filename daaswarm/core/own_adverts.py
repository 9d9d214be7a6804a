"""What this node says of itself: one advert a model, signed anew in time, with sequence numbers that only grow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec

from daaswarm.core.adverts import ADVERTS_PER_PEER, AdvertBook, Known
from daaswarm.core.notary import Notary
from daaswarm.core.signing import MAX_TTL_S
from daaswarm.core.topics import Topics
from daaswarm.errors import LocalProtocolError, RemoteProtocolError
from daaswarm.messages import Advert, Signed
from daaswarm.types import ModelRoot

RESIGN_S = MAX_TTL_S / 3  # own adverts are signed anew this often; two renewals may be lost
FIRST_SEQ_GAP = 1_000  # above a seq of a former life of this node's key, whose clock was ahead


class OwnAdverts:
    """Each advert that is signed goes into the book too."""

    def __init__(self, notary: Notary, book: AdvertBook, topics: Topics) -> None:
        self._notary = notary
        self._book = book
        self._topics = topics
        self._adverts: dict[ModelRoot, Advert] = {}
        self._signed: dict[ModelRoot, tuple[Signed, float]] = {}  # and when
        self._seq = 0  # of the advert signed last

    def __contains__(self, root: object) -> bool:
        return root in self._adverts

    def __iter__(self) -> Iterator[ModelRoot]:
        return iter(list(self._adverts))

    def get(self, root: ModelRoot) -> Advert | None:
        """As it was given."""
        return self._adverts.get(root)

    def get_signed(self, root: ModelRoot, now: float) -> Signed | None:
        """Signed lately; ``None`` if this node serves nothing of the model."""
        if root not in self._adverts:
            return None
        if abs(now - self._signed[root][1]) > RESIGN_S:  # abs: the clock may have been set back
            self.sign(root, now)
        return self._signed[root][0]

    def put(self, advert: Advert, now: float) -> None:
        """``seq`` and ``expires_at`` are set here.

        Raises:
            LocalProtocolError: this node serves as many models as one peer may.
        """
        root = ModelRoot(advert.model_root)
        if root not in self._adverts and len(self._adverts) >= ADVERTS_PER_PEER:
            raise LocalProtocolError(f"a node serves at most {ADVERTS_PER_PEER} models")
        self._adverts[root] = advert
        self.sign(root, now)

    def remove(self, root: ModelRoot, now: float) -> Signed:
        """The tombstone. It lives as long as the advert would have, so that no replay revives it."""
        del self._signed[root]
        return self._bury(self._adverts.pop(root), now)

    def sign(self, root: ModelRoot, now: float) -> None:
        """Anew, with a higher ``seq``."""
        self._signed[root] = self._seal(self._adverts[root], now), now

    def sign_due(self, now: float) -> None:
        """Those that were signed long ago."""
        for root in self:
            self.get_signed(root, now)

    def set_load(self, load: float, now: float) -> None:
        """Signs all anew with the load of this moment: for one who asks, so it isn't told to anybody else."""
        for root, advert in self._adverts.items():
            if advert.load != load:
                self._adverts[root] = msgspec.structs.replace(advert, load=load)
                self.sign(root, now)

    def outbid(self, advert: Advert, now: float) -> bool:
        """Others know something newer of this node, from before it was restarted: what holds now is signed above it.
        False if that is what they know already."""
        root = ModelRoot(advert.model_root)
        self._seq = max(self._seq, advert.seq + FIRST_SEQ_GAP)
        if root in self._adverts:
            self.sign(root, now)
        elif not advert.withdrawn:
            self._bury(advert, now)
        else:
            return False
        return True

    def shift(self, by_s: float) -> None:
        """The clock was set by so much."""
        self._signed = {root: (signed, at + by_s) for root, (signed, at) in self._signed.items()}

    def validate(self) -> None:
        """Asserts the invariants."""
        assert self._adverts.keys() == self._signed.keys() <= self._topics.followed.keys()
        assert len(self._adverts) <= ADVERTS_PER_PEER

    def _bury(self, advert: Advert, now: float) -> Signed:
        return self._seal(msgspec.structs.replace(advert, held={}, withdrawn=True), now)

    def _seal(self, advert: Advert, now: float) -> Signed:
        self._seq = max(self._seq + 1, int(now * 1000))  # grows also when the clock is set back
        fresh = msgspec.structs.replace(advert, seq=self._seq, expires_at=now + MAX_TTL_S)
        known = Known(fresh, self._notary.seal_advert(fresh))
        with contextlib.suppress(RemoteProtocolError):  # the book is full of others' adverts; theirs has room
            self._book.keep(known)
            self._topics.note_advert(known)
        return known.signed
