"""The bytes of every message and frame, pinned: what a node of this protocol version writes, every other one reads.

``golden.txt`` holds them. A line that changes breaks the swarm's older nodes: that takes a new PROTOCOL_VERSION.
``python -m tests.wire.test_golden`` prints the lines of the examples below.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import msgspec
import pytest

from daaswarm import messages
from daaswarm.messages import (
    Advert,
    Adverts,
    Arranged,
    AskSwarm,
    ChainRoot,
    CheckReach,
    Contact,
    Doubt,
    Doubted,
    ExpertCall,
    ExpertReply,
    Failure,
    FindNode,
    FindValue,
    Found,
    GetAdverts,
    GetModelPart,
    Hello,
    Invite,
    Meet,
    Message,
    ModelPart,
    Moved,
    Offers,
    Ping,
    Pointer,
    Pong,
    Prove,
    PullAdverts,
    Pulled,
    PushAdverts,
    Pushed,
    Query,
    Reached,
    Reopen,
    Reserve,
    Reserved,
    Signed,
    Store,
    Stored,
    Welcome,
)
from daaswarm.net.frames import Frame, FrameParser, Kind, encode_handshake, encode_head

GOLDEN = Path(__file__).with_name("golden.txt")
KEY = bytes(range(32))
SIGNATURE = bytes(range(64))
PEER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
ROOT = "0123456789abcdef" * 4
CONTACT = Contact(peer_id=PEER, addrs=["/ip4/127.0.0.1/tcp/4001", "/dns4/host.example/tcp/4001"])
SIGNED = Signed(public_key=KEY, signature=SIGNATURE, payload=b"payload")

# Of each message one with as little, one with as much as it can say.
EXAMPLES: dict[str, msgspec.Struct] = {
    "contact": CONTACT,
    "hello": Hello(nonce=KEY, swarm=KEY[::-1]),
    "hello/full": Hello(version=2, nonce=KEY, swarm=KEY[::-1]),
    "hello/private": Hello(nonce=KEY, swarm=KEY[::-1], key_proof=KEY),
    "prove": Prove(public_key=KEY, signature=SIGNATURE),
    "prove/private": Prove(public_key=KEY, signature=SIGNATURE, key_proof=KEY),
    "prove/full": Prove(version=2, public_key=KEY, signature=SIGNATURE, contact=CONTACT, agent="daaswarm/9"),
    "welcome": Welcome(),
    "welcome/full": Welcome(contact=CONTACT, agent="daaswarm/9", observed_addr="/ip4/127.0.0.1/tcp/9"),
    "ping": Ping(),
    "pong": Pong(),
    "ping/echo": Ping(echo=True),
    "pong/near": Pong(near=bytes(range(8)), time=1_700_000_000.5),
    "signed": SIGNED,
    "pointer": Pointer(key=KEY, peer_id=PEER, addrs=["/ip4/127.0.0.1/tcp/4001"], seq=7, expires_at=1.5e9),
    "advert": Advert(
        peer_id=PEER, model_root=ROOT, model_name="tiny", kind="moe", held={}, dtype="f32", device="cpu", addrs=[],
        seq=0, expires_at=0.0,
    ),
    "advert/full": Advert(
        peer_id=PEER, model_root=ROOT, model_name="tiny", kind="dense", held={0: b"\xff", 29: b"\x01\x80"},
        dtype="bf16", device="cuda:0", addrs=["/ip4/127.0.0.1/tcp/4001"], capacity_rows_per_s=1234.5, price=0.25,
        seq=2**40, expires_at=1.5e9, withdrawn=True, paused=True, tags=["code"], load=2.5,
        codecs=["f16", "int8"],
    ),
    "query": Query(peer_id=PEER, nonce=bytes(16), expires_at=1.5e9),
    "query/full": Query(
        peer_id=PEER, nonce=bytes(range(16)), model_root=ROOT, name="tiny", tag="code", layer=3, expert=7,
        expires_at=1.5e9,
    ),
    "find_node": FindNode(target=KEY),
    "find_node/full": FindNode(target=KEY, wanted=0),
    "find_value": FindValue(key=KEY),
    "find_value/full": FindValue(key=KEY, place=KEY[::-1]),
    "found": Found(),
    "found/full": Found(contacts=[CONTACT], records=[SIGNED]),
    "store": Store(records=[SIGNED]),
    "stored": Stored(),
    "stored/full": Stored(refused={0: "full", 3: "expired"}),
    "get_adverts": GetAdverts(),
    "get_adverts/full": GetAdverts(model_root=ROOT),
    "adverts": Adverts(adverts=[SIGNED]),
    "push": PushAdverts(adverts=[SIGNED]),
    "push/full": PushAdverts(adverts=[SIGNED], hops=8),
    "pushed": Pushed(),
    "pushed/full": Pushed(unwanted=[ROOT]),
    "pull": PullAdverts(model_root=ROOT),
    "pull/full": PullAdverts(model_root=ROOT, have=bytes(range(16)), low=1, high=2**62, max_bytes=1024),
    "pulled": Pulled(),
    "pulled/full": Pulled(adverts=[SIGNED], wanted=bytes(range(8)), down=bytes(range(16)), more=True),
    "doubt": Doubt(about=bytes(range(16))),
    "doubted": Doubted(),
    "doubted/full": Doubted(alive=bytes(range(8))),
    "ask": AskSwarm(query=SIGNED),
    "ask/full": AskSwarm(query=SIGNED, hops=3, wanted=5, wait_s=2.5),
    "offers": Offers(),
    "offers/full": Offers(adverts=[SIGNED], asked=40),
    "call": ExpertCall(model_root=ROOT, layer=0, experts=[0], dtype="f16", rows=1, hidden=1),
    "call/full": ExpertCall(
        model_root=ROOT, layer=65_535, experts=[1, 300], dtype="f32", rows=65_536, hidden=576, pairs=4
    ),
    "call/grad": ExpertCall(model_root=ROOT, layer=0, experts=[0], dtype="f32", rows=1, hidden=1, grad=True),
    "call/codec": ExpertCall(
        model_root=ROOT, layer=0, experts=[0], dtype="f32", rows=1, hidden=1, codec="int8", reply_codec="bf16",
    ),
    "call/opened": ExpertCall(
        model_root=ROOT, layer=0, experts=[0], dtype="f32", rows=1, hidden=1, opened=True
    ),
    "reply": ExpertReply(rows=1, hidden=576),
    "reply/opened": ExpertReply(rows=1, hidden=576, width=1536),
    "reply/codec": ExpertReply(rows=1, hidden=576, codec="bf16"),
    "reply/full": ExpertReply(
        rows=2, hidden=576, service_us=1500, queue_depth=3, chain=ChainRoot(count=256, root=KEY, signature=SIGNATURE)
    ),
    "chain_root": ChainRoot(count=256, root=KEY, signature=SIGNATURE),
    "reopen": Reopen(call_digest=KEY),
    "reopen/full": Reopen(call_digest=KEY, rows=[0, 63]),
    "get_part": GetModelPart(model_root=ROOT, kind="manifest", size=1),
    "get_part/full": GetModelPart(model_root=ROOT, kind="tensor", name="model.norm.weight", offset=2**40, size=2**20),
    "part": ModelPart(total=2**40),
    "check_reach": CheckReach(ports=[4001]),
    "reached": Reached(host="192.0.2.7"),
    "reached/full": Reached(host="2001:db8::7", ports=[4001, 4002]),
    "reserve": Reserve(),
    "reserved": Reserved(ttl_s=600.0),
    "meet": Meet(target=PEER),
    "meet/full": Meet(target=PEER, addrs=CONTACT.addrs),
    "invite": Invite(peer=PEER, host="192.0.2.7", token=KEY),
    "invite/full": Invite(peer=PEER, host="192.0.2.7", addrs=CONTACT.addrs, token=KEY),
    "arranged": Arranged(),
    "arranged/dialled": Arranged(dialled=True),
    "arranged/token": Arranged(token=KEY),
    "moved": Moved(contact=CONTACT),
    "failure": Failure(code="busy", message="full"),
    "failure/full": Failure(code="busy", message="full", hint="later", retry_after_s=0.5),
}  # fmt: skip

FRAMES: dict[str, tuple[bytes, Frame]] = {
    "frame/handshake": (encode_handshake(b"hi"), Frame(Kind.HANDSHAKE, 0, 0, b"hi", 0, bytearray())),
    "frame/request": (
        encode_head(Kind.REQUEST, 7, deadline_ms=1500, header_bytes=3, body=5) + b"abc" + b"12345",
        Frame(Kind.REQUEST, 7, 1500, b"abc", 5, bytearray(b"12345")),
    ),
    "frame/reply": (
        encode_head(Kind.REPLY, 2**32 - 1, header_bytes=3) + b"abc",
        Frame(Kind.REPLY, 2**32 - 1, 0, b"abc", 0, bytearray()),
    ),
    "frame/body": (encode_head(Kind.BODY, 7, body=2) + b"ab", Frame(Kind.BODY, 7, 0, b"", 2, bytearray(b"ab"))),
    "frame/window": (encode_head(Kind.WINDOW, 9, body=4 << 20), Frame(Kind.WINDOW, 9, 0, b"", 4 << 20, bytearray())),
    "frame/cancel": (encode_head(Kind.CANCEL, 9), Frame(Kind.CANCEL, 9, 0, b"", 0, bytearray())),
}


def read_golden() -> dict[str, bytes]:
    lines = (line.split() for line in GOLDEN.read_text().splitlines() if line and not line.startswith("#"))
    return {name: bytes.fromhex("".join(rest)) for name, *rest in lines}


def get_kind(example: Any) -> object:
    """What a receiver would decode it as."""
    return messages.AnyMessage if isinstance(example, Message) else type(example)


@pytest.mark.parametrize("name", EXAMPLES)
def test_messages(name: str) -> None:
    golden, example = read_golden()[name], EXAMPLES[name]
    assert messages.encode(example).hex() == golden.hex()
    assert messages.decode(get_kind(example), golden) == example


@pytest.mark.parametrize("name", FRAMES)
def test_frames(name: str) -> None:
    golden = read_golden()[name]
    encoded, frame = FRAMES[name]
    assert encoded.hex() == golden.hex()
    parser = FrameParser(handshake=frame.kind is Kind.HANDSHAKE)
    parser.feed(golden)
    assert parser.next_frame() == frame
    assert parser.next_frame() is None and parser.buffered_bytes == 0


def test_every_message_field_and_frame_kind_is_pinned() -> None:
    structs = {
        kind
        for _, kind in inspect.getmembers(messages, inspect.isclass)
        if issubclass(kind, msgspec.Struct) and kind is not Message
    }
    assert {type(example) for example in EXAMPLES.values()} == structs
    for kind in structs:  # a default isn't on the wire: each field occurs with another value somewhere
        some = [example for example in EXAMPLES.values() if type(example) is kind]
        for field in msgspec.structs.fields(kind):
            default = field.default_factory() if callable(field.default_factory) else field.default
            assert any(getattr(example, field.name) != default for example in some), f"{kind.__name__}.{field.name}"
    assert {frame.kind for _, frame in FRAMES.values()} == set(Kind)
    assert list(read_golden()) == [*EXAMPLES, *FRAMES]


def test_unknown_fields_of_newer_peers_are_passed_over() -> None:
    for example in EXAMPLES.values():
        fields = msgspec.msgpack.decode(messages.encode(example))
        newer = msgspec.msgpack.encode({**fields, "a_newer_field": [1, {"x": b"y"}]})
        assert messages.decode(get_kind(example), newer) == example


if __name__ == "__main__":
    for name, example in EXAMPLES.items():
        print(name, messages.encode(example).hex())
    for name, (encoded, _) in FRAMES.items():
        print(name, encoded.hex())
