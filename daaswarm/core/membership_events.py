"""What the shell tells the membership and gossip machines, and what they ask of the shell."""

from __future__ import annotations

import msgspec

from daaswarm.messages import (
    AskSwarm,
    Contact,
    Doubt,
    Doubted,
    Failure,
    Offers,
    Ping,
    Pong,
    PullAdverts,
    Pulled,
    PushAdverts,
    Pushed,
    Signed,
)
from daaswarm.types import ModelRoot, PeerId

Asked = Ping | PushAdverts | PullAdverts | Doubt | AskSwarm
Answered = Pong | Pushed | Pulled | Doubted | Offers | Failure


class RequestReceived(msgspec.Struct, frozen=True, kw_only=True):
    """``peer`` is authenticated. ``contact`` is None for a peer that accepts no connections. The machine answers with
    one :class:`Reply` of this ``request_id``, now or later; the ids of unanswered requests differ."""

    request_id: int
    peer: PeerId
    contact: Contact | None
    message: Asked


class ReplyReceived(msgspec.Struct, frozen=True, kw_only=True):
    rpc_id: int
    message: Answered


class RequestFailed(msgspec.Struct, frozen=True, kw_only=True):
    """No connection, no reply in time, or garbage."""

    rpc_id: int


Event = RequestReceived | ReplyReceived | RequestFailed


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    request_id: int
    message: Answered


class SendRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A contact without addresses: over the connection that there is, or not at all."""

    rpc_id: int
    contact: Contact
    message: Asked
    deadline_s: float


class WantMembers(msgspec.Struct, frozen=True, kw_only=True):
    """Look up who serves the model (in the DHT), and :meth:`~daaswarm.core.membership.Membership.introduce` them."""

    root: ModelRoot


class Doubtful(msgspec.Struct, frozen=True, kw_only=True):
    """``peer`` didn't answer, here or elsewhere: whoever waits for it need not wait long."""

    peer: PeerId


class QueryDone(msgspec.Struct, frozen=True, kw_only=True):
    """``found``: as signed, checked. ``asked``: how many nodes were asked, as far as they say."""

    query_id: str
    found: list[Signed]
    asked: int


class Misbehaved(msgspec.Struct, frozen=True, kw_only=True):
    """``peer`` sent what no honest peer sends; the shell may score it."""

    peer: PeerId
    reason: str


Effect = Reply | SendRequest | WantMembers | Doubtful | QueryDone | Misbehaved
