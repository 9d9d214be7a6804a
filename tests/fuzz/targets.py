"""What is fuzzed: each target takes any bytes, and raises only when the product does what it must never do.

A target lets the documented errors of what it calls pass, and asserts what has to hold whatever came in: limits on
what is kept in memory, everything given back at the end, nobody believed without a proof.
"""

from __future__ import annotations

import contextlib
import functools
import struct
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec

from daaswarm import messages
from daaswarm.core import adverts, signing
from daaswarm.core.adverts import AdvertBook, from_bitmap, get_missing, rank_dtypes, to_bitmap
from daaswarm.core.record_store import RecordStore
from daaswarm.core.swarm_keys import SwarmKey
from daaswarm.errors import Busy, ConfigError, ConnectionLost, DaaswarmError, ModelError, RemoteProtocolError, TooLarge
from daaswarm.limits import CALL_BODY_BYTES, CALLS_PER_PEER, CHUNK_BYTES, CONTROL_BYTES, MIB, WINDOW_BYTES
from daaswarm.messages import Advert, Contact, ExpertCall, ExpertReply, Failure, Hello, Ping, Pointer, Pong, Signed
from daaswarm.models.checkpoint import find_shards, read_header
from daaswarm.net.addresses import parse_address
from daaswarm.net.certificate import get_certified_peer_id
from daaswarm.net.failures import get_error, get_failure
from daaswarm.net.frames import HANDSHAKE_BYTES, HEAD_BYTES, Frame, FrameParser, Kind, encode_handshake, encode_head
from daaswarm.net.handshake import ClientHandshake, Identity, ServerHandshake
from daaswarm.net.inbound import InboundBudget
from daaswarm.net.session import CONTROL_BACKLOG, Session
from daaswarm.net.transfers import Event, ReplyReceived, RequestReceived
from daaswarm.types import PeerId
from tests.fuzz.source import Source

SWARM = bytes(range(32))
BINDING = bytes(32)
KEY, OTHER_KEY = SwarmKey("fuzz", bytes(32)), SwarmKey("fuzz", bytes([1]) * 32)
HONEST = Identity.from_seed(bytes([1]) * 32, SWARM, "honest")
SERVER = Identity.from_seed(bytes([2]) * 32, SWARM, "server")
CALL = ExpertCall(model_root="ab" * 32, layer=0, experts=[1], dtype="f32", rows=1, hidden=8)
NOW = 1.5e9  # Unix time, s, at which records are judged
STEPS = 60  # of one conversation; more are more of the same
BUDGET_BYTES = 4 * WINDOW_BYTES  # small, so that it's met

HEADERS = [messages.encode(m) for m in (Ping(), CALL, Pong(), ExpertReply(rows=1, hidden=8))] + [b"\xc1", b"\x90" * 40]
CALLS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 255, 2**32 - 3, 2**32 - 2, 2**32 - 1]
SIZES = [0, 1, 100, CHUNK_BYTES, CHUNK_BYTES + 1, WINDOW_BYTES, WINDOW_BYTES + 1, CALL_BODY_BYTES, 2**32 - 1]
ZEROS = bytes(CHUNK_BYTES)


def fuzz_frames(data: bytes) -> None:
    """Any bytes in any pieces; what comes out doesn't depend on the pieces, and little is kept."""
    source = Source(data)
    handshake = bool(source.number() & 1)
    pieces: list[bytes] = []
    while not source.is_empty:
        pieces.append(source.take(1 + source.number()))
    split, error = _parse(pieces, handshake)
    whole, same = _parse([b"".join(pieces)], handshake)
    assert split == whole and error == same


def _parse(pieces: list[bytes], handshake: bool) -> tuple[list[Frame], str]:
    parser, frames = FrameParser(handshake=handshake), list[Frame]()
    limit = HEAD_BYTES + (HANDSHAKE_BYTES if handshake else CONTROL_BYTES + CHUNK_BYTES)
    for piece in pieces:
        parser.feed(piece)
        try:
            while (frame := parser.next_frame()) is not None:
                assert len(frame.header) + len(frame.body) <= limit
                frames.append(frame)
        except RemoteProtocolError as error:
            return frames, str(error)
        assert parser.buffered_bytes <= limit
    return frames, ""


def fuzz_session(data: bytes) -> None:
    """A conversation of which the other side says anything, while ours makes calls, answers and gives up."""
    source = Source(data)
    budget = InboundBudget(BUDGET_BYTES)
    session = Session(is_client=bool(source.number() & 1), budget=budget, wake=lambda: None)
    open_requests: list[int] = []
    made: list[int] = []
    ended = 0
    try:
        for step in range(STEPS):
            if source.is_empty:
                break
            events: list[Event] = []
            try:
                _step(source, session, step, open_requests, made, events)
            finally:
                open_requests += [event.call for event in events if isinstance(event, RequestReceived)]
                ended += sum(not isinstance(event, RequestReceived) and hasattr(event, "ticket") for event in events)
                _check_session(session, budget)
    except RemoteProtocolError as error:
        assert get_failure(error).code == "remote_protocol_error"
    ended += len(session.close())
    assert ended == len(made), "every call of ours ends exactly once"
    for call in open_requests:  # work that outlived the connection
        session.drop_served(call)
    assert budget.used_bytes == budget.reserved_bytes == budget.calls == 0
    assert session.next_buffers() is None


def _step(
    source: Source, session: Session, step: int, open_requests: list[int], made: list[int], events: list[Event]
) -> None:
    what = source.number() % 8
    if what == 0:
        session.receive(source.take(1 + source.number()), events)
    elif what <= 3:
        session.receive(_get_frame(source), events)
    elif what == 4:
        body = [ZEROS[: source.choose([0, 1, CHUNK_BYTES])]] * source.choose([1, 1, 20])
        with contextlib.suppress(Busy, TooLarge, ConnectionLost):
            made.append(session.send_request(step, source.choose([Ping(), CALL]), body, 5.0))
    elif what == 5:
        for _ in range(source.number()):
            if session.next_buffers() is None:
                break
    elif what == 6 and open_requests:
        call = open_requests.pop(source.number() % len(open_requests))
        if source.number() & 1:
            session.drop_served(call)
        else:
            session.send_reply(call, ExpertReply(rows=1, hidden=8), [ZEROS[: source.choose([0, 1, CHUNK_BYTES])]] * 20)
    elif what == 7:
        if source.number() & 1 and made:
            call = made[source.number() % len(made)]
            if session.cancel(call) is not None:
                made.remove(call)
        else:
            session.grant_windows()
            session.drop_stalled()


def _get_frame(source: Source) -> bytes:
    """A frame that is right, or nearly."""
    kind = source.choose(list(Kind))
    header = source.choose(HEADERS) if kind in (Kind.REQUEST, Kind.REPLY, Kind.HANDSHAKE) else b""
    total = source.choose(SIZES) if kind not in (Kind.CANCEL, Kind.HANDSHAKE) else 0
    head = encode_head(
        kind,
        source.choose(CALLS) if kind is not Kind.HANDSHAKE else 0,
        deadline_ms=5 if kind is Kind.REQUEST else 0,
        header_bytes=len(header),
        body=total,
    )
    carried = min(total, CHUNK_BYTES) if kind in (Kind.REQUEST, Kind.REPLY, Kind.BODY) else 0
    return source.damage(head + header) + ZEROS[:carried]


def _check_session(session: Session, budget: InboundBudget) -> None:
    incoming = [s.incoming for s in session._served.values()] + [own.incoming for own in session._own.values()]
    assert sum(len(i.body) for i in incoming if i is not None) <= budget.used_bytes <= BUDGET_BYTES
    assert budget.reserved_bytes >= 0
    assert session.served_calls <= CALLS_PER_PEER and session.own_calls <= CALLS_PER_PEER
    assert len(session._control) <= CONTROL_BACKLOG + 1
    assert session._parser.buffered_bytes <= HEAD_BYTES + CONTROL_BYTES + CHUNK_BYTES + 512
    assert len(session._starved) <= session.served_calls + session.own_calls


def fuzz_conversation(data: bytes) -> None:
    """Two honest sides, on a wire that cuts anywhere and, from some point on, damages what it carries."""
    source = Source(data)
    budgets = InboundBudget(BUDGET_BYTES), InboundBudget(BUDGET_BYTES)
    sides = [Session(is_client=i == 0, budget=budget, wake=lambda: None) for i, budget in enumerate(budgets)]
    expected: dict[object, int] = {}
    damaged = False
    unread = [b"", b""]  # by receiver
    try:
        for step in range(STEPS):
            if step < STEPS // 2 and source.number() & 1:
                body = [ZEROS[: source.choose([0, 1, 1000, CHUNK_BYTES])]] * source.choose([1, 3])
                sides[step % 2].send_request((step % 2, step), CALL, body, 5.0)
                expected[step % 2, step] = sum(map(len, body))
            for receiver in (0, 1):
                while (buffers := sides[1 - receiver].next_buffers()) is not None:
                    unread[receiver] += b"".join(buffers)
                if source.number() == 255:
                    damaged, unread[receiver] = True, source.damage(unread[receiver])
                cut = source.number(2) * 16 or len(unread[receiver])
                piece, unread[receiver] = unread[receiver][:cut], unread[receiver][cut:]
                _answer(sides[receiver], piece, expected, damaged)
                _check_session(sides[receiver], budgets[receiver])
    except RemoteProtocolError:
        assert damaged, "an honest peer was blamed"
    left = [ticket for side in sides for ticket in side.close()]
    if not damaged:
        assert set(left) == set(expected) and not any(budget.calls for budget in budgets)


def _answer(side: Session, piece: bytes, expected: dict[object, int], damaged: bool) -> None:
    events: list[Event] = []
    try:
        side.receive(piece, events)
    finally:
        for event in events:
            if isinstance(event, RequestReceived):
                side.send_reply(event.call, ExpertReply(rows=1, hidden=8), [event.body])
            elif isinstance(event, ReplyReceived):
                size = expected.pop(event.ticket)
                assert damaged or len(event.body) == size or isinstance(event.message, Failure)


def fuzz_handshake(data: bytes) -> None:
    """Both sides of a handshake against a peer that is honest, or nearly, or not at all; in a private swarm too,
    against one with or without its key."""
    source = Source(data)
    role = source.number()
    key = KEY if role & 2 else None
    theirs = OTHER_KEY if key is not None and role & 4 else key
    mine = replace(SERVER if role & 1 else HONEST, swarm_key=key)
    if role & 1:
        server = ServerHandshake(mine, Contact(peer_id=SERVER.peer_id, addrs=[]), BINDING)
        server._nonce = SWARM  # drawn at random; a finding must be repeatable
        contact = Contact(peer_id=HONEST.peer_id, addrs=["/ip4/127.0.0.1/tcp/1"])
        peer = ClientHandshake(replace(HONEST, swarm_key=theirs), contact, BINDING, PEER)
        proof = b"" if theirs is None else theirs.prove_server(BINDING, SWARM, PEER)
        hello = Hello(nonce=SWARM, swarm=mine.swarm_name, key_proof=proof)
        server.start()
        said = peer.receive(_get_only_frame(encode_handshake(messages.encode(hello))))
        side, expected = server, HONEST.peer_id
    else:
        proof = b"" if theirs is None else theirs.prove_server(BINDING, BINDING, PEER)
        hello = Hello(nonce=BINDING, swarm=mine.swarm_name, key_proof=proof)
        said = encode_handshake(messages.encode(hello)) + WELCOME
        side, expected = ClientHandshake(mine, None, BINDING, PEER), PEER
    stream = source.damage(said) if source.number() & 1 else said
    if source.number() & 1:
        at = source.number(2) % (len(stream) + 1)
        stream = stream[:at] + source.take(source.number()) + stream[at:]
    parser = FrameParser(handshake=True)
    while stream and side.peer is None and side.error is None:
        size = 1 + source.number(2) % 512
        parser.feed(stream[:size])
        stream = stream[size:]
        try:
            while side.peer is None and side.error is None and (frame := parser.next_frame()) is not None:
                assert len(side.receive(frame)) <= HEAD_BYTES + HANDSHAKE_BYTES
        except RemoteProtocolError:
            return
        assert parser.buffered_bytes <= HEAD_BYTES + HANDSHAKE_BYTES + 512
    if side.peer is not None:
        assert side.peer.peer_id == expected, "a peer was believed that proved nothing"
        assert theirs is key, "a peer got in without the swarm's key"
        assert side.peer.contact is None or side.peer.contact.peer_id == expected
    assert side.error is None or isinstance(side.error, DaaswarmError)


PEER = SERVER.peer_id
WELCOME = encode_handshake(messages.encode(messages.Welcome(contact=Contact(peer_id=PEER, addrs=[]), agent="x")))


def _get_only_frame(data: bytes) -> Frame:
    parser = FrameParser(handshake=True)
    parser.feed(data)
    frame = parser.next_frame()
    assert frame is not None
    return frame


KINDS = [messages.Request, messages.Reply, messages.Handshake, Signed, Pointer, Advert]


def fuzz_messages(data: bytes) -> None:
    """Headers of any kind, addresses and certificates: a typed value or the one named error."""
    source = Source(data)
    kind = source.choose([*KINDS, None, ""])
    rest = source.rest()
    if kind is None:
        with contextlib.suppress(RemoteProtocolError):
            get_certified_peer_id(rest)
    elif kind == "":
        with contextlib.suppress(ConfigError):
            address = parse_address(rest.decode("latin-1"))
            assert parse_address(str(address)) == address
    else:
        try:
            message = messages.decode(kind, rest)
        except msgspec.DecodeError:
            return
        again = messages.encode(messages.decode(kind, messages.encode(message)))
        assert again == messages.encode(message)  # as bytes, since a NaN is unlike itself
        if isinstance(message, Failure):
            error = get_error(message, "peer")
            assert "\n" not in error.message and get_failure(error).message is not None


POINTER = Pointer(key=bytes(32), peer_id=HONEST.peer_id, addrs=["/ip4/127.0.0.1/tcp/1"], seq=1, expires_at=NOW + 60)
ADVERT = Advert(
    peer_id=HONEST.peer_id, model_root="ab" * 32, model_name="m", kind="moe", held={0: b"\xff", 3: b"\x01"},
    dtype="f32", device="cpu", addrs=[], seq=1, expires_at=NOW + 60,
)  # fmt: skip


def fuzz_signed(data: bytes) -> None:
    """Signed records whose signature is right (then the payload is anything), or anything; into the stores."""
    source = Source(data)
    store = RecordStore(SWARM, records=4, records_per_key=2, records_per_signer=3)
    book = AdvertBook(SWARM, adverts=4, adverts_per_peer=2)
    for _ in range(4):
        kind, record = source.choose([("pointer", POINTER), ("advert", ADVERT)])
        payload = source.damage(messages.encode(record)) if source.number() & 1 else source.take(source.number(2))
        if source.number() & 1:
            signature = signing.sign(HONEST.key, kind, SWARM, payload)
        else:
            signature = source.take(64).ljust(64, b"\0")
        key = HONEST.public_key if source.number() & 1 else source.take(32).ljust(32, b"\0")
        signed = Signed(public_key=key, signature=signature, payload=payload)
        with contextlib.suppress(RemoteProtocolError):
            store.put(signed, NOW)
        with contextlib.suppress(RemoteProtocolError):
            book.put(signed, NOW)
        store.validate()
        book.validate()
        assert all(peer == HONEST.peer_id for root in book.get_models(NOW) for peer in _get_publishers(book, root))
        if source.is_empty:
            break
    store.tick(NOW + 3600)
    book.tick(NOW + 3600)
    assert len(store) == len(book) == 0


def _get_publishers(book: AdvertBook, root: str) -> list[PeerId]:
    return [PeerId(known.advert.peer_id) for known in book.get_adverts(root, NOW)]


def fuzz_adverts(data: bytes) -> None:
    """Bitmaps and the maps of layers around them: what is held is counted right and costs what its bits cost."""
    source = Source(data)
    held = {source.number(2): source.take(source.number(2) % 1024) for _ in range(source.number() % 8)}
    layers = {source.number(2): source.number(2) for _ in range(source.number() % 8)}
    for layer, bitmap in held.items():
        numbers = from_bitmap(bitmap)
        assert to_bitmap(numbers) == bitmap.rstrip(b"\0") and len(numbers) <= 8 * len(bitmap)
        layers.setdefault(layer, len(bitmap) * 8)
    advert = msgspec.structs.replace(ADVERT, held=held, dtype=source.choose(["f32", "bf16", "f16"]))
    signed = _seal(advert)
    book = AdvertBook(SWARM)
    try:
        book.put(signed, NOW)
    except RemoteProtocolError:
        assert not all(any(bitmap) for bitmap in held.values()) or len(signed.payload) > 16_384
        return
    found = book.get_adverts(ADVERT.model_root, NOW)
    holders = book.holders(ADVERT.model_root, NOW, advert.dtype, layers)  # type: ignore[arg-type]
    assert all(expert.expert < layers[expert.layer] for expert in holders)
    missing = get_missing(layers, holders)
    assert len(holders) + sum(map(len, missing.values())) == sum(layers.values())
    adverts.format_missing(missing, layers)
    assert rank_dtypes(found, layers)[0] in ("f32", "bf16", "f16") and len(rank_dtypes(found)) == 3


def _seal(advert: Advert) -> Signed:
    return signing.seal(advert, adverts.ADVERT_KIND, HONEST.key, SWARM)


def fuzz_safetensors(data: bytes) -> None:
    """A checkpoint's header, or its shard index: tensors that lie inside the file, or the one named error."""
    source = Source(data)
    what = source.number() % 3
    folder = _get_folder()
    rest = source.rest()
    if what == 2:
        (folder / "model.safetensors.index.json").write_bytes(rest)
        with contextlib.suppress(ModelError):
            assert all(Path(file).name == file for file in find_shards(folder))
        return
    path = folder / "model.safetensors"
    header, _, body = rest.partition(b"\0")
    path.write_bytes(struct.pack("<Q", len(header)) + header + body if what else rest)
    try:
        tensors = read_header(path)
    except ModelError:
        return
    size = path.stat().st_size
    for tensor in tensors.values():
        assert 8 <= tensor.start <= tensor.start + tensor.nbytes <= size < 64 * MIB


@functools.cache
def _get_folder() -> Path:
    keep = tempfile.TemporaryDirectory(prefix="daaswarm-fuzz-")
    _kept.append(keep)
    return Path(keep.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends

_TENSOR = b'{"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"__metadata__":{"format":"pt"}}'
_ADVERT, _POINTER = messages.encode(ADVERT), messages.encode(POINTER)

TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "frames": (fuzz_frames, [b"\0" + encode_head(Kind.BODY, 1, body=2) + b"ab", b"\1" + encode_handshake(b"hi")]),
    "session": (fuzz_session, [bytes([role, *range(8)]) * 8 for role in (0, 1)]),
    "conversation": (fuzz_conversation, [bytes([1, 0, 0, 0, 0, 0, 0, 0]) * 20, bytes([1, 3, 1, 7, 0, 255, 9, 9]) * 12]),
    "handshake": (fuzz_handshake, [bytes([role, damage, 0, 1, 7]) * 4 for role in range(8) for damage in (0, 1)]),
    "messages": (
        fuzz_messages,
        [
            bytes([0]) + HEADERS[1],
            bytes([1]) + HEADERS[3],
            b"\4" + _POINTER,
            b"\5" + _ADVERT,
            b"\7/ip4/127.0.0.1/tcp/1",
        ],
    ),
    "signed": (fuzz_signed, [b"\0\0\0\xff" + _POINTER, b"\1\0\1\0" + _ADVERT, bytes([0, 1, 0, 1, 1]) * 4]),
    "adverts": (fuzz_adverts, [bytes([2, 0, 0, 0, 2, 255, 1, 0, 1, 0, 1, 8, 1, 0, 0, 0, 4, 0])]),
    "safetensors": (
        fuzz_safetensors,
        [
            b"\1" + _TENSOR + b"\0" + bytes(8),
            b"\0" + struct.pack("<Q", len(_TENSOR)) + _TENSOR,
            b'\2{"weight_map":{"a":"b"}}',
        ],
    ),
}
"""What ``make fuzz`` and the tests run: each target with inputs to begin from."""
