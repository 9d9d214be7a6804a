"""One proven connection, sans-IO: calls both ways, chunks, windows, cancellation.

Bytes in (:meth:`Session.receive`) give events; what is to be written is pulled frame by frame
(:meth:`Session.next_buffers`), small frames between the chunks of large bodies. The client numbers its calls 1, 3, 5,
the server 2, 4, 6. A session has no lock and reads no clock: ``connection.py`` guards it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import cast

import msgspec

from daaswarm import messages
from daaswarm.errors import Busy, ConnectionLost, DeadlineExceeded, RemoteProtocolError
from daaswarm.limits import CALLS_PER_PEER, CHUNK_BYTES, WINDOW_BYTES
from daaswarm.messages import Failure, Reply, Request
from daaswarm.net.failures import UNSUPPORTED
from daaswarm.net.frames import (
    MAX_DEADLINE_MS,
    Buffer,
    Frame,
    FrameParser,
    Kind,
    check_outgoing,
    encode_head,
    get_parts,
    get_size,
)
from daaswarm.net.inbound import InboundBody, InboundBudget
from daaswarm.net.transfers import (
    CallCancelled,
    CallFailed,
    Event,
    Incoming,
    Outgoing,
    Own,
    ReplyReceived,
    RequestReceived,
    Served,
)

LAST_CALL = 2**32 - 2  # ids are u32; a connection that used them up is replaced
CONTROL_BACKLOG = 4 * CALLS_PER_PEER  # unsent windows, cancels and refusals; more: the peer sends but never reads
BUSY_RETRY_S = 0.1  # hint that goes with a refusal for lack of room
SMALL_HEADER_BYTES = 2 * 1024  # up to here not worth counting: CALLS_PER_HOST of them are a few MiB
HEADER_COST = 12  # bytes that one byte of a header may take once decoded: a list of small numbers

_encode = messages.encode
_decode_request = cast("Callable[[bytes], Request]", messages.get_decode(messages.Request))
_decode_reply = cast("Callable[[bytes], Reply]", messages.get_decode(messages.Reply))


class Session:
    """Args:

    is_client: this side dialled; it uses odd call ids.
    budget: shared by all sessions of the node.
    peer: whose share of the budget its bodies take.
    wake: called (from any thread, must not block) when :meth:`grant_windows` should be called.
    """

    def __init__(self, *, is_client: bool, budget: InboundBudget, wake: Callable[[], None], peer: str = "") -> None:
        self._parser = FrameParser()
        self._budget = budget
        self._peer = peer
        self._wake = wake
        self._next_call = 1 if is_client else 2
        self._their_parity = 0 if is_client else 1
        self._their_last = 0
        self._own: dict[int, Own] = {}
        self._served: dict[int, Served] = {}
        self._control: deque[bytes] = deque()
        self._ready: deque[Outgoing] = deque()
        self._outgoing: dict[int, Outgoing] = {}  # all that isn't wholly sent, by call id
        self._blocked: dict[int, int] = {}  # call id -> bytes sent, at the last drop_stalled
        self._frames = 0  # received, at the last drop_stalled
        self._was_unfinished = False  # one was, then
        self._starved: dict[int, Incoming] = {}  # bodies whose next window the budget refused

    @property
    def own_calls(self) -> int:
        return len(self._own)

    @property
    def served_calls(self) -> int:
        return len(self._served)

    # -- sending ----------------------------------------------------------------------------------------------

    def send_request(self, ticket: object, message: Request, body: Sequence[Buffer], deadline_s: float) -> int:
        """Queue a call; ``ticket`` comes back with its reply. The body must not change until it's answered.

        Raises:
            TooLarge: the message or body is over its limit.
            Busy: CALLS_PER_PEER calls are in flight already.
            ConnectionLost: the connection's call ids are used up.
        """
        if len(self._own) >= CALLS_PER_PEER:
            raise Busy(f"{CALLS_PER_PEER} calls to this peer are in flight", retry_after_s=BUSY_RETRY_S)
        call = self._next_call
        if call > LAST_CALL:
            raise ConnectionLost("the connection's call ids are used up", hint="connect again")
        deadline_ms = min(max(1, int(deadline_s * 1000)), MAX_DEADLINE_MS)
        self._queue(Kind.REQUEST, call, deadline_ms, _encode(message), body)
        self._next_call = call + 2
        self._own[call] = Own(ticket)
        return call

    def send_reply(self, call: int, message: Reply, body: Sequence[Buffer] = ()) -> None:
        """Answer a call of the peer's; one that was cancelled ends with this. It counts as served until wholly sent.

        Raises:
            TooLarge: the message or body is over its limit; the call is still to be answered.
        """
        served = self._served.get(call)
        if served is None or call in self._outgoing:
            return
        if served.cancelled:
            self._end_served(call)
            return
        served.checks = 0
        header = _encode(message)
        if len(header) > SMALL_HEADER_BYTES and not self._charge(served, len(header)):
            header = _encode(Failure(code=Busy.code, message="no memory left for answers", retry_after_s=BUSY_RETRY_S))
            body = ()
        self._queue(Kind.REPLY, call, 0, header, body)

    def drop_served(self, call: int) -> None:
        """The work for a call of the peer's has ended and brings no answer. Does nothing when it was answered."""
        if call in self._served and call not in self._outgoing:
            self._end_served(call)

    def cancel(self, call: int) -> object | None:
        """Give up a call of ours; its ticket, or ``None`` when it has ended already."""
        own = self._own.pop(call, None)
        if own is None:
            return None
        self._drop_incoming(call, own.incoming)
        outgoing = self._drop_outgoing(call)
        if outgoing is None or outgoing.first is None:
            self._push(encode_head(Kind.CANCEL, call))
        return own.ticket

    def next_buffers(self) -> list[Buffer] | None:
        """The next frame to write, as buffers; ``None`` when there is nothing to write now."""
        if self._control:
            return [self._control.popleft()]
        if not self._ready:
            return None
        outgoing = self._ready.popleft()
        size = min(outgoing.total - outgoing.sent, CHUNK_BYTES)
        if outgoing.first is not None:
            first, outgoing.first = outgoing.first, None
        else:
            size = min(size, outgoing.granted - outgoing.sent)
            first = encode_head(Kind.BODY, outgoing.call, body=size)
        buffers: list[Buffer] = [first, *outgoing.take(size)]
        if outgoing.sent == outgoing.total:
            self._outgoing.pop(outgoing.call, None)
            if outgoing.call in self._served:
                self._end_served(outgoing.call)
        elif outgoing.sent < outgoing.granted:
            self._ready.append(outgoing)
        return buffers

    def drop_stalled(self) -> bool:
        """Ask every IDLE_PING_S: ``True`` when the peer hoards our memory; close the connection.

        That is when a reply of ours was refused windows, or a frame stayed unfinished, ever since this was asked last.
        A request or reply that is under way for the third time has outlived every deadline: the one is given up, for
        the other the connection has to go.
        """
        for call, served in list(self._served.items()):
            if served.incoming is None and call not in self._outgoing:
                continue
            served.checks += 1
            if served.checks > 2:
                if served.incoming is None:
                    return True
                self._end_served(call)
                self._refuse(call, DeadlineExceeded.code, "the body didn't arrive by the call's deadline")
        frames, self._frames = self._frames, self._parser.frames
        if self._parser.buffered_bytes and frames == self._parser.frames and self._was_unfinished:
            return True
        self._was_unfinished = self._parser.buffered_bytes > 0
        blocked = {
            call: out.sent for call, out in self._outgoing.items() if out.first is None and out.sent >= out.granted
        }
        stalled = any(self._blocked.get(call) == sent for call, sent in blocked.items())
        self._blocked = blocked
        return stalled

    def close(self) -> list[object]:
        """Give everything back; the tickets of our unanswered calls. Calls still at work count until that ends."""
        for call, served in list(self._served.items()):
            if served.incoming is not None or call in self._outgoing:
                self._end_served(call)
            else:
                served.cancelled = True
        tickets: list[object] = []
        for call, own in self._own.items():
            self._drop_incoming(call, own.incoming)
            tickets.append(own.ticket)
        self._own.clear()
        self._outgoing.clear()
        self._ready.clear()
        self._control.clear()
        return tickets

    # -- receiving --------------------------------------------------------------------------------------------

    def receive(self, data: Buffer, events: list[Event]) -> None:
        """Feed received bytes; what they mean is appended to ``events``, also when what follows is refused.

        Raises:
            RemoteProtocolError: the peer broke the protocol; close the connection.
        """
        self._parser.feed(data)
        while (frame := self._parser.next_frame()) is not None:
            kind = frame.kind
            if kind is Kind.REQUEST:
                event = self._on_request(frame)
            elif kind is Kind.REPLY:
                event = self._on_reply(frame)
            elif kind is Kind.BODY:
                event = self._on_body(frame)
            elif kind is Kind.WINDOW:
                event = self._on_window(frame)
            else:
                event = self._on_cancel(frame)
            if event is not None:
                events.append(event)

    def grant_windows(self) -> None:
        """Ask the budget again for the bodies that it refused a window."""
        for call, incoming in list(self._starved.items()):
            self._grant(call, incoming)

    def _on_request(self, frame: Frame) -> Event | None:
        call = frame.call
        if call % 2 != self._their_parity or call <= self._their_last:
            raise RemoteProtocolError(f"call id {call} is out of order (last was {self._their_last})")
        self._their_last = call
        if len(self._served) >= CALLS_PER_PEER:
            return self._refuse(call, Busy.code, f"{CALLS_PER_PEER} of your calls are in flight")
        try:
            message = _decode_request(frame.header)
        except msgspec.DecodeError as error:
            # Not a reason to hang up: a newer peer may know requests that this version doesn't.
            return self._refuse(call, UNSUPPORTED, f"a request that this version can't read: {error}")
        if not self._budget.add_call():
            return self._refuse(call, Busy.code, "this node serves as many calls as it can")
        served = self._served[call] = Served()
        size = len(frame.body)
        header_bytes = len(frame.header)
        cost = header_bytes * HEADER_COST if header_bytes > SMALL_HEADER_BYTES else 0
        if not self._charge(served, size + cost):
            self._end_served(call)
            return self._refuse(call, Busy.code, "no memory left for unfinished bodies")
        deadline_s = frame.deadline_ms / 1000
        if size == frame.total:
            return RequestReceived(call, message, memoryview(frame.body), deadline_s)
        served.incoming = Incoming(message, frame.body, frame.total, deadline_s)
        return None

    def _on_reply(self, frame: Frame) -> Event | None:
        call = frame.call
        self._check_own(call)
        own = self._own.get(call)
        if own is None:
            return None  # cancelled; the answer crossed our CANCEL
        if own.incoming is not None:
            raise RemoteProtocolError(f"a second reply to call {call}")
        self._drop_outgoing(call)  # refused before the whole body was sent
        try:
            message = _decode_reply(frame.header)
        except msgspec.DecodeError as error:
            self._own.pop(call)
            self._push(encode_head(Kind.CANCEL, call))
            text = f"an undecodable reply: {str(error)[:200]}"
            return CallFailed(own.ticket, RemoteProtocolError(text, reject=False))
        if len(frame.body) == frame.total:
            del self._own[call]
            return ReplyReceived(own.ticket, message, memoryview(frame.body))
        incoming = own.incoming = Incoming(message, frame.body, frame.total, 0.0)
        if not self._budget.charge(len(frame.body), None, self._peer):
            own.incoming = None
            return self._abandon(call, own)
        incoming.granted = WINDOW_BYTES
        return None

    def _on_body(self, frame: Frame) -> Event | None:
        call, size = frame.call, len(frame.body)
        theirs = call % 2 == self._their_parity
        if theirs:
            if call > self._their_last:
                raise RemoteProtocolError(f"body of call {call}, which was never made")
            holder: Served | Own | None = self._served.get(call)
        else:
            self._check_own(call)
            holder = self._own.get(call)
        incoming = holder.incoming if holder is not None else None
        if incoming is None:
            if holder is not None:
                raise RemoteProtocolError(f"body of call {call} past its end or before its beginning")
            return None  # refused or cancelled; what was on its way is dropped
        got = len(incoming.body) + size
        if got > incoming.total or got > incoming.granted:
            raise RemoteProtocolError(
                f"call {call}: {got} body bytes, {incoming.total} announced, {incoming.granted} let"
            )
        if isinstance(holder, Served):
            if not self._charge(holder, size, incoming):
                self._end_served(call)
                return self._refuse(call, Busy.code, "no memory left for unfinished bodies")
        elif isinstance(holder, Own) and not self._budget.charge(size, incoming, self._peer):
            return self._abandon(call, holder)
        incoming.body += frame.body
        if got == incoming.total:
            return self._complete(call, incoming, holder)
        if incoming.granted < incoming.total and incoming.granted - got <= WINDOW_BYTES // 2:
            self._grant(call, incoming)
        return None

    def _complete(self, call: int, incoming: Incoming, holder: Served | Own | None) -> Event:
        self._starved.pop(call, None)
        self._budget.forget(incoming, self._peer)
        body = memoryview(incoming.body)
        if isinstance(holder, Own):
            del self._own[call]
            self._budget.release(incoming.total, self._peer)
            return ReplyReceived(holder.ticket, incoming.message, body)  # type: ignore[arg-type]
        assert holder is not None
        holder.incoming = None
        return RequestReceived(call, incoming.message, body, incoming.deadline_s)  # type: ignore[arg-type]

    def _on_window(self, frame: Frame) -> Event | None:
        if frame.call % 2 != self._their_parity:
            self._check_own(frame.call)
        elif frame.call > self._their_last:
            raise RemoteProtocolError(f"window for call {frame.call}, which was never made")
        outgoing = self._outgoing.get(frame.call)
        if outgoing is not None:
            was_stopped = outgoing.first is None and outgoing.sent >= outgoing.granted
            outgoing.granted += frame.total
            if was_stopped:
                self._ready.append(outgoing)
        return None

    def _on_cancel(self, frame: Frame) -> Event | None:
        call = frame.call
        if call % 2 == self._their_parity:
            if call > self._their_last:
                raise RemoteProtocolError(f"cancel of call {call}, which was never made")
            served = self._served.get(call)
            answered = self._drop_outgoing(call) is not None
            if served is None:
                return None
            if answered or served.incoming is not None:
                self._end_served(call)  # no work is going on for it
                return None
            served.cancelled = True
            return CallCancelled(call)
        self._check_own(call)
        own = self._own.pop(call, None)
        if own is None:
            return None
        self._drop_incoming(call, own.incoming)
        self._drop_outgoing(call)
        return CallFailed(own.ticket, ConnectionLost("the peer broke off its answer"))

    # -- parts ------------------------------------------------------------------------------------------------

    def _queue(self, kind: Kind, call: int, deadline_ms: int, header: bytes, body: Sequence[Buffer]) -> None:
        parts = get_parts(body)
        total = get_size(parts)
        check_outgoing(header, total)
        first = encode_head(kind, call, deadline_ms=deadline_ms, header_bytes=len(header), body=total) + header
        outgoing = self._outgoing[call] = Outgoing(call, first, parts, total)
        self._ready.append(outgoing)

    def _push(self, frame: bytes) -> None:
        self._control.append(frame)
        if len(self._control) > CONTROL_BACKLOG:
            raise RemoteProtocolError("the peer sends, but doesn't read what it is answered")

    def _refuse(self, call: int, code: str, message: str) -> None:
        failure = Failure(code=code, message=message[:1000], retry_after_s=BUSY_RETRY_S if code == Busy.code else 0.0)
        header = _encode(failure)
        self._push(encode_head(Kind.REPLY, call, header_bytes=len(header)) + header)

    def _abandon(self, call: int, own: Own) -> CallFailed:
        """Give up a reply that this node has no room for."""
        self._own.pop(call)
        self._drop_incoming(call, own.incoming)
        self._push(encode_head(Kind.CANCEL, call))
        return CallFailed(own.ticket, Busy("no memory left here for unfinished bodies", retry_after_s=BUSY_RETRY_S))

    def _grant(self, call: int, incoming: Incoming) -> None:
        if self._budget.may_grant(incoming, self._wake, self._peer):
            self._starved.pop(call, None)
            incoming.granted += WINDOW_BYTES
            self._push(encode_head(Kind.WINDOW, call, body=WINDOW_BYTES))
        else:
            self._starved[call] = incoming

    def _charge(self, served: Served, size: int, body: InboundBody | None = None) -> bool:
        if size and not self._budget.charge(size, body, self._peer):
            return False
        served.charged += size
        return True

    def _end_served(self, call: int) -> None:
        served = self._served.pop(call)
        self._budget.end_call()
        if served.incoming is not None:
            self._starved.pop(call, None)
            self._budget.forget(served.incoming, self._peer)
        if served.charged:
            self._budget.release(served.charged, self._peer)

    def _drop_incoming(self, call: int, incoming: Incoming | None) -> None:
        if incoming is not None:
            self._starved.pop(call, None)
            self._budget.forget(incoming, self._peer)
            self._budget.release(len(incoming.body), self._peer)

    def _drop_outgoing(self, call: int) -> Outgoing | None:
        outgoing = self._outgoing.pop(call, None)
        if outgoing is not None and outgoing in self._ready:
            self._ready.remove(outgoing)
        return outgoing

    def _check_own(self, call: int) -> None:
        if call % 2 == self._their_parity or call >= self._next_call:
            raise RemoteProtocolError(f"an answer to call {call}, which was never made")
