"""Who passes the handshake of a private swarm, what the others learn, and the allow-list."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from nacl.signing import SigningKey

from daaswarm import messages
from daaswarm.core.allow_list import AllowList
from daaswarm.core.signing import get_swarm_id
from daaswarm.core.swarm_keys import SwarmKey
from daaswarm.errors import BadProof, DaaswarmError, NotAllowed, WrongKey, WrongSwarm, WrongVersion
from daaswarm.messages import Contact, Failure, Hello, Prove, Welcome
from daaswarm.net import dataplane
from daaswarm.net.dataplane import TcpNetwork, open_tcp_network
from daaswarm.net.frames import FrameParser, encode_handshake
from daaswarm.net.handshake import ClientHandshake, Identity, ServerHandshake
from tests.net.net_helpers import serve

KEY, OTHER_KEY = SwarmKey("home", bytes(range(32))), SwarmKey("home", bytes(32))
BINDING = bytes(range(32, 64))


def make(number: int, key: SwarmKey | None = KEY, allow: tuple[str, ...] = (), **changes: Any) -> Identity:
    swarm = get_swarm_id("home") if key is None else key.realm
    fields = {"swarm": swarm, "agent": f"agent {number}", "swarm_key": key, "allowed": AllowList(allow)}
    return Identity(SigningKey(bytes([number]) * 32), **(fields | changes))


def decode(data: bytes) -> Iterator[Any]:
    parser = FrameParser(handshake=True)
    parser.feed(data)
    while (frame := parser.next_frame()) is not None:
        yield messages.decode(messages.Handshake, frame.header)


class Meeting:
    """Both sides, and what each has said."""

    def __init__(self, server: Identity, client: Identity, *, binding: bytes = BINDING) -> None:
        self.server = ServerHandshake(
            server, Contact(peer_id=server.peer_id, addrs=["/s"]), BINDING, observed_addr="/o"
        )
        self.client = ClientHandshake(client, Contact(peer_id=client.peer_id, addrs=["/c"]), binding, server.peer_id)
        self.by_server: list[Any] = []
        self.by_client: list[Any] = []
        self.last = self.server.start()

    def run(self) -> Meeting:
        turn = self.client
        while self.last:
            said = self.by_server if turn is self.client else self.by_client
            parser = FrameParser(handshake=True)
            parser.feed(self.last)
            said.extend(decode(self.last))
            frame = parser.next_frame()
            assert frame is not None
            self.last = turn.receive(frame)
            turn = self.server if turn is self.client else self.client
        return self


def test_with_the_key_both_pass() -> None:
    met = Meeting(make(1), make(2)).run()
    assert met.server.peer is not None and met.server.peer.peer_id == make(2).peer_id
    assert met.client.peer is not None and met.client.peer.contact == Contact(peer_id=make(1).peer_id, addrs=["/s"])
    assert [type(message) for message in met.by_server + met.by_client] == [Hello, Welcome, Prove]


@pytest.mark.parametrize("keys", [(KEY, OTHER_KEY), (KEY, None), (None, KEY)])
def test_a_client_tells_a_server_without_its_key_nothing(keys: tuple[SwarmKey | None, SwarmKey | None]) -> None:
    met = Meeting(make(1, keys[0]), make(2, keys[1])).run()
    assert type(met.client.error) is WrongKey and type(met.server.error) is WrongKey
    assert [message.code for message in met.by_client] == ["wrong_key"]
    assert make(2).peer_id not in met.by_client[0].message and "agent" not in met.by_client[0].message


class Blind(SwarmKey):
    """A stranger's client, which takes any server's proof."""

    def prove_server(self, binding: bytes, nonce: bytes, server: str) -> bytes:
        return KEY.prove_server(binding, nonce, server)


@pytest.mark.parametrize("stranger", [Blind("home", bytes(32)), Blind("home", secrets.token_bytes(32))])
def test_a_server_tells_a_client_without_the_key_nothing(stranger: SwarmKey) -> None:
    met = Meeting(make(1), make(2, stranger)).run()
    assert type(met.server.error) is WrongKey and met.server.peer is None
    hello, refusal = met.by_server
    assert set(msgspec.to_builtins(hello)) == {"t", "nonce", "swarm", "key_proof"}
    assert isinstance(refusal, Failure) and refusal.code == "wrong_key"
    assert "/s" not in str(refusal) and "/o" not in str(refusal) and "agent" not in str(refusal)


def test_the_key_is_asked_for_before_a_signature_is_checked() -> None:
    server = ServerHandshake(make(1), None, BINDING)
    server.start()
    frame = FrameParser(handshake=True)
    frame.feed(encode_handshake(messages.encode(Prove(public_key=make(2).public_key, signature=bytes(64)))))
    got = frame.next_frame()
    assert got is not None
    server.receive(got)
    assert type(server.error) is WrongKey


def test_a_public_swarm_takes_no_proof_of_a_key() -> None:
    server = ServerHandshake(make(1, None), None, BINDING)
    server.start()
    parser = FrameParser(handshake=True)
    proof = Prove(public_key=make(2).public_key, signature=bytes(64), key_proof=bytes(32))
    parser.feed(encode_handshake(messages.encode(proof)))
    frame = parser.next_frame()
    assert frame is not None
    server.receive(frame)
    assert type(server.error) is WrongKey


def test_a_proof_is_worth_nothing_elsewhere() -> None:
    # A stranger between two members passes the server's words on, under a certificate of its own.
    met = Meeting(make(1), make(2), binding=bytes(32)).run()
    assert type(met.client.error) is WrongKey
    # And what one side proves isn't what the other has to, nor is it twice the same.
    names = (BINDING, bytes(32), make(1).peer_id)
    proofs = [KEY.prove_server(*names), KEY.prove_client(*names, make(2).peer_id), OTHER_KEY.prove_server(*names)]
    proofs += [KEY.prove_client(BINDING, bytes([1]) * 32, make(1).peer_id, make(2).peer_id)]
    proofs += [KEY.prove_client(BINDING, bytes(32), make(3).peer_id, make(2).peer_id)]
    proofs += [SwarmKey("Home", KEY.secret).prove_server(BINDING, bytes([1]) * 32, make(1).peer_id)]
    assert len(set(proofs)) == len(proofs)


def test_what_went_wrong_has_a_name_of_its_own() -> None:
    met = Meeting(make(1), make(2, SwarmKey("work", bytes(range(32))))).run()
    assert type(met.client.error) is WrongSwarm and type(met.server.error) is WrongSwarm
    for code, kind in (("wrong_version", WrongVersion), ("bad_proof", BadProof), ("not_allowed", NotAllowed)):
        client = ClientHandshake(make(2), None, BINDING, make(1).peer_id)
        frame = FrameParser(handshake=True)
        frame.feed(encode_handshake(messages.encode(Failure(code=code, message="no"))))
        got = frame.next_frame()
        assert got is not None
        assert client.receive(got) == b"" and type(client.error) is kind


def test_the_allow_list_holds_both_ways() -> None:
    one, two = make(1), make(2)
    met = Meeting(make(1, allow=(two.peer_id,)), make(2, allow=(one.peer_id,))).run()
    assert met.client.peer is not None and met.server.peer is not None
    met = Meeting(make(1, allow=(make(3).peer_id,)), two).run()
    assert type(met.server.error) is NotAllowed and type(met.client.error) is NotAllowed
    assert two.peer_id in met.client.error.message and "swarm allow" in met.client.error.hint
    assert not any(isinstance(message, Welcome) for message in met.by_server)
    met = Meeting(one, make(2, allow=(make(3).peer_id,))).run()
    assert type(met.server.error) is NotAllowed and type(met.client.error) is NotAllowed
    assert two.peer_id not in str(met.by_client)  # it doesn't say who it is
    met = Meeting(make(1, None, (make(3).peer_id,)), make(2, None)).run()  # without a key too
    assert type(met.client.error) is NotAllowed


@asynccontextmanager
async def _open_two(one: Identity, two: Identity):
    async with open_tcp_network(one, handler=serve) as first, open_tcp_network(two, handler=serve) as second:
        yield first, second


async def connect(one: TcpNetwork, two: TcpNetwork) -> type[DaaswarmError] | None:
    assert two.contact is not None
    try:
        await one.connect(two.contact)
    except DaaswarmError as error:
        return type(error)
    return None


async def test_who_is_struck_off_while_it_proves_itself_does_not_come_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may take its time with the last message, and the list change meanwhile."""
    async with _open_two(make(1), make(2)) as (one, two):
        real = dataplane.shake_hands

        async def shake_hands(*arguments: Any) -> Any:
            hands = await real(*arguments)
            one.identity.allowed.replace([make(3).peer_id])
            return hands

        monkeypatch.setattr(dataplane, "shake_hands", shake_hands)
        assert await connect(one, two) is NotAllowed
        assert not one.connections
        one.identity.allowed.replace([])
        assert two.contact is not None and one.contact is not None
        await connect(two, one)
        assert not one.connections


async def test_over_sockets() -> None:
    async with _open_two(make(1), make(2)) as (one, two):
        assert await connect(one, two) is None
    for key, error in ((OTHER_KEY, WrongKey), (None, WrongKey), (SwarmKey("work", bytes(32)), WrongSwarm)):
        async with _open_two(make(1), make(2, key)) as (one, two):
            assert await connect(one, two) is error
            assert await connect(two, one) is error
            assert not one.connections and not two.connections
    async with _open_two(make(1, allow=(make(3).peer_id,)), make(2)) as (one, two):
        assert await connect(one, two) is NotAllowed
        assert await connect(two, one) is NotAllowed
        one.identity.allowed.replace([two.peer_id])
        assert await connect(two, one) is None
