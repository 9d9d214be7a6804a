"""The one message set. Every request between nodes is a typed message in the header of a frame.

A frame (``net/frames.py``) carries a msgpack header, one of the structs below, and raw tensor bytes. The
structs only say what is on the wire; what may be believed is decided in ``core/``. Field caps are enforced
by msgspec while decoding, so an oversized list never becomes an object.

Adding a field with a default keeps old peers readable; changing or removing one needs a new protocol version.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import Meta

PROTOCOL_VERSION = 1

# Limits of single fields. Sizes of whole messages are in daaswarm/limits.py.
Key = Annotated[bytes, Meta(min_length=32, max_length=32)]  # SHA-256
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]  # Ed25519
KeyProof = Annotated[bytes, Meta(max_length=32)]  # keyed BLAKE2b; empty in a swarm without a key
PublicKey = Annotated[bytes, Meta(min_length=32, max_length=32)]  # Ed25519
PeerIdText = Annotated[str, Meta(min_length=40, max_length=64)]
RootText = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Address = Annotated[str, Meta(max_length=256)]  # a multiaddress
Addresses = Annotated[list[Address], Meta(max_length=8)]
Short = Annotated[str, Meta(max_length=64)]
Text = Annotated[str, Meta(max_length=1024)]
Layer = Annotated[int, Meta(ge=0, le=65_535)]
ExpertNumber = Annotated[int, Meta(ge=0, le=65_535)]
DtypeText = Annotated[str, Meta(pattern="^(f32|bf16|f16)$")]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", array_like=False, omit_defaults=True):
    """Base of every message; ``t`` on the wire is the tag."""


# -- who is there -------------------------------------------------------------------------------------------------


class Contact(msgspec.Struct, frozen=True, kw_only=True):
    """A peer and where to dial it."""

    peer_id: PeerIdText
    addrs: Addresses


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """Server → client, first message after TLS: what the client has to sign."""

    version: int = PROTOCOL_VERSION
    nonce: Key
    swarm: Key
    key_proof: KeyProof = b""  # of a private swarm's key: the server's


class Prove(Message, frozen=True, kw_only=True, tag="prove"):
    """Client → server: the client's PeerId, proven by a signature over :func:`daaswarm.core.signing` fields."""

    version: int = PROTOCOL_VERSION
    public_key: PublicKey
    signature: Signature
    key_proof: KeyProof = b""  # of a private swarm's key: the client's
    contact: Contact | None = None  # set when the client itself accepts connections
    agent: Short = ""


class Welcome(Message, frozen=True, kw_only=True, tag="welcome"):
    """Server → client: proof accepted; the connection is open for calls both ways."""

    contact: Contact | None = None
    agent: Short = ""
    observed_addr: Address = ""


class Ping(Message, frozen=True, kw_only=True, tag="ping"):
    """``echo``: what comes along, 64 KiB at most, is wanted back."""

    echo: bool = False


class Pong(Message, frozen=True, kw_only=True, tag="pong"):
    """``near``: whom the responder measured to be near itself (``daaswarm.core.islands``), 8 bytes each. ``time``: its
    clock (Unix time, s); 0 if it doesn't say."""

    near: Annotated[bytes, Meta(max_length=512)] = b""
    time: float = 0.0


# -- signed records (discovery) -----------------------------------------------------------------------------------


class Signed(msgspec.Struct, frozen=True, kw_only=True):
    """``payload`` is a msgpack-encoded record; the signature covers (domain, swarm, payload).

    The bytes that were signed travel as they are, so verifying never depends on re-encoding.
    """

    public_key: PublicKey
    signature: Signature
    payload: Annotated[bytes, Meta(max_length=16_384)]


class Pointer(msgspec.Struct, frozen=True, kw_only=True):
    """DHT record under ``key``: this peer serves it; ask the peer itself for the full advert."""

    key: Key
    peer_id: PeerIdText
    addrs: Addresses
    seq: Annotated[int, Meta(ge=0)]
    expires_at: float  # Unix time, s


class Advert(msgspec.Struct, frozen=True, kw_only=True):
    """What one peer serves of one model. Last writer (highest ``seq``) wins.

    ``held`` maps a layer to a bitmap of the experts (or slices) it holds there, bit ``i`` of byte ``i // 8``.
    """

    peer_id: PeerIdText
    model_root: RootText
    model_name: Short
    kind: Annotated[str, Meta(pattern="^(moe|dense)$")]
    held: Annotated[dict[Layer, Annotated[bytes, Meta(max_length=8_192)]], Meta(max_length=4_096)]
    dtype: DtypeText
    device: Short
    addrs: Addresses
    capacity_rows_per_s: float = 0.0
    price: float = 0.0
    seq: Annotated[int, Meta(ge=0)]
    expires_at: float  # Unix time, s
    withdrawn: bool = False
    paused: bool = False  # computes nothing for others at the moment; calls get Busy
    tags: Annotated[list[Short], Meta(max_length=16)] = []  # what its operator says it is good at
    load: float = 0.0  # calls that waited when this was signed
    codecs: Annotated[list[Short], Meta(max_length=16)] = []  # in which it takes rows and gives sums, beside f32 itself


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer wants to know of the whole swarm: who serves this? Empty fields ask for nothing in particular.

    Signed by the asker, so that each node on the way can hold it to account; ``nonce`` tells its queries apart.
    """

    peer_id: PeerIdText
    nonce: Annotated[bytes, Meta(min_length=16, max_length=16)]
    model_root: Annotated[str, Meta(max_length=64)] = ""
    name: Short = ""  # a model's name, or the beginning of its root
    tag: Short = ""
    layer: Annotated[int, Meta(ge=-1, le=65_535)] = -1  # -1: any
    expert: Annotated[int, Meta(ge=-1, le=65_535)] = -1
    expires_at: float  # Unix time, s


# -- Kademlia -----------------------------------------------------------------------------------------------------


class FindNode(Message, frozen=True, kw_only=True, tag="find_node"):
    """The ``wanted`` contacts nearest to ``target``; none: is this peer there?"""

    target: Key
    wanted: Annotated[int, Meta(ge=0, le=20)] = 20


class FindValue(Message, frozen=True, kw_only=True, tag="find_value"):
    """The records under ``key``, and the contacts nearest to ``place``: to the key itself if it's None."""

    key: Key
    place: Key | None = None


class Found(Message, frozen=True, kw_only=True, tag="found"):
    """Answer to :class:`FindNode` and :class:`FindValue`."""

    contacts: Annotated[list[Contact], Meta(max_length=20)] = []
    records: Annotated[list[Signed], Meta(max_length=64)] = []


class Store(Message, frozen=True, kw_only=True, tag="store"):
    records: Annotated[list[Signed], Meta(max_length=64)]


class Stored(Message, frozen=True, kw_only=True, tag="stored"):
    """``refused`` names why, per index of the request; an empty dict means all were stored."""

    refused: Annotated[dict[int, Short], Meta(max_length=64)] = {}


class GetAdverts(Message, frozen=True, kw_only=True, tag="get_adverts"):
    """The peer's own adverts; all models if ``model_root`` is empty."""

    model_root: Annotated[str, Meta(max_length=64)] = ""


class Adverts(Message, frozen=True, kw_only=True, tag="adverts"):
    adverts: Annotated[list[Signed], Meta(max_length=64)]


# -- membership: who serves a model, told by those who follow it ---------------------------------------------------

Marks = Annotated[bytes, Meta(max_length=16_384)]  # 8 bytes each: daaswarm.core.marks
Versions = Annotated[bytes, Meta(max_length=16_384)]  # 16 bytes each: a mark, and a seq as u64, big-endian


class PushAdverts(Message, frozen=True, kw_only=True, tag="push"):
    """News. The receiver keeps adverts of models it follows, and hands on what is new to it while ``hops`` last."""

    adverts: Annotated[list[Signed], Meta(max_length=32)]
    hops: Annotated[int, Meta(ge=0, le=16)] = 0


class Pushed(Message, frozen=True, kw_only=True, tag="pushed"):
    """``unwanted``: models that the receiver doesn't follow, of which it wants to hear no more."""

    unwanted: Annotated[list[RootText], Meta(max_length=32)] = []


class PullAdverts(Message, frozen=True, kw_only=True, tag="pull"):
    """The adverts of a model that are newer than ``have``, of peers whose mark is within ``low`` to ``high``."""

    model_root: RootText
    have: Versions = b""
    low: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    high: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = (1 << 63) - 1
    max_bytes: Annotated[int, Meta(ge=0, le=1 << 20)] = 1 << 16


class Pulled(Message, frozen=True, kw_only=True, tag="pulled"):
    """Answer to :class:`PullAdverts`. ``wanted``: of these peers the asker has newer adverts; please push them.
    ``down``: these didn't answer the responder. ``more``: there was more than fits; ask again."""

    adverts: Annotated[list[Signed], Meta(max_length=256)] = []
    wanted: Marks = b""
    down: Versions = b""
    more: bool = False


class Doubt(Message, frozen=True, kw_only=True, tag="doubt"):
    """These peers don't answer the sender: do they answer you? (SWIM's ping-req, and its way to spread the news.)"""

    about: Versions


class Doubted(Message, frozen=True, kw_only=True, tag="doubted"):
    """``alive``: those of the peers asked about that the responder heard of."""

    alive: Marks = b""


class AskSwarm(Message, frozen=True, kw_only=True, tag="ask"):
    """A signed :class:`Query`, handed on while ``hops`` last and fewer than ``wanted`` adverts were found."""

    query: Signed
    hops: Annotated[int, Meta(ge=0, le=8)] = 0
    wanted: Annotated[int, Meta(ge=1, le=64)] = 64
    wait_s: Annotated[float, Meta(ge=0, le=30)] = 5.0


class Offers(Message, frozen=True, kw_only=True, tag="offers"):
    """Answer to :class:`AskSwarm`, on the way back: adverts that match. ``asked``: nodes that were asked in all."""

    adverts: Annotated[list[Signed], Meta(max_length=64)] = []
    asked: Annotated[int, Meta(ge=0, le=1 << 20)] = 1


# -- experts ------------------------------------------------------------------------------------------------------


class ExpertCall(Message, frozen=True, kw_only=True, tag="call"):
    """Compute the weighted sum of some experts of one layer for some rows.

    Body, in this order, little-endian, no padding:

    * ``rows`` x ``hidden`` values of ``dtype``, or in ``codec`` if there is one: the hidden states;
    * with ``pairs`` > 0: ``pairs`` x u32 row numbers, ``pairs`` x u32 expert numbers, ``pairs`` x f32 weights. Each
      pair adds ``weight * expert(row)`` to its row;
    * with ``pairs`` == 0: nothing more; every expert in ``experts`` is applied to every row with weight one
      (slices of a dense FFN);
    * with ``grad``: ``rows`` x ``hidden`` f32, the gradient of the sums. The reply's body is then ``rows`` x
      ``hidden`` f32, the gradient of the rows, and ``pairs`` x f32, that of the weights. No codecs then.

    ``reply_codec``: that of the reply's sums. Codecs are asked only of hosts whose advert names them.

    ``opened``: the reply's body goes on with what stands between, in ``dtype``, for an audit: ``width`` gate, then up,
    then hidden activations, of each row or, with pairs, of each pair; and with pairs each expert's output, ``hidden``
    values a pair. No codecs and no ``grad`` then.
    """

    model_root: RootText
    layer: Layer
    experts: Annotated[list[ExpertNumber], Meta(min_length=1, max_length=4_096)]
    dtype: DtypeText
    rows: Annotated[int, Meta(ge=1, le=65_536)]
    hidden: Annotated[int, Meta(ge=1, le=65_536)]
    pairs: Annotated[int, Meta(ge=0, le=1 << 22)] = 0
    grad: bool = False
    codec: Short = ""
    reply_codec: Short = ""
    opened: bool = False


class ExpertReply(Message, frozen=True, kw_only=True, tag="reply"):
    """Body: ``rows`` x ``hidden`` f32 sums, or these in ``codec``: the one asked for, or none where it can't say them;
    then what was ``opened``: of an expert, or of all slices asked of together, that are ``width`` wide.
    Load feedback rides along for the requester's choice of replicas.
    """

    rows: int
    hidden: int
    service_us: int = 0
    queue_depth: int = 0
    chain: ChainRoot | None = None
    codec: Short = ""
    width: Annotated[int, Meta(ge=0, le=1 << 20)] = 0


class ChainRoot(msgspec.Struct, frozen=True, kw_only=True):
    """Room for step 5: a host's signed hash-chain root over its (x, y) pairs up to ``count``."""

    count: int
    root: Key
    signature: Signature


class Reopen(Message, frozen=True, kw_only=True, tag="reopen"):
    """Room for step 5: reopen a past call. A host that keeps no chain answers ``unsupported``."""

    call_digest: Key
    rows: Annotated[list[int], Meta(max_length=64)] = []


class Failure(Message, frozen=True, kw_only=True, tag="failure"):
    """The answer to a request that could not be served. ``code`` is a :class:`DaaswarmError` code."""

    code: Short
    message: Text
    hint: Text = ""
    retry_after_s: float = 0.0


# -- models -------------------------------------------------------------------------------------------------------


class GetModelPart(Message, frozen=True, kw_only=True, tag="get_part"):
    """Some bytes of a model that the peer hosts: of its manifest, of a small file, or of a tensor as it is on disk.

    What is meant is named as the manifest names it, never by a path of the peer's.
    """

    model_root: RootText
    kind: Annotated[str, Meta(pattern="^(manifest|file|tensor)$")]
    name: Text = ""  # of the file or tensor
    offset: Annotated[int, Meta(ge=0, lt=1 << 62)] = 0
    size: Annotated[int, Meta(ge=1, le=1 << 20)]


class ModelPart(Message, frozen=True, kw_only=True, tag="part"):
    """Body: the bytes asked for, fewer at the end. Whoever asked checks them against the model's root."""

    total: Annotated[int, Meta(ge=0, lt=1 << 62)]  # bytes of the manifest, file or tensor


# -- reachability: who can be dialled, and meeting those who can't -------------------------------------------------


class CheckReach(Message, frozen=True, kw_only=True, tag="check_reach"):
    """Dial me back, on a new connection, at the IP address that you see me at and these ports."""

    ports: Annotated[list[Annotated[int, Meta(ge=1, le=65_535)]], Meta(min_length=1, max_length=4)]


class Reached(Message, frozen=True, kw_only=True, tag="reached"):
    """Answer to :class:`CheckReach`. ``host``: the IP address that was dialled; ``ports``: where the asker answered."""

    host: Short
    ports: Annotated[list[Annotated[int, Meta(ge=1, le=65_535)]], Meta(max_length=4)] = []


class Reserve(Message, frozen=True, kw_only=True, tag="reserve"):
    """Let others meet me through you, as long as this connection lasts."""


class Reserved(Message, frozen=True, kw_only=True, tag="reserved"):
    """Answer to :class:`Reserve`; to be asked for again before ``ttl_s`` has passed."""

    ttl_s: Annotated[float, Meta(ge=0, le=86_400)]


class Meet(Message, frozen=True, kw_only=True, tag="meet"):
    """Asker → relay: I want a connection with ``target``. ``addrs``: where it could dial me instead."""

    target: PeerIdText
    addrs: Addresses = []


class Invite(Message, frozen=True, kw_only=True, tag="invite"):
    """Relay → target: ``peer`` wants a connection with you. ``host``: the IP address that the relay sees it at."""

    peer: PeerIdText
    host: Short
    addrs: Addresses = []
    token: Key


class Arranged(Message, frozen=True, kw_only=True, tag="arranged"):
    """Answer to :class:`Meet` and :class:`Invite`: the target has dialled the asker (``dialled``), or both open a
    circuit at the relay's port, with the byte 0xD5 and their token; then the asker is the client of TLS."""

    dialled: bool = False
    token: Annotated[bytes, Meta(max_length=32)] = b""  # of :class:`Meet`: the asker's


class Moved(Message, frozen=True, kw_only=True, tag="moved"):
    """My addresses are others than at the handshake. Answered with :class:`Pong`."""

    contact: Contact


Spreading = PushAdverts | PullAdverts | Doubt | AskSwarm
Meeting = CheckReach | Reserve | Meet | Invite | Moved
Request = Ping | FindNode | FindValue | Store | GetAdverts | Spreading | ExpertCall | Reopen | GetModelPart | Meeting
Reply = (
    Pong
    | Found
    | Stored
    | Adverts
    | Pushed
    | Pulled
    | Doubted
    | Offers
    | ExpertReply
    | ModelPart
    | Reached
    | Reserved
    | Arranged
    | Failure
)
Handshake = Hello | Prove | Welcome | Failure
AnyMessage = Hello | Prove | Welcome | Request | Reply

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[object, msgspec.msgpack.Decoder[object]] = {}
_decodes: dict[object, Callable[[bytes], object]] = {}

encode = _encoder.encode


def decode(kind: object, data: bytes) -> object:
    """``data`` of a peer as a message union or record struct.

    Raises:
        msgspec.DecodeError: whatever is wrong with the bytes.
    """
    return get_decode(kind)(data)


def get_decode(kind: object) -> Callable[[bytes], object]:
    """:func:`decode` for one kind, cached; for whoever decodes many."""
    decode_kind = _decodes.get(kind)
    if decode_kind is None:
        decode_kind = _decodes[kind] = _guard(get_decoder(kind).decode)
    return decode_kind


def _guard(decode_kind: Callable[[bytes], object]) -> Callable[[bytes], object]:
    def guarded(data: bytes) -> object:
        try:
            return decode_kind(data)
        except (RecursionError, ValueError) as error:  # ValueError: text that isn't UTF-8
            # msgspec lets these two out as they are, and no caller expects them of it.
            raise msgspec.DecodeError(f"neither deeply nested nor broken text is accepted: {error}") from None

    return guarded


def get_decoder(kind: object) -> msgspec.msgpack.Decoder[object]:
    """A cached typed decoder for a message union or record struct. For bytes of a peer take :func:`decode`."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)  # type: ignore[arg-type]
    return decoder
