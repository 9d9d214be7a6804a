"""Real processes behind real NATs: who can't be dialled is met, through relays that see nothing but ciphertext."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio

from daaswarm.cli.run import attach
from daaswarm.models.sources import find_model
from daaswarm.net.relaying import CIRCUIT_BYTE, TOKEN_BYTES
from daaswarm.store.data_dir import DataDir
from tests.e2e.processes import Running, run_json, running
from tests.e2e.test_tiny_swarm import TOKENS, get_reference_text
from tests.netns.capture import capturing, read_flows
from tests.netns.world import World, inside_of, make_world, why_not

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(why_not()), reason=why_not() or "it works")]

PORT = 4001
LISTEN = ["--listen", f"/ip4/0.0.0.0/tcp/{PORT}"]
PROMPT = "The secret of the relay is that it reads nothing"
QUICK = {"DAASWARM_NETWORK_LIBP2P": "false"}  # it takes a second of every process
MANY = 150  # tokens, so that the relay dies before the last
CHANGE_S = 40  # for what a node notices by itself: a look is every two seconds, a dead connection after thirty


class Nodes(NamedTuple):
    """``relays``: two public nodes; ``host``: a node with all experts, behind a NAT."""

    world: World
    folder: Path
    model: str
    relays: list[Running]
    spaces: list[str]
    addrs: list[str]
    host: Running


@pytest.fixture(scope="module", autouse=True)
def own_cache(cache: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAASWARM_CACHE", str(cache))
        yield


@pytest.fixture(scope="module")
def nodes(moe: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    find_model(str(moe), cache)
    folder = tmp_path_factory.mktemp("nat")
    with make_world() as world, ExitStack() as stack:
        relays, spaces, addrs = [], [], []
        for number in range(2):
            space, _ = world.add_public()
            bootstrap = ["--bootstrap", addrs[0]] if addrs else []
            options = ["join", *LISTEN, *bootstrap, "--data-dir", str(folder / f"relay{number}")]
            relay = stack.enter_context(running(*options, prefix=inside_of(space), **QUICK))
            addrs.append(next(a for a in relay.wait_for("ready")["addrs"] if "127.0.0.1" not in a))
            relays.append(relay)
            spaces.append(space)
        space, _ = world.add_house()
        options = ["host-expert", str(moe), *LISTEN, "--bootstrap", addrs[0], "--data-dir", str(folder / "host")]
        host = stack.enter_context(running(*options, prefix=inside_of(space), **QUICK))
        host.wait_for("ready")
        yield Nodes(world, folder, str(moe), relays, spaces, addrs, host)


def wait_until(look: Callable[[], Any]) -> Any:
    """Until ``look`` finds something."""
    deadline = time.monotonic() + CHANGE_S
    while not (found := look()):
        assert time.monotonic() < deadline, look()
        time.sleep(0.3)
    return found


def get_status(nodes: Nodes, name: str) -> dict[str, Any]:
    return trio.run(attach, DataDir(nodes.folder / name), "status", {}, ignore)


async def ignore(event: dict[str, Any]) -> None:
    """``status`` has no events."""


def ask(nodes: Nodes, *options: str, space: str) -> dict[str, Any]:
    limits = ["--model", nodes.model, "--temperature", "0", "--max-tokens", str(TOKENS)]
    return run_json("infer", PROMPT, *limits, *options, prefix=inside_of(space), **QUICK)


def test_a_host_behind_a_nat_knows_it_and_has_relays(nodes: Nodes) -> None:
    def look() -> Any:
        status = get_status(nodes, "host")
        return status if len(status["reachability"]["relays"]) == 2 else None

    status = wait_until(look)
    reach = status["reachability"]
    assert reach["verdict"] == "unreachable" and not reach["is_relay"]
    circuits = [addr for addr in status["addrs"] if "/p2p-circuit/" in addr]
    assert sorted(addr.partition("/p2p-circuit")[0] for addr in circuits) == sorted(nodes.addrs)


def test_a_public_requester_is_dialled_by_the_host(nodes: Nodes, moe: Path) -> None:
    space, _ = nodes.world.add_public()
    before = [get_status(nodes, f"relay{n}")["reachability"]["bytes_passed"] for n in range(2)]
    options = ["join", *LISTEN, "--bootstrap", nodes.addrs[0], "--data-dir", str(nodes.folder / "asker")]
    with running(*options, prefix=inside_of(space), **QUICK) as asker:
        asker.wait_for("ready")
        answer = ask(nodes, "--data-dir", str(nodes.folder / "asker"), space=space)
        assert answer["text"] == get_reference_text(moe, PROMPT)
        peers = run_json("peers", "list", "--data-dir", str(nodes.folder / "asker"))["peers"]
        host = next(peer for peer in peers if peer["peer_id"] == get_status(nodes, "host")["peer_id"])
        assert host["connected"] and not host["relayed"]
        assert get_status(nodes, "host")["reachability"]["dialled_back"] > 0
    after = [get_status(nodes, f"relay{n}")["reachability"]["bytes_passed"] for n in range(2)]
    assert after == before


def test_two_behind_nats_meet_and_the_relay_reads_nothing(nodes: Nodes, moe: Path, tmp_path: Path) -> None:
    space, address = nodes.world.add_house()
    file = tmp_path / "packets"
    with capturing(nodes.world.street, file):
        answer = ask(nodes, "--bootstrap", nodes.addrs[0], "--data-dir", str(tmp_path / "asker"), space=space)
    assert answer["text"] == get_reference_text(moe, PROMPT)
    passed = [get_status(nodes, f"relay{n}")["reachability"]["bytes_passed"] for n in range(2)]
    assert max(passed) > 10_000

    flows = read_flows(file)
    circuits = {flow: data for flow, data in flows.items() if data[:1] == bytes([CIRCUIT_BYTE])}
    assert {flow[0] for flow in circuits} >= {address}  # the asker's NAT; and the host's
    assert len({flow[0] for flow in circuits}) == 2
    for flow, data in circuits.items():
        back = flows[flow[2], flow[3], flow[0], flow[1]]
        for stream in (data[1 + TOKEN_BYTES :], back):
            check_is_tls(stream)
    everything = b"".join(flows.values())
    assert len(everything) > 2 * max(passed)
    for secret in (PROMPT.encode(), answer["text"].encode(), b"model_root", b"find_node"):
        assert secret not in everything


def check_is_tls(stream: bytes) -> None:
    """A ClientHello or ServerHello, then nothing but records whose content is encrypted."""
    at, kinds = 0, []
    while at + 5 <= len(stream):
        kind, version, size = stream[at], stream[at + 1 : at + 3], int.from_bytes(stream[at + 3 : at + 5], "big")
        assert version in (b"\x03\x01", b"\x03\x03") and size <= 16_384 + 256
        kinds.append(kind)
        at += 5 + size
    assert kinds[0] == 22 and set(kinds[1:]) <= {20, 23}, kinds[:5]  # handshake; change_cipher_spec, application data
    assert kinds.count(23) > 2


def test_another_relay_takes_over_in_the_middle_of_an_answer(nodes: Nodes, moe: Path, tmp_path: Path) -> None:
    space, _ = nodes.world.add_house()
    limits = ["--model", nodes.model, "--temperature", "0", "--max-tokens", str(MANY), "--data-dir", str(tmp_path)]
    bootstrap = [option for addr in nodes.addrs for option in ("--bootstrap", addr)]
    with running("infer", PROMPT, *limits, *bootstrap, prefix=inside_of(space), **QUICK) as asker:
        asker.wait_for("text")
        circuits = [get_status(nodes, f"relay{n}")["reachability"]["circuits"] for n in range(2)]
        used = circuits.index(max(circuits))
        assert circuits[used] > 0
        nodes.relays[used].stop(9)
        before = asker.lines.qsize()
        assert asker.process.wait(60) == 0, asker.errors
        lines = list(iter(asker.lines.get, None))
    assert len(lines) > before + 10  # most of the answer came after that
    answer = lines[-1]
    assert answer["text"] == get_reference_text(moe, PROMPT, MANY)
    assert answer["completion_tokens"] == MANY

    def look() -> Any:
        addrs = [addr for addr in get_status(nodes, "host")["addrs"] if "/p2p-circuit/" in addr]
        return len(addrs) == 1 and addrs[0].startswith(nodes.addrs[1 - used])

    wait_until(look)
