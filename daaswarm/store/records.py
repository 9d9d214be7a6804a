"""What the database keeps, one struct per table. Times are Unix time in seconds."""

from __future__ import annotations

from typing import Literal

import msgspec

from daaswarm.messages import Contact, Signed
from daaswarm.types import Dtype, ModelRoot, PeerId

SECONDS_PER_HOUR = 3600

Direction = Literal["served", "asked"]


class PeerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A peer that this node has talked to.

    Attributes:
        failures: calls that failed in a row, when last written.
    """

    peer_id: PeerId
    addrs: list[str]
    agent: str = ""
    first_seen: float
    last_seen: float
    failures: int = 0

    @property
    def contact(self) -> Contact:
        return Contact(peer_id=self.peer_id, addrs=self.addrs)


class AdvertRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An advert as it was signed. Whoever reads it checks the signature again: a disk is not to be believed either."""

    peer_id: PeerId
    model_root: ModelRoot
    seq: int
    expires_at: float
    signed: Signed


class ModelRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A model in a folder of the user's own, outside the cache, that was used."""

    folder: str
    model_root: ModelRoot
    name: str
    kind: str
    used_at: float


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """Experts that this node serves whenever it runs.

    Attributes:
        source: what the model is found by again: a name or an absolute path.
        held: ``{layer: [experts]}``, ascending.
    """

    model_root: ModelRoot
    dtype: Dtype
    name: str
    source: str
    held: dict[int, list[int]]
    created_at: float


class CallSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Expert calls of one hour, of one peer and model.

    Attributes:
        hour: Unix time divided by 3600.
        direction: ``served`` to the peer, or ``asked`` of it.
        peer_id: empty for those beyond the limit, together.
        bytes_in: bodies that this node received; ``bytes_out``: that it sent.
        failures: calls without a good answer; not counted in ``calls``.
    """

    hour: int
    direction: Direction
    peer_id: str
    model_root: str
    calls: int = 0
    rows: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    failures: int = 0
