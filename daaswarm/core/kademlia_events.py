"""What the shell tells the Kademlia machine, and what the machine asks of the shell."""

from __future__ import annotations

import msgspec

from daaswarm.messages import Contact, Failure, FindNode, FindValue, Found, Pointer, Store, Stored
from daaswarm.types import PeerId

REQUEST_S = 5.0  # of one request, dialling included; an honest peer answers within two round trips


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


Event = RequestReceived | ReplyReceived | RequestFailed


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    request_id: int
    message: Found | Stored


class SendRequest(msgspec.Struct, frozen=True, kw_only=True):
    rpc_id: int
    contact: Contact
    message: FindNode | FindValue | Store
    deadline_s: float = REQUEST_S


class LookupDone(msgspec.Struct, frozen=True, kw_only=True):
    """``contacts``: the nearest that answered, nearest first. ``records``: checked, one per publisher."""

    lookup_id: str
    contacts: list[Contact]
    records: list[Pointer]


class PublishDone(msgspec.Struct, frozen=True, kw_only=True):
    """``stored``: how many other nodes keep the record now; ``asked``: how many were asked to."""

    key: bytes
    stored: int
    asked: int


class Misbehaved(msgspec.Struct, frozen=True, kw_only=True):
    """``peer`` sent what no honest peer sends; the shell may score it."""

    peer: PeerId
    reason: str


Effect = Reply | SendRequest | LookupDone | PublishDone | Misbehaved
