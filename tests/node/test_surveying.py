"""What a node finds out about others: who serves what, whether it is right, and whom to leave out."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from daaswarm.core.adverts import Known
from daaswarm.core.courtesy import Pause
from daaswarm.errors import NoPeerCouldServe
from daaswarm.inference.plan import make_plan
from daaswarm.models.default import ROOT
from daaswarm.models.sources import DEFAULT_MODEL, KnownModel, find_model
from daaswarm.net.finding import Finder
from daaswarm.node import coordinator, surveying
from tests.node.node_helpers import deploy, emit, node


async def test_who_serves_what_and_is_it_right(moe: Path, tmp_path: Path) -> None:
    async with node(tmp_path / "a") as a, node(tmp_path / "b", bootstrap=a) as b:
        root = (await deploy(a, moe, layers="0-1"))["model_root"]
        ask = {"model": None, "tag": None, "bootstrap": []}
        (host,) = (await b.control("available", ask, emit))["hosts"]
        assert (host["peer_id"], host["model_root"], host["paused"]) == (a.peer_id, root, False)
        assert host["held"] == {"0": list(range(8)), "1": list(range(8))} and host["addrs"] == a.addrs
        for name in (moe.name, root, root[:8], str(moe)):
            assert len((await b.control("available", {**ask, "model": name}, emit))["hosts"]) == 1
        with pytest.raises(NoPeerCouldServe, match="nobody in the swarm serves nothing-such"):
            await b.control("available", {**ask, "model": "nothing-such"}, emit)

        (peer,) = (await b.control("peers", {}, emit))["peers"]
        assert peer["peer_id"] == a.peer_id and peer["connected"] and peer["rtt_ms"] > 0
        assert peer["agent"].startswith("daaswarm/")

        verify = {"model": str(moe), "peer": None, "samples": 4, "bootstrap": []}
        found = await b.control("verify", verify, emit)
        assert [h["verdict"] for h in found["hosts"]] == ["ok"] and found["wrong"] == []
        # Now the host swaps in other weights of the right shape.
        service = a.hosting.get_service()
        (hosted,) = service.models.values()
        hosted.layers[0] = hosted.layers[1]
        hosted.ids[0] = hosted.ids[1]
        found = await b.control("verify", {**verify, "samples": 16}, emit)
        assert found["wrong"] == [a.peer_id]
        assert {layer for layer, _ in found["hosts"][0]["wrong_experts"]} == {0}
        a.hosting.set_pause(Pause("quiet hours until 18:00", 60.0))
        found = await b.control("verify", verify, emit)
        assert [h["verdict"] for h in found["hosts"]] == ["paused"] and found["wrong"] == []
        with pytest.raises(NoPeerCouldServe, match="serves no tiny-olmoe"):
            await b.control("verify", {**verify, "peer": b.peer_id}, emit)


async def test_requesters_leave_a_paused_host_out_where_there_are_others(moe: Path, tmp_path: Path) -> None:
    async with node(tmp_path / "a") as a, node(tmp_path / "b", bootstrap=a) as b:
        await deploy(a, moe, layers="0-1")
        await deploy(b, moe, layers="1-2")
        model = find_model(str(moe), tmp_path / "cache")
        await b.discovery.find_adverts(model.root)
        b.hosting.set_pause(Pause("quiet hours", 60.0))
        known = await a.discovery.find_adverts(model.root)
        assert {k.advert.peer_id: k.advert.paused for k in known} == {a.peer_id: False, b.peer_id: True}
        plan = make_plan(model, known, "f32")
        hosts = {layer: set(by[0]) for layer, by in plan.by_layer.items()}
        assert hosts == {0: {a.peer_id}, 1: {a.peer_id}, 2: {b.peer_id}}  # nobody else has layer 2
        b.hosting.set_pause(None)
        known = await a.discovery.find_adverts(model.root)
        assert not any(k.advert.paused for k in known)


async def test_hosts_with_a_tag_are_found_where_the_dht_has_no_key_for_it(moe: Path, tmp_path: Path) -> None:
    opened = node(tmp_path / "a", tags=["Code", "german"])
    async with opened as a, node(tmp_path / "b", bootstrap=a) as b, node(tmp_path / "c", bootstrap=b) as c:
        await deploy(a, moe, layers="0")
        await deploy(b, moe, layers="1")
        a.discovery.spreader.get_load = lambda: 3.0
        ask = {"model": None, "tag": "code", "bootstrap": []}
        (host,) = (await c.control("available", ask, emit))["hosts"]
        assert (host["peer_id"], host["tags"], host["load"], host["price"]) == (a.peer_id, ["Code", "german"], 3.0, 0.0)
        with pytest.raises(NoPeerCouldServe, match="nobody in the swarm serves a model with the tag poetry"):
            await c.control("available", {**ask, "tag": "poetry"}, emit)


async def test_hosts_of_own_models_are_found_through_the_swarm(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the swarm is so large that this node knows none of them."""
    root = find_model(str(moe), tmp_path / "cache").root

    async def find_nothing(self: Finder, **what: object) -> list[Known]:
        return []

    monkeypatch.setattr(Finder, "find_all", find_nothing)
    monkeypatch.setattr(surveying, "list_models", lambda cache: [KnownModel("tiny", moe, root)])
    async with node(tmp_path / "a") as a, node(tmp_path / "b", bootstrap=a) as b:
        await deploy(a, moe, layers="0")
        (host,) = (await b.control("available", {"model": None, "tag": None, "bootstrap": []}, emit))["hosts"]
        assert (host["peer_id"], host["model_root"]) == (a.peer_id, root)
        (host,) = (await a.control("available", {"model": None, "tag": None, "bootstrap": []}, emit))["hosts"]
        assert host["self"]


async def test_the_default_model_is_looked_up_without_having_it() -> None:
    assert await surveying.find_root("default") == await surveying.find_root(DEFAULT_MODEL) == ROOT
    assert await surveying.find_root("nothing-such") is None


async def test_the_disk_is_not_read_on_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs must not hold the node's calls up."""
    threads: list[threading.Thread] = []

    def look(cache: Path) -> list[KnownModel]:
        threads.append(threading.current_thread())
        return []

    monkeypatch.setattr(coordinator, "list_models", look)
    monkeypatch.setattr(surveying, "list_models", look)
    async with node(tmp_path / "a") as a:
        assert (await a.control("status", {}, emit))["models"] == []
        assert (await a.control("available", {"model": None, "tag": None, "bootstrap": []}, emit))["hosts"] == []
    assert len(threads) == 2 and threading.main_thread() not in threads
