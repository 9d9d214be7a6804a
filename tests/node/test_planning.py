"""``plan`` with live hosts and with described ones, and the warning before an answer."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from daaswarm.cli.plan import read_peers
from daaswarm.errors import ConfigError
from daaswarm.inference.plan import HostPlan
from daaswarm.messages import Contact
from daaswarm.models.sources import LocalModel, find_model
from daaswarm.net.links import SharedLinks
from daaswarm.node import advising
from daaswarm.node.advising import check_feasible, judge
from daaswarm.node.coordinator import SwarmCoordinator
from daaswarm.node.hosting import Wish
from daaswarm.types import ExpertId, PeerId
from tests.node.node_helpers import emit, events, node

RATE = 1e10  # bytes/s
ASKED: dict[str, Any] = {"peers": None, "memory_bytes": None, "prompt_tokens": 8, "dtype": None, "bootstrap": []}


@pytest.fixture
def model(dense: Path, cache: Path) -> LocalModel:
    return find_model(str(dense), cache)


def get_part(model: LocalModel, *layers: int) -> dict[int, list[int]]:
    return {layer: list(range(model.layers[layer])) for layer in layers}


async def plan(on: SwarmCoordinator, model: LocalModel, **changes: Any) -> dict[str, Any]:
    return await on.control("plan", {**ASKED, "model": str(model.folder), **changes}, emit)


async def test_live_hosts_are_measured(model: LocalModel, tmp_path: Path) -> None:
    first, *rest = sorted(model.layers)
    async with AsyncExitStack() as stack:
        a = await stack.enter_async_context(node(tmp_path / "0"))
        b, c = [await stack.enter_async_context(node(tmp_path / str(i), bootstrap=a)) for i in (1, 2)]
        await stack.enter_async_context(a.hosting.serve(Wish(model, "f32", get_part(model, first), 0), emit))
        found = await plan(c, model)
        sharded = next(option for option in found["options"] if option["way"] == "sharded")
        assert not sharded["is_possible"] and "have no host" in sharded["note"]
        await stack.enter_async_context(b.hosting.serve(Wish(model, "f32", get_part(model, *rest), 0), emit))
        found = await plan(c, model)
    json.dumps(found)
    assert {peer["name"] for peer in found["peers"]} == {a.peer_id, b.peer_id} and found["silent"] == []
    assert all(peer["round_ms"] > 0 and peer["layer_token_ms"] > 0 for peer in found["peers"])
    options = {option["way"]: option for option in found["options"]}
    assert options["sharded"]["is_possible"] and options["sharded"]["rounds_per_token"] == len(model.layers)
    assert options["whole"]["is_possible"]
    link = c.network.links.get(a.peer_id)
    assert link is not None and link.rtt_s > 0


async def test_described_hosts_decide(model: LocalModel, tmp_path: Path) -> None:
    """At half a millisecond it is split, at fifty it isn't, where it doesn't fit here."""
    file = tmp_path / "peers.toml"
    verdicts = []
    for rtt_ms in (0.5, 50_000):
        file.write_text(f'[[peers]]\nname = "a"\nmemory = "1GB"\nrtt_ms = {rtt_ms}\nbandwidth = "100MB"\n')
        async with node(tmp_path / "0") as a:
            memory = model.get_trunk_bytes("f32") + 1
            verdicts.append((await plan(a, model, peers=read_peers(file), memory_bytes=memory))["verdict"])
    assert [(verdict["way"], verdict["split"]) for verdict in verdicts] == [("sharded", True), ("none", False)]


def test_a_file_of_peers_in_json_and_what_is_wrong_with_one(tmp_path: Path) -> None:
    file = tmp_path / "peers"
    file.write_text('{"peers": [{"name": "a", "memory": "2GB", "rtt_ms": 3}]}')
    assert read_peers(file) == [
        {"name": "a", "memory_bytes": 2_000_000_000, "rtt_ms": 3.0, "bytes_per_s": None, "speed": 1.0}
    ]
    for text in (
        "",
        "[[peers]]\nname = 1",
        '[[peers]]\nname = "a"\nmemory = "2GB"\nrtt_ms = -1',
        '[[peers]]\nname = "a"\nmemory = "much"\nrtt_ms = 1',
        '[[peers]]\nname = "a"\nmemory = "2GB"\nrtt_ms = 1\ncolour = "red"',
        "{",
        "\0",
    ):
        file.write_text(text)
        with pytest.raises(ConfigError):
            read_peers(file)
    for name in ("memory", "bandwidth"):
        sizes = {"memory": "2GB", "bandwidth": "1MB"} | {name: "-4GB"}
        file.write_text(json.dumps({"peers": [{"name": "desk", "rtt_ms": 1, **sizes}]}))
        with pytest.raises(ConfigError, match=f"--peers {file}: {name} of 'desk': '-4GB'") as caught:
            read_peers(file)
        assert caught.value.hint == "write it like 4GB or 512MiB"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError):
        read_peers(file)
    with pytest.raises(ConfigError, match="No such file"):
        read_peers(tmp_path / "none")


def make_hosts(model: LocalModel, rtt_s: float) -> tuple[Any, HostPlan]:
    host = PeerId("12D3KooWH3uVF6wv47WnArKHk5p6cvgCJEb74UTmxztmQDc298L3")
    links = SharedLinks()
    links.note_sizes(host, 100, rtt_s, 0.0)
    holders = {ExpertId(layer, e): [host] for layer, count in model.layers.items() for e in range(count)}
    contacts = {host: Contact(peer_id=host, addrs=[])}
    network = SimpleNamespace(peer_id=PeerId("me"), links=links)
    return network, HostPlan(model.root, "f32", dict(model.layers), holders, contacts, kind=model.kind)


def test_far_hosts_are_warned_of_and_near_ones_are_not(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(*pack(model, 0.0001), RATE) is None
    text = judge(*pack(model, 0.050), RATE)
    assert text is not None and "50.0 ms away" in text and "--force" in text
    monkeypatch.setattr(advising, "ENOUGH_TOKENS_PER_S", 1.0)
    assert judge(*pack(model, 0.050), RATE) is None, "quick enough for anybody"


def pack(model: LocalModel, rtt_s: float) -> tuple[Any, LocalModel, HostPlan]:
    network, hosts = make_hosts(model, rtt_s)
    return network, model, hosts


def test_a_part_that_cannot_fit_is_refused(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    check_feasible(model, "f32")
    monkeypatch.setattr(advising.psutil, "virtual_memory", lambda: SimpleNamespace(total=10, available=5))
    with pytest.raises(ConfigError, match="requester's part"):
        check_feasible(model, "f32")


@pytest.mark.parametrize("force", [False, True])
async def test_an_answer_is_warned_of_but_not_stopped(
    model: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    from daaswarm.node import answering

    async def warn(*arguments: object) -> str:
        return "warning: slow"

    monkeypatch.setattr(answering, "get_warning", warn)
    params = {
        "model": str(model.folder), "prompt": "hello", "max_tokens": 2, "temperature": 0.0, "top_p": 1.0, "seed": None,
        "system": None, "history": [], "stop": [], "raw": True, "dtype": None, "embedded": None, "bootstrap": [],
        "force": force,
    }  # fmt: skip
    async with AsyncExitStack() as stack:
        a = await stack.enter_async_context(node(tmp_path / "0"))
        b = await stack.enter_async_context(node(tmp_path / "1", bootstrap=a))
        await stack.enter_async_context(a.hosting.serve(Wish(model, "f32", get_part(model, *model.layers), 0), emit))
        result = await b.control("infer", params, emit)
    assert result["completion_tokens"] == 2
    assert any(event.get("text") == "warning: slow" for event in events) == (not force)
