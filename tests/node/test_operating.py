"""Nodes that are operated while they run: experts come and go, others are looked at, the owner has the first word."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import trio

from daaswarm.config import Config, HostConfig, NetworkConfig
from daaswarm.core.courtesy import CpuSample, Pause
from daaswarm.errors import Busy, ConfigError, ModelError, NoPeerCouldServe, StorageError
from daaswarm.experts.service import ExpertService, HostedModel
from daaswarm.inference.plan import make_plan
from daaswarm.messages import ExpertCall
from daaswarm.models.sources import find_model
from daaswarm.net.dataplane import TcpNetwork
from daaswarm.node.coordinator import SwarmCoordinator
from daaswarm.node.life import open_node
from daaswarm.node.neighbour import SAMPLE_S, GoodNeighbour, measure_cpu
from daaswarm.node.systemd import Systemd
from daaswarm.node.vigil import Vigil
from daaswarm.store.data_dir import DataDir
from daaswarm.types import PeerId
from tests.experts.test_service import ScaledLayer

ANY: dict[str, Any] = {"layers": None, "experts": None, "slices": None, "dtype": None, "memory_bytes": None}
events: list[dict[str, Any]] = []


async def emit(event: dict[str, Any]) -> None:
    events.append(event)


@pytest.fixture(autouse=True)
def home(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAASWARM_CACHE", str(cache))
    events.clear()


@asynccontextmanager
async def node(
    folder: Path, *, bootstrap: SwarmCoordinator | None = None, **host: Any
) -> AsyncIterator[SwarmCoordinator]:
    config = Config(network=NetworkConfig(libp2p=False), host=HostConfig(threads=1, **host))
    async with open_node(DataDir(folder), config, listen=True, libp2p=False, is_owner=True) as opened:
        if bootstrap is not None:
            await opened.bootstrap(bootstrap.addrs)
        yield opened


async def deploy(on: SwarmCoordinator, model: Path, **changes: Any) -> dict[str, Any]:
    return await on.control("deploy", {**ANY, "model": str(model), **changes}, emit)


async def remove(on: SwarmCoordinator, model: str, **changes: Any) -> dict[str, Any]:
    return await on.control("undeploy", {**ANY, "model": model, **changes}, emit)


async def get_held(on: SwarmCoordinator) -> dict[str, list[int]]:
    hosted = (await on.control("experts", {}, emit))["hosted"]
    return hosted[0]["held"] if hosted else {}


# -- deploying ----------------------------------------------------------------------------------------------------


async def test_experts_come_and_go_and_outlive_the_node(moe: Path, tmp_path: Path) -> None:
    async with node(tmp_path / "a") as a:
        first = await deploy(a, moe, layers="0-1", experts="0-3")
        assert first["added"] == first["held"] == {"0": [0, 1, 2, 3], "1": [0, 1, 2, 3]}
        assert first["bytes_read"] == first["bytes_held"] > 0
        more = await deploy(a, moe, layers="1-2", experts="2-5")
        assert more["added"] == {"1": [4, 5], "2": [2, 3, 4, 5]}
        again = await deploy(a, moe, layers="1", experts="2-5")
        assert again["added"] == {} and "already" in again["lines"][0]
        assert a.discovery.book is not None and a.discovery._own[first["model_root"]].held.keys() == {0, 1, 2}
        gone = await remove(a, moe.name, layers="1,2", experts="0-3")
        assert gone["removed"] == {"1": [0, 1, 2, 3], "2": [2, 3]}
        assert await get_held(a) == {"0": [0, 1, 2, 3], "1": [4, 5], "2": [4, 5]}
    async with node(tmp_path / "a") as a:  # the same key
        await a.operating.deploying.restore(emit)
        assert await get_held(a) == {"0": [0, 1, 2, 3], "1": [4, 5], "2": [4, 5]}
        assert any(event.get("text", "").startswith("serving tiny") for event in events)
        await remove(a, first["model_root"][:12])
        assert await get_held(a) == {} and first["model_root"] not in a.discovery._own
    async with node(tmp_path / "a") as a:
        await a.operating.deploying.restore(emit)
        assert await get_held(a) == {}


async def test_calls_in_flight_survive_a_removal(dense: Path, tmp_path: Path) -> None:
    async with node(tmp_path / "a") as a:
        root = (await deploy(a, dense, layers="0"))["model_root"]
        service = a.hosting.get_service()
        _, layer = service._check(*make_call(service))
        await remove(a, dense.name)
        assert service.models == {}
        rows = torch.ones(1, 64)
        assert torch.isfinite(layer.compute_slices(rows, [0])).all() and root


def make_call(service: ExpertService) -> tuple[ExpertCall, int]:
    (hosted,) = service.models.values()
    call = ExpertCall(
        model_root=hosted.root, layer=next(iter(hosted.layers)), experts=[0], dtype="f32", rows=1, hidden=hosted.hidden
    )
    return call, 4 * hosted.hidden


async def test_the_memory_limit_is_kept(moe: Path, tmp_path: Path) -> None:
    size = find_model(str(moe), tmp_path / "cache").expert_bytes(0, "f32")
    async with node(tmp_path / "a", memory=str(10 * size)) as a:
        await deploy(a, moe, layers="0")
        with pytest.raises(ConfigError, match=r"the limit is .* of which are in use") as info:
            await deploy(a, moe, layers="1")
        assert "--memory" in info.value.hint
        with pytest.raises(ConfigError, match="are free of the"):
            await deploy(a, moe, memory_bytes=3 * size)
        filled = await deploy(a, moe)  # as much as fits
        assert sum(map(len, filled["added"].values())) == 2 and "0" not in filled["added"]
        assert a.hosting.used_bytes == 10 * size
        await remove(a, moe.name, layers="0")
        await deploy(a, moe, memory_bytes=8 * size)
        assert a.hosting.used_bytes == 10 * size


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "/nowhere"}, "nowhere"),
        ({"layers": "99"}, "not in 99"),
        ({"slices": "0"}, "is split into experts"),
        ({"layers": "0", "experts": "8"}, "has 8"),
    ],
)
async def test_what_can_not_be_deployed(changes: dict[str, Any], said: str, moe: Path, tmp_path: Path) -> None:
    async with node(tmp_path / "a") as a:
        with pytest.raises(ConfigError, match=said):
            await a.control("deploy", {**ANY, "model": str(moe), **changes}, emit)
        with pytest.raises(ConfigError, match="not deployed on this node"):
            await remove(a, moe.name)
        await deploy(a, moe, layers="0", experts="0")
        with pytest.raises(ConfigError, match="nothing of tiny-olmoe in that range"):
            await remove(a, moe.name, layers="1")
        with pytest.raises(ConfigError, match="in f32 already"):
            await deploy(a, moe, layers="1", dtype="bf16")


async def test_a_full_disk_changes_nothing(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with node(tmp_path / "a") as a:
        await deploy(a, moe, layers="0")

        async def refuse(*arguments: object) -> None:
            raise StorageError("node.db: database or disk is full", hint="check the disk")

        with monkeypatch.context() as patch:
            patch.setattr(a.memory.store, "put_deployment", refuse)
            patch.setattr(a.memory.store, "remove_deployment", refuse)
            with pytest.raises(StorageError, match="disk is full"):
                await deploy(a, moe, layers="1")
            with pytest.raises(StorageError, match="disk is full"):
                await remove(a, moe.name)
            assert await get_held(a) == {"0": list(range(8))}
            assert a.hosting._reserved == 0
        await deploy(a, moe, layers="1")


# -- files --------------------------------------------------------------------------------------------------------


async def test_a_file_that_changes_under_the_host_is_noticed_and_refused(
    moe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = Path(shutil.copytree(moe, tmp_path / "mine"))
    async with node(tmp_path / "a") as a:
        await deploy(a, mine, layers="0")
        await a.hosting.check_files()
        assert not caplog.records or "changed on disk" not in caplog.text
        weights = mine / "model.safetensors"
        size = weights.stat().st_size
        with weights.open("r+b") as file:
            file.truncate(size // 2)  # who had mapped it would die of SIGBUS at the next call
        await a.hosting.check_files()
        await a.hosting.check_files()
        assert caplog.text.count("was changed on disk (model.safetensors)") == 1
        (hosted,) = (await a.control("experts", {}, emit))["hosted"]
        assert hosted["changed_files"] == ["model.safetensors"]
        verified = a.hosting.get_service()
        call, size = make_call(verified)
        call = msgspec.structs.replace(call, pairs=1)
        body = memoryview(bytearray(size + 8) + bytearray(b"\0\0\x80\x3f"))
        assert verified.compute(call, body)  # still what was read and checked
        with pytest.raises(ModelError, match="cut off"):
            await deploy(a, mine, layers="1")
    async with node(tmp_path / "a") as a:
        await a.operating.deploying.restore(emit)  # says so, and starts
        (hosted,) = (await a.control("experts", {}, emit))["hosted"]
        assert "cut off" in hosted["error"] and a.hosting.service is None


# -- looking at others --------------------------------------------------------------------------------------------


async def test_who_serves_what_and_is_it_right(moe: Path, tmp_path: Path) -> None:
    async with node(tmp_path / "a") as a, node(tmp_path / "b", bootstrap=a) as b:
        root = (await deploy(a, moe, layers="0-1"))["model_root"]
        ask = {"model": None, "bootstrap": []}
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


# -- the good neighbour -------------------------------------------------------------------------------------------


async def test_a_busy_machine_and_quiet_hours(autojump_clock: trio.testing.MockClock) -> None:
    load = [0.0]
    changes: list[Pause | None] = []
    began = trio.current_time()
    busy_s = 0.0

    class Measured(GoodNeighbour):
        """Without the thread: virtual time would run on while it works."""

        async def _sample(self) -> CpuSample:
            nonlocal busy_s
            busy_s += load[0] * SAMPLE_S * (os.cpu_count() or 1)
            return CpuSample(trio.current_time(), busy_s, 0.0)

    neighbour = Measured(
        HostConfig(pause_when_busy=0.5, quiet_hours=["08:00-18:00"]),
        changes.append,
        tell_time=lambda: (trio.current_time() - began, 1e9 + trio.current_time() - began),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(neighbour.keep_watching)
        await trio.sleep(60)
        assert neighbour.describe() is None and changes == []
        load[0] = 0.9
        await trio.sleep(30)
        assert neighbour.describe() == {
            "reason": "other programs use more than 50% of this machine's cores",
            "until": None,
        }
        load[0] = 0.1
        await trio.sleep(30)
        assert neighbour.pause is None
        await trio.sleep(8 * 3600)
        assert neighbour.pause is not None and neighbour.pause.reason == "quiet hours until 18:00"
        neighbour.leave()
        assert neighbour.pause.reason == "this node is leaving"


async def test_answers_wait_for_the_upload_limit(autojump_clock: trio.testing.MockClock) -> None:
    neighbour = GoodNeighbour(HostConfig(upload="1kB"), lambda pause: None)
    began = trio.current_time()
    assert neighbour.may_send_now(1000)
    for _ in range(3):
        async with neighbour.uploading(1000, 30.0):
            pass
    assert trio.current_time() - began == pytest.approx(2.0)  # a second's worth goes at once
    assert not neighbour.may_send_now(1)
    with pytest.raises(Busy, match=r"upload limit \(1.0 kB/s\)") as info:
        async with neighbour.uploading(5000, 4.0):
            raise AssertionError("refused before it is computed")
    assert info.value.retry_after_s == pytest.approx(3.0)
    with pytest.raises(ConfigError):
        async with neighbour.uploading(1000, 30.0):
            raise ConfigError("failed")
    await trio.sleep(1)
    assert neighbour.may_send_now(1000)  # what failed was not sent


def test_processor_time_is_measured() -> None:
    before = measure_cpu()
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    after = measure_cpu()
    assert after.at > before.at and after.own_s >= before.own_s + 0.03 and after.busy_s >= before.busy_s


# -- leaving ------------------------------------------------------------------------------------------------------


async def test_calls_in_flight_are_answered_when_the_node_leaves(tmp_path: Path) -> None:
    layer = ScaledLayer([0])
    layer.gate = threading.Event()
    answers: list[object] = []
    async with node(tmp_path / "b") as b:
        async with trio.open_nursery() as nursery, node(tmp_path / "a", bootstrap=b) as a:
            root = "ab" * 32
            service = a.hosting.get_service()
            service.add(HostedModel(root, "slow", "dense", 3, "f32", {0: layer}))  # type: ignore[arg-type]
            a.hosting.advertise(root)  # type: ignore[arg-type]
            contact = a.network.contact
            assert contact is not None
            call = ExpertCall(model_root=root, layer=0, experts=[0], dtype="f32", rows=64, hidden=3)
            body = bytes(4 * 64 * 3)

            async def ask() -> None:
                answers.append(await b.network.call(contact, call, [body], deadline_s=20.0))

            nursery.start_soon(ask)
            while not layer.threads:  # noqa: ASYNC110 - a thread sets it
                await trio.sleep(0.01)

            async def look() -> None:
                while a.neighbour.pause is None:  # noqa: ASYNC110 - until it leaves
                    await trio.sleep(0.01)
                with pytest.raises(Busy, match="leaving"):
                    await b.network.call(contact, call, [body], deadline_s=20.0)
                while a.discovery._own:  # noqa: ASYNC110 - withdrawn while the call still runs
                    await trio.sleep(0.01)
                assert not answers
                assert layer.gate is not None
                layer.gate.set()

            nursery.start_soon(look)
        assert len(answers) == 1


# -- clocks -------------------------------------------------------------------------------------------------------


async def test_a_clock_that_is_set_back_loses_nothing(moe: Path, tmp_path: Path) -> None:
    async with node(tmp_path / "a") as a, node(tmp_path / "b", bootstrap=a) as b:
        root = (await deploy(a, moe, layers="0"))["model_root"]
        before = a.discovery._sign(root)
        publication = a.discovery.kademlia._publications[bytes.fromhex(root)]
        due, seen = publication.due_at, [e.seen_at for e in a.discovery.kademlia.table.get_entries()]
        wall, monotonic = [time.time()], [0.0]
        vigil = Vigil(a.network, a.discovery, a.hosting, wall=lambda: wall[0], monotonic=lambda: monotonic[0])
        await vigil.look()
        wall[0] -= 3600
        monotonic[0] += 5
        await vigil.look()
        moved = [e.seen_at for e in a.discovery.kademlia.table.get_entries()]
        assert moved == pytest.approx([at - 3605 for at in seen])
        after = a.discovery._sign(root)
        assert after != before and a.discovery.kademlia._publications[bytes.fromhex(root)].due_at != due
        assert b.discovery.book.put(after, time.time())
        assert not b.discovery.book.put(before, time.time())  # the newer one has the higher number all the same


async def test_after_a_suspension_dead_connections_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []

    async def check(self: TcpNetwork) -> None:
        checked.append(len(self.connections))

    async with node(tmp_path / "a") as a, node(tmp_path / "b", bootstrap=a) as b:
        await b.network.check_connections()
        assert b.network.is_connected(PeerId(a.peer_id))  # it answers
        monkeypatch.setattr(TcpNetwork, "check_connections", check)
        wall, monotonic = [1e9], [0.0]
        vigil = Vigil(b.network, b.discovery, b.hosting, wall=lambda: wall[0], monotonic=lambda: monotonic[0])
        await vigil.look()
        wall[0] += 5
        monotonic[0] += 5
        await vigil.look()
        assert checked == []
        wall[0] += 8 * 3600
        await vigil.look()
        assert checked == [1]


# -- systemd ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="systemd is Linux's")
@pytest.mark.parametrize("abstract", [False, True])
async def test_systemd_is_told(abstract: bool, tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    name = f"@daaswarm-{tmp_path.name}" if abstract else str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("\0" + name[1:] if abstract else name)
        listening.setblocking(False)

        def read() -> list[str]:
            found: list[str] = []
            try:
                while True:
                    found.append(listening.recv(200).decode())
            except BlockingIOError:
                return found

        systemd = Systemd({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "4000000"})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(systemd.keep_alive)
            await trio.sleep(25)
            assert set(read()) == {"EXTEND_TIMEOUT_USEC=30000000"}
            systemd.ready()
            await trio.sleep(5)
            assert read() == ["READY=1", "WATCHDOG=1", "WATCHDOG=1", "WATCHDOG=1"]
            systemd.stopping()
            assert read() == ["STOPPING=1"]
            nursery.cancel_scope.cancel()


async def test_without_systemd_nothing_is_said(tmp_path: Path) -> None:
    for environ in ({}, {"NOTIFY_SOCKET": "vsock:1:2"}, {"NOTIFY_SOCKET": str(tmp_path / "gone")}):
        systemd = Systemd(environ)
        systemd.ready()
        systemd.stopping()
    other = Systemd({"NOTIFY_SOCKET": str(tmp_path / "n"), "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"})
    assert other.watchdog_s == 0.0
    await Systemd({}).keep_alive()
