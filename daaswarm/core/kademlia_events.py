"""What the shell tells the Kademlia machine, and what the machine asks of the shell."""

from __future__ import annotations

import msgspec

from daaswarm.messages import Contact, Failure, FindNode, FindValue, Found, Pointer, Store, Stored
from daaswarm.types import PeerId

REQUEST_S = 5.0  # of one request, dialling included; an honest peer answers within two round trips
LATE_S = 0.5  # after which a lookup asks somebody else as well: dialling and asking the far side of the earth fits in


class RequestReceived(msgspec.Struct, frozen=True, kw_only=True):
    """``peer`` is authenticated. ``contact`` is None for a peer that accepts no connections."""

    request_id: int
    peer: PeerId
    contact: Contact | None
    message: FindNode | FindValue | Store


class ReplyReceived(msgspec.Struct, frozen=True, kw_only=True):
    rpc_id: int
    message: Found | Stored | Failure


class RequestFailed(msgspec.Struct, frozen=True, kw_only=True):
    """No connection, no reply in time, or garbage."""

    rpc_id: int


class RequestLate(msgspec.Struct, frozen=True, kw_only=True):
    """No answer after ``late_s``; it's still waited for, and one of the two other events follows."""

    rpc_id: int


Event = RequestReceived | ReplyReceived | RequestFailed | RequestLate


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    request_id: int
    message: Found | Stored


class SendRequest(msgspec.Struct, frozen=True, kw_only=True):
    rpc_id: int
    contact: Contact
    message: FindNode | FindValue | Store
    deadline_s: float = REQUEST_S
    late_s: float | None = None  # if set, :class:`RequestLate` is wanted after this


class RecordsFound(msgspec.Struct, frozen=True, kw_only=True):
    """What a running lookup has found, as it comes: checked, with addresses, and not told before."""

    lookup_id: str
    records: list[Pointer]


class LookupDone(msgspec.Struct, frozen=True, kw_only=True):
    """``contacts``: the nearest that answered, nearest first. ``records``: checked, one per publisher. ``hops``:
    requests one after the other until the first record came (0 if it was here), or the nearest contact answered."""

    lookup_id: str
    contacts: list[Contact]
    records: list[Pointer]
    hops: int = 0
    requests: int = 0


class PublishDone(msgspec.Struct, frozen=True, kw_only=True):
    """``stored``: how many other nodes keep the record now; ``asked``: how many were asked to; ``refused``: what those
    said who refused, and how often. Who didn't answer is in none but ``asked``."""

    key: bytes
    stored: int
    asked: int
    refused: dict[str, int] = {}


class Misbehaved(msgspec.Struct, frozen=True, kw_only=True):
    """``peer`` sent what no honest peer sends; the shell may score it."""

    peer: PeerId
    reason: str


Effect = Reply | SendRequest | RecordsFound | LookupDone | PublishDone | Misbehaved
