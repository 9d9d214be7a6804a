from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from net_helpers import get_call

from daaswarm import messages
from daaswarm.errors import Busy, ConnectionLost, RemoteProtocolError
from daaswarm.limits import CALL_BODY_BYTES, CALLS_PER_PEER, CHUNK_BYTES, MIB, WINDOW_BYTES
from daaswarm.messages import ExpertReply, Failure, FindNode, Found, Ping, Pong, Signed, Store
from daaswarm.net.frames import HEAD_BYTES, Kind, encode_head
from daaswarm.net.inbound import InboundBudget
from daaswarm.net.session import Session
from daaswarm.net.transfers import CallCancelled, CallFailed, ReplyReceived, RequestReceived


class Pair:
    """A client and a server session, joined by hand."""

    def __init__(self, budget: InboundBudget | None = None) -> None:
        self.woken = 0
        self.budget = budget or InboundBudget()
        self.client = Session(is_client=True, budget=InboundBudget(), wake=lambda: None)
        self.server = Session(is_client=False, budget=self.budget, wake=self.wake)

    def wake(self) -> None:
        self.woken += 1

    def move(self, source: Session, target: Session, *, frames: int = 10**6) -> list:
        events: list = []
        while frames and (buffers := source.next_buffers()) is not None:
            target.receive(b"".join(buffers), events)
            frames -= 1
        return events

    def settle(self) -> tuple[list, list]:
        """Until nothing moves: (events at the client, events at the server)."""
        at_client: list = []
        at_server: list = []
        while True:
            up, down = self.move(self.client, self.server), self.move(self.server, self.client)
            at_server += up
            at_client += down
            sessions = (self.client, self.server)
            if not up and not down and not any(session._control or session._ready for session in sessions):
                return at_client, at_server


def get_frames(session: Session) -> list[bytes]:
    frames = []
    while (buffers := session.next_buffers()) is not None:
        frames.append(b"".join(buffers))
    return frames


def test_a_small_call_is_one_frame_each_way():
    pair = Pair()
    pair.client.send_request("t", get_call(), [b"ab", b"cd"], 1.5)
    [frame] = get_frames(pair.client)
    events: list = []
    pair.server.receive(frame, events)
    [request] = events
    assert request == RequestReceived(1, get_call(), memoryview(b"abcd"), 1.5)
    assert not request.body.readonly
    pair.server.send_reply(1, ExpertReply(rows=1, hidden=1), [b"xyz"])
    [frame] = get_frames(pair.server)
    events = []
    pair.client.receive(frame, events)
    assert events == [ReplyReceived("t", ExpertReply(rows=1, hidden=1), memoryview(b"xyz"))]
    assert pair.budget.calls == pair.budget.used_bytes == pair.client.own_calls == pair.server.served_calls == 0


def test_a_large_body_does_not_starve_a_small_call():
    pair = Pair()
    pair.client.send_request("big", get_call(), [bytes(3 * WINDOW_BYTES)], 30)
    assert pair.client.next_buffers() is not None
    pair.client.send_request("small", Ping(), (), 1)
    kinds = [frame[1] for frame in get_frames(pair.client)]
    assert kinds.index(Kind.REQUEST) <= 1  # right behind the next chunk
    assert len(kinds) == WINDOW_BYTES // CHUNK_BYTES  # no further than the window


def test_a_large_body_arrives_whole_and_is_given_back():
    pair = Pair()
    body = bytes(range(256)) * (3 * WINDOW_BYTES // 256) + b"end"
    pair.client.send_request("big", get_call(), [body[:1000], body[1000:]], 30)
    _, [request] = pair.settle()
    assert request.body == body
    assert pair.budget.used_bytes == len(body)  # the host still holds it
    pair.server.send_reply(request.call, ExpertReply(rows=1, hidden=1), [request.body])
    [reply], _ = pair.settle()
    assert reply.body == body
    assert pair.budget.used_bytes == 0 and not pair.client._outgoing and not pair.server._outgoing


def test_bodies_beyond_the_budget_are_refused_by_name_and_windows_wait_their_turn():
    budget = InboundBudget(limit_bytes=2 * WINDOW_BYTES)
    pair = Pair(budget)
    for ticket in ("a", "b", "c"):
        pair.client.send_request(ticket, get_call(), [bytes(WINDOW_BYTES + 1)], 30)
    at_client, at_server = pair.settle()
    refused = [event.ticket for event in at_client]
    assert all(event.message.code == "busy" for event in at_client)
    served = len(at_server)
    assert refused and len(refused) + served + pair.client.own_calls - served == 3
    for event in at_server:
        pair.server.send_reply(event.call, Found())
    for _ in range(5):
        pair.server.grant_windows()
        _, more = pair.settle()
        for event in more:
            pair.server.send_reply(event.call, Found())
    assert pair.client.own_calls == 0
    assert budget.used_bytes == budget.calls == 0 and not budget._waiting


def test_cancel():
    pair = Pair()
    call = pair.client.send_request("t", FindNode(target=bytes(32)), (), 5)
    assert isinstance(pair.settle()[1][0], RequestReceived)
    assert pair.client.cancel(call) == "t"
    assert pair.client.cancel(call) is None
    assert pair.settle()[1] == [CallCancelled(call)]
    assert pair.server.served_calls == pair.budget.calls == 1  # the work still goes on
    pair.server.send_reply(call, Found())  # too late, but it ends the call
    assert pair.server.served_calls == pair.budget.calls == 0
    assert pair.settle() == ([], [])
    # Before anything was sent, nothing is sent at all.
    call = pair.client.send_request("u", Ping(), (), 5)
    pair.client.cancel(call)
    kinds = [frame[1] for frame in get_frames(pair.client)]
    assert Kind.REQUEST not in kinds
    # A late reply to a cancelled call is dropped.
    call = pair.client.send_request("v", Ping(), (), 5)
    pair.move(pair.client, pair.server)
    pair.server.send_reply(call, Pong())
    pair.client.cancel(call)
    assert pair.move(pair.server, pair.client) == []


def test_calls_in_flight_are_capped_on_both_sides():
    pair = Pair()
    for number in range(CALLS_PER_PEER):
        pair.client.send_request(number, FindNode(target=bytes(32)), (), 5)
    with pytest.raises(Busy):
        pair.client.send_request("one more", Ping(), (), 5)
    assert len(pair.settle()[1]) == CALLS_PER_PEER
    header = messages.encode(Ping())
    frame = encode_head(Kind.REQUEST, 2 * CALLS_PER_PEER + 1, deadline_ms=1, header_bytes=len(header)) + header
    events: list = []
    pair.server.receive(frame, events)
    assert events == []
    [refusal] = get_frames(pair.server)
    assert b"busy" in refusal
    for _ in range(5000):  # a peer that floods and never reads
        frame = encode_head(Kind.REQUEST, pair.server._their_last + 2, deadline_ms=1, header_bytes=len(header)) + header
        try:
            pair.server.receive(frame, events)
        except RemoteProtocolError:
            break
    else:
        raise AssertionError("the backlog is unbounded")


def test_a_request_of_a_newer_version_is_refused_not_fatal():
    pair = Pair()
    assert pair.client.send_request("t", Ping(), (), 5) == 1
    get_frames(pair.client)  # lost; instead:
    header = b"\x81\xa1t\xa6future"
    events: list = []
    pair.server.receive(encode_head(Kind.REQUEST, 1, deadline_ms=1, header_bytes=len(header)) + header, events)
    assert events == []
    [reply] = pair.move(pair.server, pair.client)
    assert isinstance(reply.message, Failure) and reply.message.code == "unsupported"


REPLY = messages.encode(Pong())


@pytest.mark.parametrize(
    "frame",
    [
        encode_head(Kind.REQUEST, 2, deadline_ms=1, header_bytes=1) + b"x",  # our own parity
        encode_head(Kind.REPLY, 2, header_bytes=len(REPLY)) + REPLY,  # never asked
        encode_head(Kind.BODY, 5, body=1) + b"x",
        encode_head(Kind.BODY, 2, body=1) + b"x",
        encode_head(Kind.WINDOW, 5, body=1),
        encode_head(Kind.CANCEL, 5),
        encode_head(Kind.CANCEL, 4),
        b"\x00" * HEAD_BYTES,
    ],
)
def test_broken_protocol_is_named(frame):
    with pytest.raises(RemoteProtocolError):
        Pair().server.receive(frame, [])


def test_more_body_than_announced_or_granted_is_an_error():
    pair = Pair()
    pair.client.send_request("t", get_call(), [bytes(CHUNK_BYTES + 10)], 5)
    pair.move(pair.client, pair.server, frames=1)
    with pytest.raises(RemoteProtocolError, match="announced"):
        pair.server.receive(encode_head(Kind.BODY, 1, body=11) + bytes(11), [])
    pair = Pair()
    chunk = encode_head(Kind.BODY, 1, body=CHUNK_BYTES) + bytes(CHUNK_BYTES)
    header = messages.encode(get_call())
    first = encode_head(Kind.REQUEST, 1, deadline_ms=9, header_bytes=len(header), body=CALL_BODY_BYTES) + header
    pair.server.receive(first + bytes(CHUNK_BYTES), [])
    pair.server._starved.clear()
    with pytest.raises(RemoteProtocolError, match="let"):
        for _ in range(3 * WINDOW_BYTES // CHUNK_BYTES):
            pair.server._grant = lambda call, incoming: None  # a receiver that grants nothing
            pair.server.receive(chunk, [])


def test_closing_gives_everything_back():
    pair = Pair()
    pair.client.send_request("t", get_call(), [bytes(2 * CHUNK_BYTES)], 5)
    pair.move(pair.client, pair.server, frames=1)
    assert pair.budget.used_bytes == CHUNK_BYTES and pair.budget.calls == 1
    pair.server.close()
    assert pair.budget.used_bytes == pair.budget.calls == 0
    assert pair.client.close() == ["t"]


def test_work_that_outlives_its_call_or_connection_still_counts():
    pair = Pair()
    body = bytes(100)
    for number in range(CALLS_PER_PEER):
        call = pair.client.send_request(number, FindNode(target=bytes(32)), [body], 5)
        pair.move(pair.client, pair.server)
        pair.client.cancel(call)
        pair.move(pair.client, pair.server)
    pair.client.send_request("one more", Ping(), (), 5)
    at_client, at_server = pair.settle()
    assert at_client[0].message.code == "busy" and at_server == []
    pair.server.close()
    assert pair.budget.calls == CALLS_PER_PEER and pair.budget.used_bytes == CALLS_PER_PEER * len(body)
    for number in range(CALLS_PER_PEER):
        pair.server.drop_served(1 + 2 * number)
        pair.server.send_reply(1 + 2 * number, Found())  # its connection is gone
    assert pair.budget.calls == pair.budget.used_bytes == 0 and get_frames(pair.server) == []


@pytest.mark.parametrize("header", [b"\x82\xa1t\xa4ping\xa1x" + b"\x91" * 9_999 + b"\x00", b"\x81\xa1t\xa1\xff"])
def test_headers_that_break_the_decoder_cost_one_call(header):
    pair = Pair()
    pair.client.send_request("t", Ping(), (), 5)
    get_frames(pair.client)
    pair.server.receive(encode_head(Kind.REQUEST, 1, deadline_ms=1, header_bytes=len(header)) + header, [])
    [refusal] = get_frames(pair.server)
    assert b"unsupported" in refusal
    events: list = []
    pair.client.receive(encode_head(Kind.REPLY, 1, header_bytes=len(header)) + header, events)
    assert isinstance(events[0], CallFailed) and isinstance(events[0].error, RemoteProtocolError)


def test_large_headers_count_as_memory():
    records = [Signed(public_key=bytes(32), signature=bytes(64), payload=bytes(4000))] * 64
    pair = Pair(InboundBudget(limit_bytes=64 * MIB))
    for number in range(50):  # requests whose bodies never come, each with 260 KB of records
        pair.client.send_request(number, Store(records=records), [bytes(2 * CHUNK_BYTES)], 5)
        pair.move(pair.client, pair.server, frames=1)
        [_] = pair.client._outgoing
        pair.client._drop_outgoing(1 + 2 * number)
    assert pair.budget.calls < 20 and pair.budget.used_bytes <= 32 * MIB
    pair.server.close()
    pair = Pair(InboundBudget(limit_bytes=8 * MIB))
    for number in range(50):  # answers that aren't read
        pair.client.send_request(number, FindNode(target=bytes(32)), (), 5)
    for event in pair.move(pair.client, pair.server):
        pair.server.send_reply(event.call, Found(records=records))
    assert sum(len(out.first or b"") for out in pair.server._outgoing.values()) <= 4 * MIB
    replies, _ = pair.settle()
    assert len(replies) == 50 and replies[0].message == Found(records=records) and replies[-1].message.code == "busy"
    assert pair.budget.used_bytes == 0


def test_what_never_ends_is_given_up():
    pair = Pair()
    pair.client.send_request("t", get_call(), [bytes(2 * CHUNK_BYTES)], 5)
    pair.move(pair.client, pair.server, frames=1)
    assert not pair.server.drop_stalled() and not pair.server.drop_stalled() and pair.budget.calls == 1
    assert not pair.server.drop_stalled() and pair.budget.calls == pair.budget.used_bytes == 0
    [reply] = pair.move(pair.server, pair.client)
    assert reply.message.code == "deadline_exceeded"
    # An answer that is read a bit at a time.
    call = pair.client.send_request("u", FindNode(target=bytes(32)), (), 5)
    pair.move(pair.client, pair.server)
    assert not pair.server.drop_stalled() and not pair.server.drop_stalled()  # time at work doesn't count
    pair.server.send_reply(call, Found(), [bytes(12 * CHUNK_BYTES)])
    for _ in range(2):
        assert pair.server.next_buffers() is not None
        assert not pair.server.drop_stalled()
    assert pair.server.next_buffers() is not None
    assert pair.server.drop_stalled()
    pair = Pair()
    pair.client.send_request("v", Ping(), (), 5)
    get_frames(pair.client)
    # A frame that trickles in: the connection has to go. One that came whole meanwhile is fine.
    header = messages.encode(Ping())
    frame = encode_head(Kind.REQUEST, 3, deadline_ms=1, header_bytes=len(header)) + header
    pair.server.receive(frame[:20], [])
    assert not pair.server.drop_stalled()
    pair.server.receive(frame[20:] + frame[:9], [])
    assert not pair.server.drop_stalled()
    pair.server.receive(frame[9:10], [])
    assert pair.server.drop_stalled()


def test_a_peer_that_breaks_off_its_answer():
    pair = Pair()
    pair.client.send_request("t", Ping(), (), 5)
    events: list = []
    pair.client.receive(encode_head(Kind.CANCEL, 1), events)
    assert isinstance(events[0], CallFailed) and isinstance(events[0].error, ConnectionLost)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3 * CHUNK_BYTES), st.booleans()), max_size=12), st.randoms())
def test_every_call_is_answered_whatever_the_order(calls, random):
    pair = Pair()
    sent: dict = {}
    answered: dict = {}

    def pump(source: Session, target: Session, frames: int) -> None:
        for event in pair.move(source, target, frames=frames):
            if isinstance(event, RequestReceived):
                target.send_reply(event.call, ExpertReply(rows=1, hidden=1), [event.body])
            elif isinstance(event, ReplyReceived):
                answered[event.ticket] = len(event.body)
                assert bytes(event.body[:1]) == bytes([event.ticket])[: len(event.body)]

    for number, (from_client, size, cancel) in enumerate(calls):
        session, other = (pair.client, pair.server) if from_client else (pair.server, pair.client)
        call = session.send_request(number, get_call(), [bytes([number]) * size], 5)
        if cancel:
            pump(session, other, random.randint(0, 2))
            session.cancel(call)
        else:
            sent[number] = size
    for _ in range(100):
        pump(pair.client, pair.server, random.randint(1, 4))
        pump(pair.server, pair.client, random.randint(1, 4))
    assert answered == sent
    assert pair.budget.used_bytes == 0


HEADERS = [messages.encode(Ping()), messages.encode(get_call()), messages.encode(Pong()), b"\xc1", b"\x90" * 40]


@st.composite
def any_frames(draw) -> bytes:
    """Well-formed frames without any sense between them."""
    kind = draw(st.sampled_from(list(Kind)[1:]))
    header = draw(st.sampled_from(HEADERS)) if kind in (Kind.REQUEST, Kind.REPLY) else b""
    body = draw(st.sampled_from([b"", b"x", bytes(3000)])) if kind < Kind.WINDOW else b""
    total = draw(st.sampled_from([1, WINDOW_BYTES])) if kind is Kind.WINDOW else len(body)
    deadline_ms = 5 if kind is Kind.REQUEST else 0
    call = draw(st.integers(1, 8))
    return encode_head(kind, call, deadline_ms=deadline_ms, header_bytes=len(header), body=total) + header + body


@settings(deadline=None)
@given(st.lists(any_frames(), max_size=15))
def test_no_sequence_of_frames_raises_anything_else_or_leaks(frames):
    pair = Pair()
    for number in range(3):
        pair.server.send_request(number, Ping(), (), 5)
    events: list = []
    try:
        for frame in frames:
            pair.server.receive(frame, events)
            for event in list(events):
                if isinstance(event, RequestReceived):
                    pair.server.send_reply(event.call, Pong())
            get_frames(pair.server)
    except RemoteProtocolError:
        for event in events:
            if isinstance(event, RequestReceived):
                pair.server.drop_served(event.call)
    finished = [event for event in events if isinstance(event, ReplyReceived | CallFailed)]
    assert len(finished) + len(pair.server.close()) == 3  # every call of ours ends exactly once
    assert pair.budget.used_bytes == pair.budget.reserved_bytes == pair.budget.calls == 0
