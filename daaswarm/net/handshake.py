"""Who is there: the proof of the client's PeerId, sans-IO.

Server → Hello (nonce, swarm) → client → Prove (public key, signature) → server → Welcome. The server's own PeerId is
proven beforehand by the carrier (the libp2p extension of its TLS certificate); ``binding`` is that certificate's
SHA-256, so that a proof is worth nothing on any other connection. Either side may answer with a ``Failure`` instead.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import msgspec
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from daaswarm import messages
from daaswarm.core.signing import get_handshake_payload, get_peer_id
from daaswarm.errors import ConfigError, DaaswarmError, RemoteProtocolError
from daaswarm.messages import PROTOCOL_VERSION, Contact, Failure, Hello, Prove, Welcome
from daaswarm.net.failures import get_error
from daaswarm.net.frames import Frame, encode_handshake
from daaswarm.types import PeerId

WRONG_VERSION = "wrong_version"
WRONG_SWARM = "wrong_swarm"
BAD_PROOF = "bad_proof"


@dataclass(frozen=True)
class Identity:
    """This node's key and what it says about itself."""

    key: SigningKey
    swarm: bytes  # 32 bytes
    agent: str = ""

    @classmethod
    def from_seed(cls, seed: bytes, swarm: bytes, agent: str = "") -> Identity:
        """Args: ``seed``: the 32 bytes of the Ed25519 key; ``swarm``: 32 bytes; ``agent``: free text, 64 letters."""
        if len(seed) != 32 or len(swarm) != 32:
            raise ConfigError(f"an identity needs a 32 byte seed and swarm id, not {len(seed)} and {len(swarm)} bytes")
        return cls(SigningKey(seed), swarm, agent[:64])

    @property
    def public_key(self) -> bytes:
        return bytes(self.key.verify_key)

    @property
    def peer_id(self) -> PeerId:
        return get_peer_id(self.public_key)


@dataclass(frozen=True)
class ProvenPeer:
    """The other side of a connection, once proven."""

    peer_id: PeerId
    contact: Contact | None = None
    agent: str = ""


class _Handshake:
    """What both sides share: ``receive`` returns bytes to send; ``peer`` is set once the handshake is done.

    After ``error`` is set, send what ``receive`` returned (it tells the peer why), then close.
    """

    def __init__(self, identity: Identity, contact: Contact | None, binding: bytes) -> None:
        self.peer: ProvenPeer | None = None
        self.error: DaaswarmError | None = None
        self._identity = identity
        self._contact = contact
        self._binding = binding

    def receive(self, frame: Frame) -> bytes:
        try:
            message = messages.decode(messages.Handshake, frame.header)
        except msgspec.DecodeError as error:
            return self._fail("bad_message", f"an undecodable handshake message: {error}")
        if isinstance(message, Failure):
            self.error = get_error(message, "the peer")
            return b""
        return self._handle(message)

    def _handle(self, message: object) -> bytes:
        raise NotImplementedError

    def _fail(self, code: str, message: str, hint: str = "") -> bytes:
        self.error = RemoteProtocolError(message[:1000], hint=hint)
        return _encode(Failure(code=code, message=message[:1000], hint=hint))

    def _check_contact(self, contact: Contact | None, peer_id: PeerId) -> bool:
        return contact is None or contact.peer_id == peer_id


class ServerHandshake(_Handshake):
    """Args: ``binding``: SHA-256 of this server's own certificate; ``observed_addr``: the client's address."""

    def __init__(self, identity: Identity, contact: Contact | None, binding: bytes, *, observed_addr: str = "") -> None:
        super().__init__(identity, contact, binding)
        self._observed_addr = observed_addr
        self._nonce = secrets.token_bytes(32)

    def start(self) -> bytes:
        return _encode(Hello(nonce=self._nonce, swarm=self._identity.swarm))

    def _handle(self, message: object) -> bytes:
        if not isinstance(message, Prove):
            return self._fail("bad_message", f"{type(message).__name__} where Prove was due")
        if message.version != PROTOCOL_VERSION:
            return self._fail(
                WRONG_VERSION,
                f"protocol version {message.version} met version {PROTOCOL_VERSION}",
                "update the older of the two",
            )
        identity = self._identity
        peer_id = get_peer_id(message.public_key)
        if peer_id == identity.peer_id:
            return self._fail(BAD_PROOF, f"{peer_id} dialled itself", "two nodes must not share one key")
        payload = get_handshake_payload(self._binding, self._nonce, identity.swarm, identity.peer_id, peer_id)
        try:
            VerifyKey(message.public_key).verify(payload, message.signature)
        except BadSignatureError:
            return self._fail(BAD_PROOF, f"the signature does not prove that the client is {peer_id}")
        if not self._check_contact(message.contact, peer_id):
            return self._fail(BAD_PROOF, f"{peer_id} gave another peer's contact as its own")
        self.peer = ProvenPeer(peer_id, message.contact, message.agent)
        return _encode(
            Welcome(contact=self._contact, agent=self._identity.agent, observed_addr=self._observed_addr[:256])
        )


class ClientHandshake(_Handshake):
    """Args: ``server``: the PeerId that the carrier proved; ``binding``: SHA-256 of the server's certificate."""

    def __init__(self, identity: Identity, contact: Contact | None, binding: bytes, server: PeerId) -> None:
        super().__init__(identity, contact, binding)
        self.observed_addr = ""
        self._server = server
        self._proved = False

    def _handle(self, message: object) -> bytes:
        if isinstance(message, Hello) and not self._proved:
            return self._prove(message)
        if isinstance(message, Welcome) and self._proved:
            if not self._check_contact(message.contact, self._server):
                return self._fail("bad_message", f"{self._server} gave another peer's contact as its own")
            self.observed_addr = message.observed_addr
            self.peer = ProvenPeer(self._server, message.contact, message.agent)
            return b""
        return self._fail("bad_message", f"{type(message).__name__} out of turn")

    def _prove(self, hello: Hello) -> bytes:
        identity = self._identity
        if hello.version != PROTOCOL_VERSION:
            return self._fail(
                WRONG_VERSION,
                f"protocol version {hello.version} of {self._server} met version {PROTOCOL_VERSION}",
                "update the older of the two",
            )
        if hello.swarm != identity.swarm:
            return self._fail(
                WRONG_SWARM,
                f"{self._server} belongs to another swarm ({hello.swarm.hex()[:8]}, not {identity.swarm.hex()[:8]})",
                "use the same swarm name or key on both nodes",
            )
        self._proved = True
        payload = get_handshake_payload(self._binding, hello.nonce, identity.swarm, self._server, identity.peer_id)
        return _encode(
            Prove(
                public_key=identity.public_key,
                signature=identity.key.sign(payload).signature,
                contact=self._contact,
                agent=identity.agent,
            )
        )


def _encode(message: messages.Handshake) -> bytes:
    return encode_handshake(messages.encode(message))
