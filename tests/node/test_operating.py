"""Experts that are deployed and removed while a node runs, and files that change under it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from daaswarm.errors import ConfigError, ModelError, StorageError
from daaswarm.models.sources import find_model
from tests.node.node_helpers import ANY, deploy, emit, events, get_held, make_call, node, remove

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
        assert a.discovery.membership.own.get(first["model_root"]).held.keys() == {0, 1, 2}
        gone = await remove(a, moe.name, layers="1,2", experts="0-3")
        assert gone["removed"] == {"1": [0, 1, 2, 3], "2": [2, 3]}
        assert await get_held(a) == {"0": [0, 1, 2, 3], "1": [4, 5], "2": [4, 5]}
    async with node(tmp_path / "a") as a:  # the same key
        await a.operating.deploying.restore(emit)
        assert await get_held(a) == {"0": [0, 1, 2, 3], "1": [4, 5], "2": [4, 5]}
        assert any(event.get("text", "").startswith("serving tiny") for event in events)
        await remove(a, first["model_root"][:12])
        assert await get_held(a) == {} and first["model_root"] not in a.discovery.membership.own
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
