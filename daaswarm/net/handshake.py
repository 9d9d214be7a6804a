"""Who is there: the proof of the client's PeerId, sans-IO.

Server → Hello (nonce, swarm) → client → Prove (public key, signature) → server → Welcome. The server's own PeerId is
proven beforehand by the carrier (the libp2p extension of its TLS certificate); ``binding`` is that certificate's
SHA-256, so that a proof is worth nothing on any other connection. Either side may answer with a ``Failure`` instead.

In a private swarm Hello and Prove also prove the swarm's key. Each side checks that before anything else: a client says
nothing of itself to a server without the key, and a client without it learns no more than the server's Hello.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

import msgspec
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from daaswarm import messages
from daaswarm.core.allow_list import AllowList
from daaswarm.core.signing import get_handshake_payload, get_peer_id, get_swarm_id
from daaswarm.core.swarm_keys import SwarmKey, is_proof
from daaswarm.errors import (
    BadProof,
    ConfigError,
    DaaswarmError,
    NotAllowed,
    RemoteProtocolError,
    WrongKey,
    WrongSwarm,
    WrongVersion,
)
from daaswarm.messages import PROTOCOL_VERSION, Contact, Failure, Hello, Prove, Welcome
from daaswarm.net.failures import MESSAGE_CHARS, get_error, get_failure
from daaswarm.net.frames import Frame, encode_handshake
from daaswarm.types import PeerId

_KEY_HINT = "use one key on both nodes: daaswarm swarm show --key prints it, daaswarm swarm add takes it"


@dataclass(frozen=True)
class Identity:
    """This node's key and what it says about itself."""

    key: SigningKey
    swarm: bytes  # 32 bytes, in everything that is signed; of a private swarm, they depend on its key
    agent: str = ""
    swarm_key: SwarmKey | None = None  # of a private swarm
    allowed: AllowList = field(default_factory=AllowList)  # whom this node meets

    @classmethod
    def from_seed(cls, seed: bytes, swarm: bytes, agent: str = "") -> Identity:
        """Args: ``seed``: the 32 bytes of the Ed25519 key; ``swarm``: 32 bytes; ``agent``: free text, 64 letters."""
        if len(seed) != 32 or len(swarm) != 32:
            raise ConfigError(f"an identity needs a 32 byte seed and swarm id, not {len(seed)} and {len(swarm)} bytes")
        return cls(SigningKey(seed), swarm, agent[:64])

    @property
    def swarm_name(self) -> bytes:
        """What strangers are told of the swarm, 32 bytes: a hash of its name, whatever its key."""
        return get_swarm_id(self.swarm_key.name) if self.swarm_key is not None else self.swarm

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
    observed_addr: str = ""  # where it sees this node, if this node dialled it; its word only
    reached_at: str = ""  # the IP address and port where it proved itself, or the relay to it, if this node dialled


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
            return self._fail(RemoteProtocolError(f"an undecodable handshake message: {error}"[:MESSAGE_CHARS]))
        if isinstance(message, Failure):
            self.error = get_error(message, "the peer")
            return b""
        return self._handle(message)

    def _handle(self, message: object) -> bytes:
        raise NotImplementedError

    def _fail(self, error: RemoteProtocolError) -> bytes:
        self.error = error
        return _encode(get_failure(error))

    def _check_allowed(self, peer_id: PeerId) -> bytes:
        """The refusal of a peer that the allow-list leaves out, else nothing."""
        try:
            self._identity.allowed.check(peer_id)
        except NotAllowed as error:
            return self._fail(error)
        return b""

    def _check_contact(self, contact: Contact | None, peer_id: PeerId) -> bool:
        return contact is None or contact.peer_id == peer_id


class ServerHandshake(_Handshake):
    """Args: ``binding``: SHA-256 of this server's own certificate; ``observed_addr``: the client's address."""

    def __init__(self, identity: Identity, contact: Contact | None, binding: bytes, *, observed_addr: str = "") -> None:
        super().__init__(identity, contact, binding)
        self._observed_addr = observed_addr
        self._nonce = secrets.token_bytes(32)

    def start(self) -> bytes:
        identity, proof = self._identity, b""
        if identity.swarm_key is not None:
            proof = identity.swarm_key.prove_server(self._binding, self._nonce, identity.peer_id)
        return _encode(Hello(nonce=self._nonce, swarm=identity.swarm_name, key_proof=proof))

    def _handle(self, message: object) -> bytes:
        if not isinstance(message, Prove):
            return self._fail(RemoteProtocolError(f"{type(message).__name__} where Prove was due"))
        if message.version != PROTOCOL_VERSION:
            return self._fail(
                WrongVersion(
                    f"protocol version {message.version} met version {PROTOCOL_VERSION}",
                    hint=_advise_update(message.version, "the client's daaswarm", "the server's"),
                )
            )
        identity = self._identity
        peer_id = get_peer_id(message.public_key)
        key, proof = identity.swarm_key, message.key_proof
        if key is not None:
            if not is_proof(proof, key.prove_client(self._binding, self._nonce, identity.peer_id, peer_id)):
                return self._fail(WrongKey("this swarm has a key, and the client did not prove it", hint=_KEY_HINT))
        elif proof:
            return self._fail(WrongKey("the client proved a swarm key, but this swarm has none", hint=_KEY_HINT))
        if peer_id == identity.peer_id:
            return self._fail(BadProof(f"{peer_id} dialled itself", hint="two nodes must not share one key"))
        payload = get_handshake_payload(self._binding, self._nonce, identity.swarm, identity.peer_id, peer_id)
        try:
            VerifyKey(message.public_key).verify(payload, message.signature)
        except BadSignatureError:
            return self._fail(BadProof(f"the signature does not prove that the client is {peer_id}"))
        if refusal := self._check_allowed(peer_id):
            return refusal
        if not self._check_contact(message.contact, peer_id):
            return self._fail(BadProof(f"{peer_id} gave another peer's contact as its own"))
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
                return self._fail(RemoteProtocolError(f"{self._server} gave another peer's contact as its own"))
            self.observed_addr = message.observed_addr
            self.peer = ProvenPeer(self._server, message.contact, message.agent, message.observed_addr)
            return b""
        return self._fail(RemoteProtocolError(f"{type(message).__name__} out of turn"))

    def _prove(self, hello: Hello) -> bytes:
        identity = self._identity
        if hello.version != PROTOCOL_VERSION:
            return self._fail(
                WrongVersion(
                    f"protocol version {hello.version} of {self._server} met version {PROTOCOL_VERSION}",
                    hint=_advise_update(hello.version, "the peer's daaswarm", "this node's"),
                )
            )
        if hello.swarm != identity.swarm_name:
            names = f"{hello.swarm.hex()[:8]}, not {identity.swarm_name.hex()[:8]}"
            return self._fail(
                WrongSwarm(
                    f"{self._server} belongs to another swarm ({names})",
                    hint="use the same swarm on both nodes: daaswarm swarm show says which it is",
                )
            )
        key, proof = identity.swarm_key, b""
        if key is None:
            if hello.key_proof:
                text = f"{self._server} belongs to a private swarm of this name, and this node has no key"
                return self._fail(WrongKey(text, hint=_KEY_HINT))
        else:
            if not is_proof(hello.key_proof, key.prove_server(self._binding, hello.nonce, self._server)):
                text = f"{self._server} belongs to a swarm of this name, but has another key, or none"
                return self._fail(WrongKey(text, hint=_KEY_HINT))
            proof = key.prove_client(self._binding, hello.nonce, self._server, identity.peer_id)
        if refusal := self._check_allowed(self._server):
            return refusal
        self._proved = True
        payload = get_handshake_payload(self._binding, hello.nonce, identity.swarm, self._server, identity.peer_id)
        return _encode(
            Prove(
                public_key=identity.public_key,
                signature=identity.key.sign(payload).signature,
                key_proof=proof,
                contact=self._contact,
                agent=identity.agent,
            )
        )


def _advise_update(version: int, theirs: str, ours: str) -> str:
    return f"update the older of the two, {theirs if version < PROTOCOL_VERSION else ours}"


def _encode(message: messages.Handshake) -> bytes:
    return encode_handshake(messages.encode(message))
