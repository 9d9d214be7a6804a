"""``network diagnose`` over real sockets on loopback, with short deadlines; ``tests/e2e`` has what needs processes."""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from net_helpers import SWARM, get_identity

from daaswarm.core.allow_list import AllowList
from daaswarm.core.diagnosis import Step
from daaswarm.core.notary import ADVERT_KIND, KeyNotary
from daaswarm.core.routing_table import get_node_id
from daaswarm.core.signing import get_swarm_id, seal
from daaswarm.core.swarm_keys import SwarmKey
from daaswarm.errors import Unreachable
from daaswarm.messages import Advert, Adverts, Contact, FindNode, Found, GetAdverts, Pong, Request
from daaswarm.net import serving as net_serving
from daaswarm.net.addresses import parse_address
from daaswarm.net.dataplane import TcpNetwork, open_tcp_network
from daaswarm.net.examining import Examiner, Patience, explain, find_fault
from daaswarm.net.handshake import Identity
from daaswarm.net.tls import TlsCarrier, create_tls_contexts

SHORT = Patience(connect_s=0.5, handshake_s=0.5, call_s=0.5)
PASSED = ["name", "interface", "tcp", "tls", "peer id", "version", "swarm", "swarm key"]
KEYS = [SwarmKey("home", bytes([number]) * 32) for number in (1, 2)]


async def answer(peer_id: str, contact: Contact | None, message: Request, body: memoryview, deadline_s: float) -> Any:
    return (Adverts(adverts=[]) if isinstance(message, GetAdverts) else Found()), []


@asynccontextmanager
async def two(
    server: Identity | None = None, client: Identity | None = None, **options: Any
) -> AsyncIterator[tuple[TcpNetwork, TcpNetwork]]:
    async with (
        open_tcp_network(server or get_identity(1), handler=answer, **options) as peer,
        open_tcp_network(client or get_identity(2), handler=answer, listen=[]) as asker,
    ):
        yield peer, asker


async def examine(asker: TcpNetwork, addr: str, patience: Patience = SHORT) -> dict[str, Step]:
    told: list[Step] = []

    async def tell(step: Step) -> None:
        told.append(step)

    with trio.fail_after(20):
        steps, _ = await Examiner(asker, KeyNotary(asker.identity.key, SWARM), tell, patience).examine(addr)
    assert told == steps
    assert len({step.name for step in steps}) == len(steps) == 13
    return {step.name: step for step in steps}


def get_failed(steps: dict[str, Step]) -> Step:
    (failed,) = [step for step in steps.values() if step.verdict == "failed"]
    assert failed.next
    names = list(steps)
    before = names[: names.index(failed.name)]
    assert {steps[name].verdict for name in before} <= {"ok", "warning"}
    assert {steps[name].verdict for name in names[names.index(failed.name) + 1 :]} <= {"skipped"}
    return failed


def get_addr(peer: TcpNetwork) -> str:
    assert peer.contact is not None
    return peer.contact.addrs[0]


def get_free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


async def test_a_healthy_peer() -> None:
    async with two() as (peer, asker):
        steps = await examine(asker, get_addr(peer))
        assert list(steps)[:8] == PASSED
        assert {step.verdict for name, step in steps.items() if name != "relay"} == {"ok"}
        bare = get_addr(peer).partition("/p2p/")[0]
        assert peer.peer_id in (await examine(asker, bare))["peer id"].seen


async def test_no_connection_is_left_beside_another() -> None:
    async with two() as (peer, asker):
        await asker.connect_addr(get_addr(peer))
        kept = asker.get(peer.peer_id)
        for _ in range(6):
            assert (await examine(asker, get_addr(peer)))["data"].verdict == "ok"
        assert asker.get(peer.peer_id) is kept and kept is not None and kept.is_open


async def test_nothing_listens() -> None:
    async with two() as (_, asker):
        failed = get_failed(await examine(asker, f"/ip4/127.0.0.1/tcp/{get_free_port()}"))
    assert failed.name == "tcp" and "nothing listens there" in failed.next


async def test_a_silent_listener() -> None:
    async with two() as (_, asker):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            failed = get_failed(await examine(asker, f"/ip4/127.0.0.1/tcp/{listener.getsockname()[1]}"))
    assert failed.name == "tls" and "says nothing" in failed.next and failed.seconds > 0.4


async def test_silence_after_tls() -> None:
    contexts = create_tls_contexts(get_identity(3).key)

    async def shake_only(stream: trio.SocketStream) -> None:
        with socket.socket(fileno=stream.socket.detach()) as sock:
            carrier = TlsCarrier(sock, contexts.server, binding=contexts.binding, remote_addr="?")
            await carrier.shake_hands()
            await trio.sleep(2)

    async with two() as (_, asker), serving(shake_only) as port:
        failed = get_failed(await examine(asker, f"/ip4/127.0.0.1/tcp/{port}"))
    assert failed.name == "version" and "silent after TLS" in failed.next and "speaks TLS" in failed.seen


async def test_somebody_else_answers() -> None:
    async with two() as (peer, asker):
        bare = get_addr(peer).partition("/p2p/")[0]
        failed = get_failed(await examine(asker, f"{bare}/p2p/{get_identity(9).peer_id}"))
        assert failed.name == "peer id" and "ask for its current address" in failed.next
        failed = get_failed(await examine(peer, bare))
        assert failed.name == "peer id" and "this node itself" in failed.seen


@pytest.mark.parametrize(
    ("server", "client", "name", "advice"),
    [
        ({"swarm": get_swarm_id("a")}, {"swarm": get_swarm_id("b")}, "swarm", "swarm show"),
        ({"swarm_key": KEYS[0]}, {"swarm_key": KEYS[1]}, "swarm key", "one key on both nodes"),
        ({"swarm_key": KEYS[0]}, {"swarm": get_swarm_id("home")}, "swarm key", "one key on both nodes"),
        ({"allowed": AllowList([get_identity(9).peer_id])}, {}, "swarm key", "swarm allow"),
        ({}, {"allowed": AllowList([get_identity(9).peer_id])}, "swarm key", "swarm allow"),
    ],
)
async def test_who_is_not_let_in(server: dict[str, Any], client: dict[str, Any], name: str, advice: str) -> None:
    def make(number: int, changes: dict[str, Any]) -> Identity:
        swarm = changes["swarm_key"].realm if "swarm_key" in changes else SWARM
        return Identity(get_identity(number).key, **{"swarm": swarm, **changes})

    async with two(make(1, server), make(2, client)) as (peer, asker):
        failed = get_failed(await examine(asker, get_addr(peer)))
    assert failed.name == name and advice in failed.next


async def test_large_messages_that_do_not_pass() -> None:
    """A middlebox, or a too large MTU, that lets handshakes through and drops what comes in bulk."""
    async with two() as (peer, asker):
        behind = parse_address(get_addr(peer)).port

        async def pass_little(stream: trio.SocketStream) -> None:
            there = await trio.open_tcp_stream("127.0.0.1", behind)

            async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
                passed = 0
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    async for data in source:
                        passed += len(data)
                        if passed > 16_000:
                            await trio.sleep_forever()
                        await sink.send_all(data)

            async with there, stream, trio.open_nursery() as nursery:
                nursery.start_soon(pump, stream, there)
                nursery.start_soon(pump, there, stream)

        async with serving(pass_little) as port:
            steps = await examine(asker, f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer.peer_id}")
    assert all(steps[name].verdict == "ok" for name in (*PASSED, "clock", "dht"))
    assert steps["advert"].verdict == "warning"  # the address isn't one that it announces
    assert steps["data"].verdict == "failed" and "MTU" in steps["data"].next
    assert "small messages pass" in steps["data"].seen


async def test_an_announced_port_that_is_blocked() -> None:
    first, second = get_free_port(), get_free_port()
    announce = [f"/ip4/127.0.0.1/tcp/{port}" for port in (first, second)]
    async with two(listen=[announce[0]], announce=announce) as (peer, asker):
        steps = await examine(asker, get_addr(peer))
        assert steps["data"].verdict == "warning"
        assert f"tcp/{second}" in steps["data"].next and f"tcp/{first}" not in steps["data"].next
        assert "KiB there and back" in steps["data"].seen


async def test_nothing_that_is_announced_answers_or_another_does() -> None:
    async with open_tcp_network(get_identity(3), handler=answer) as other:
        bare = get_addr(other).partition("/p2p/")[0]
        async with two(listen=[f"/ip4/127.0.0.1/tcp/{(port := get_free_port())}"], announce=[bare]) as (_, asker):
            steps = await examine(asker, f"/ip4/127.0.0.1/tcp/{port}")
    assert steps["data"].verdict == "failed" and "--announce" in steps["data"].next
    assert f"answered as {other.peer_id}" in steps["data"].seen and steps["advert"].verdict == "warning"


async def test_a_peer_that_announces_rubbish() -> None:
    async with two() as (peer, asker):
        addr = get_addr(peer)
        peer.contact = Contact(peer_id=peer.peer_id, addrs=["rubbish\x1b[2J", "/ip4/1.2.3.4/udp/1", addr])
        steps = await examine(asker, addr)
    assert steps["data"].verdict == "warning" and "not an address" in steps["data"].seen


async def test_what_others_know_of_it() -> None:
    """The peers nearest to it are asked, as it names them."""
    known: list[Contact] = []
    neighbours: list[Contact] = []

    async def tell_known(peer_id: str, contact: Contact | None, message: Request, body: Any, deadline_s: float) -> Any:
        assert message == FindNode(target=get_node_id(get_identity(1).peer_id))
        return Found(contacts=known), []

    async def tell_neighbours(peer_id: str, contact: Any, message: Request, body: Any, deadline_s: float) -> Any:
        return (Adverts(adverts=[]) if isinstance(message, GetAdverts) else Found(contacts=neighbours)), []

    async with (
        open_tcp_network(get_identity(1), handler=tell_neighbours) as peer,
        open_tcp_network(get_identity(2), handler=answer, listen=[]) as asker,
        open_tcp_network(get_identity(3), handler=tell_known) as neighbour,
    ):
        assert peer.contact is not None and neighbour.contact is not None
        gone = Contact(peer_id=get_identity(4).peer_id, addrs=[f"/ip4/127.0.0.1/tcp/{get_free_port()}"])
        neighbours += [neighbour.contact, gone, peer.contact]
        addr = get_addr(peer)
        steps = await examine(asker, addr)
        assert steps["advert"].verdict == "warning" and "0 of 1 other peers" in steps["advert"].seen
        known.append(peer.contact)
        steps = await examine(asker, addr)
        assert steps["advert"].verdict == "ok" and "1 of 1 other peers" in steps["advert"].seen
        known[0] = Contact(peer_id=peer.peer_id, addrs=["/ip4/192.0.2.9/tcp/1"])
        steps = await examine(asker, addr)
        assert steps["advert"].verdict == "warning" and "192.0.2.9" in steps["advert"].seen


@pytest.mark.parametrize("said", [math.nan, math.inf, -math.inf])
async def test_a_clock_that_is_no_time(monkeypatch: pytest.MonkeyPatch, said: float) -> None:
    monkeypatch.setattr(net_serving, "Pong", lambda **fields: Pong(**{**fields, "time": said}))
    async with two() as (peer, asker):
        assert (await examine(asker, get_addr(peer)))["clock"].verdict == "skipped"


async def test_anothers_advert_is_not_what_a_peer_serves() -> None:
    advert = Advert(
        peer_id=get_identity(3).peer_id, model_root="0" * 64, model_name="other", kind="moe", held={0: b"\x01"},
        dtype="f32", device="cpu", addrs=[], seq=1, expires_at=time.time() + 60,
    )  # fmt: skip
    signed = seal(advert, ADVERT_KIND, get_identity(3).key, SWARM)

    async def tell(peer_id: str, contact: Any, message: Request, body: Any, deadline_s: float) -> Any:
        return (Adverts(adverts=[signed]) if isinstance(message, GetAdverts) else Found(contacts=[])), []

    async with (
        open_tcp_network(get_identity(1), handler=tell) as peer,
        open_tcp_network(get_identity(2), handler=answer, listen=[]) as asker,
    ):
        step = (await examine(asker, get_addr(peer)))["advert"]
    assert step.verdict == "failed" and advert.peer_id in step.seen


async def test_a_surprise_while_dialling_is_a_verdict(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def surprise(der: bytes) -> None:
        raise AttributeError("a certificate that the library trips over")

    monkeypatch.setattr("daaswarm.net.tls.get_certified_peer_id", surprise)
    async with two() as (peer, asker):
        assert get_failed(await examine(asker, get_addr(peer))).seen.endswith("the log has the details")
        assert await find_fault(asker, get_addr(peer), SHORT) is not None
    assert "AttributeError" in caplog.text


async def test_the_short_form() -> None:
    async with two() as (peer, asker):
        assert await find_fault(asker, get_addr(peer), SHORT) is None
        nobody = f"/ip4/127.0.0.1/tcp/{get_free_port()}"
        step = await find_fault(asker, nobody, SHORT)
        assert step is not None and step.name == "tcp" and "nothing listens" in step.next
        with pytest.raises(Unreachable) as raised:
            await asker.connect_addr(nobody)
        for addr in (nobody, "/dns4/peer.invalid/tcp/1", "rubbish"):
            assert explain(raised.value, addr).name == "tcp"


@asynccontextmanager
async def serving(handle: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[int]:
    """A listener of somebody else's; its port."""
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, handle, [listener])
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()
