"""Experts that come, go and are taken up again: what is stored, what is served and what is said agree."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from daaswarm.errors import ConfigError, OutcomeUnknown, StorageError
from daaswarm.models.sources import find_model
from daaswarm.node import deploying
from daaswarm.node.coordinator import SwarmCoordinator
from daaswarm.node.hosting import Wish
from daaswarm.store.records import Deployment
from tests.node.node_helpers import deploy, emit, events, get_held, node, remove

ALL = list(range(8))


@pytest.fixture
def mounted(moe: Path, tmp_path: Path) -> Iterator[Path]:
    """A model on a disk of its own."""
    yield Path(shutil.copytree(moe, tmp_path / "disk" / moe.name))


def unmount(model: Path) -> None:
    model.parent.rename(model.parent.with_name("unmounted"))


def mount(model: Path) -> None:
    model.parent.with_name("unmounted").rename(model.parent)


async def get_stored(on: SwarmCoordinator) -> list[tuple[str, dict[int, list[int]]]]:
    return [(d.dtype, d.held) for d in await on.memory.store.get_deployments()]


async def list_experts(on: SwarmCoordinator) -> list[tuple[dict[str, list[int]], bool, str]]:
    return [(h["held"], h["deployed"], h["error"]) for h in (await on.control("experts", {}, emit))["hosted"]]


async def lend(on: SwarmCoordinator, model: Path, *, task_status: trio.TaskStatus[None], **changes: Any) -> None:
    """A ``host-expert`` that attached to the node."""
    values: dict[str, Any] = {"dtype": "f32", "held": {0: ALL}, "memory_bytes": 1 << 30, **changes}
    wish = Wish(find_model(str(model), model.parent), values["dtype"], values["held"], values["memory_bytes"])
    async with on.hosting.serve(wish, emit):
        task_status.started()
        await trio.sleep_forever()


# -- dtypes -------------------------------------------------------------------------------------------------------


async def test_what_is_refused_is_not_stored(moe: Path, tmp_path: Path) -> None:
    async with node(tmp_path / "a") as a:
        await deploy(a, moe, layers="0", dtype="bf16")
        with pytest.raises(ConfigError, match="in bf16 already"):
            await deploy(a, moe, layers="1", dtype="f32")
        assert await get_stored(a) == [("bf16", {0: ALL})] and a.hosting.used_bytes
        assert (await deploy(a, moe, layers="1"))["dtype"] == "bf16"  # as what is there
    async with node(tmp_path / "a") as a:
        await a.operating.deploying.restore(emit)
        assert await list_experts(a) == [({"0": ALL, "1": ALL}, True, "")]


async def test_a_deployment_that_is_not_served_keeps_its_dtype(mounted: Path, tmp_path: Path) -> None:
    async with node(tmp_path / "a") as a:
        await deploy(a, mounted, layers="0", dtype="bf16")
    unmount(mounted)
    async with node(tmp_path / "a") as a:
        await a.operating.deploying.restore(emit)
        mount(mounted)
        with pytest.raises(ConfigError, match="in bf16 already"):
            await deploy(a, mounted, layers="1", dtype="f32")
        assert (await deploy(a, mounted, layers="1"))["dtype"] == "bf16"
        assert await get_stored(a) == [("bf16", {0: ALL, 1: ALL})]


async def test_the_setting_is_the_default(moe: Path, tmp_path: Path) -> None:
    async with node(tmp_path / "a", dtype="f16") as a:
        assert (await deploy(a, moe, layers="0"))["dtype"] == "f16"


# -- what could not be served at a start ---------------------------------------------------------------------------


async def test_what_could_not_be_served_stays_until_its_owner_removes_it(mounted: Path, tmp_path: Path) -> None:
    async with node(tmp_path / "a") as a:
        await deploy(a, mounted, layers="0-1", experts="0-3")
    unmount(mounted)
    async with node(tmp_path / "a") as a:
        await a.operating.deploying.restore(emit)
        assert any(event.get("text", "").startswith("not served: tiny-olmoe") for event in events)
        mount(mounted)
        more = await deploy(a, mounted, layers="1-2", experts="4-5")
        stored = {0: [0, 1, 2, 3], 1: [0, 1, 2, 3, 4, 5], 2: [4, 5]}
        assert await get_stored(a) == [("f32", stored)]
        assert more["held"] == {"1": [0, 1, 2, 3, 4, 5], "2": [4, 5]}  # the layers named, all that is stored of them
        served, missing = await list_experts(a)
        assert served == (more["held"], True, "")
        assert missing[:2] == ({"0": [0, 1, 2, 3]}, True) and "tiny-olmoe" in missing[2]
        gone = await remove(a, mounted.name, layers="0-1", experts="0-1")  # of what is served, and of what is not
        assert gone["held"] == {"0": [2, 3], "1": [2, 3, 4, 5], "2": [4, 5]}
        assert await get_held(a) == {"1": [2, 3, 4, 5], "2": [4, 5]}
    async with node(tmp_path / "a") as a:
        await a.operating.deploying.restore(emit)
        assert await list_experts(a) == [(gone["held"], True, "")]


async def test_a_store_that_can_not_be_read_is_not_taken_for_empty(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse() -> list[Deployment]:
        raise StorageError("node.db: disk I/O error", hint="check the disk")

    async with node(tmp_path / "a") as a:
        await deploy(a, moe, layers="0", experts="0-3")
    async with node(tmp_path / "a") as a:
        with monkeypatch.context() as patch:
            patch.setattr(a.memory.store, "get_deployments", refuse)
            await a.operating.deploying.restore(emit)
            assert "disk I/O error" in caplog.text
            with pytest.raises(StorageError):
                await deploy(a, moe, layers="0", experts="4")
        await deploy(a, moe, layers="0", experts="4")
        assert await get_stored(a) == [("f32", {0: [0, 1, 2, 3, 4]})]


# -- at the same time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_there", [True, False])
async def test_a_removal_while_the_node_reads(
    is_there: bool, moe: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Path(shutil.copytree(dense, tmp_path / "mine" / dense.name))
    async with node(tmp_path / "a") as a:
        await deploy(a, moe, layers="0")
        await deploy(a, mine, layers="0")
    if not is_there:
        shutil.rmtree(mine)
    async with node(tmp_path / "a") as a:
        reading, go_on = trio.Event(), trio.Event()
        get_model = deploying.get_model

        async def get_slowly(*arguments: Any) -> Any:
            reading.set()
            await go_on.wait()
            return await get_model(*arguments)

        monkeypatch.setattr(deploying, "get_model", get_slowly)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.operating.deploying.restore, emit)
            await reading.wait()
            assert [error for _, _, error in await list_experts(a)] == ["not read yet", "not read yet"]
            nursery.start_soon(remove, a, dense.name)
            nursery.start_soon(remove, a, moe.name)
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()
        assert await list_experts(a) == [] and await get_stored(a) == []
        assert a.hosting.used_bytes == 0 and list(a.discovery.membership.own) == []


async def test_a_deploy_while_the_node_reads(
    moe: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(tmp_path / "a") as a:
        await deploy(a, dense, layers="0")
        await deploy(a, moe, layers="0-1")
    async with node(tmp_path / "a") as a:
        load, loads = a.hosting.load, []

        async def load_slowly(*arguments: Any) -> Any:
            loads.append(sorted(arguments[1]))
            if len(loads) == 1:
                nursery.start_soon(lambda: deploy(a, moe, layers="1-2"))
                await trio.testing.wait_all_tasks_blocked()
            return await load(*arguments)

        monkeypatch.setattr(a.hosting, "load", load_slowly)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.operating.deploying.restore, emit)
        assert loads == [[0], [1, 2], [0]]  # nothing twice
        (_, served) = await list_experts(a)
        assert served == ({"0": ALL, "1": ALL, "2": ALL}, True, "")
        assert [held for _, held in await get_stored(a)][1] == {0: ALL, 1: ALL, 2: ALL}


# -- beside host-expert --------------------------------------------------------------------------------------------


async def test_a_layer_is_served_by_one_of_both(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with node(tmp_path / "a") as a, trio.open_nursery() as nursery:
        await nursery.start(lend, a, moe)
        with pytest.raises(ConfigError, match="host-expert command serves tiny-olmoe, layers 0"):
            await deploy(a, moe, layers="0-1")
        await deploy(a, moe, layers="1")
        with pytest.raises(ConfigError, match="layers 1, already"):
            async with a.hosting.serve(Wish(find_model(str(moe), tmp_path), "f32", {1: [0]}, 1 << 30), emit):
                raise AssertionError
        await remove(a, moe.name)
        assert await list_experts(a) == [({"0": ALL}, False, "")]  # the other's is still there
        await deploy(a, moe, layers="1")
        nursery.cancel_scope.cancel()
    async with node(tmp_path / "a") as a:
        await a.operating.deploying.restore(emit)
        assert await get_held(a) == {"1": ALL}


async def test_the_choice_leaves_out_what_a_host_expert_serves_a_part_of(moe: Path, tmp_path: Path) -> None:
    async with node(tmp_path / "a") as a, trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: lend(a, moe, held={0: [0]}, task_status=task_status))
        assert (await deploy(a, moe))["added"] == {"1": ALL, "2": ALL}
        nursery.cancel_scope.cancel()


async def test_a_host_expert_that_comes_while_experts_are_read(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []
    async with node(tmp_path / "a") as a:
        load = a.hosting.load

        async def come() -> None:
            try:
                async with a.hosting.serve(Wish(find_model(str(moe), tmp_path), "f32", {0: ALL}, 1 << 30), emit):
                    pass
            except ConfigError as error:
                refused.append(error.message)

        async def load_slowly(*arguments: Any) -> Any:
            monkeypatch.setattr(a.hosting, "load", load)
            nursery.start_soon(come)
            await trio.testing.wait_all_tasks_blocked()
            return await load(*arguments)

        monkeypatch.setattr(a.hosting, "load", load_slowly)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: deploy(a, moe, layers="0"))
        assert len(refused) == 1 and "layers 0, already" in refused[0]
        assert await list_experts(a) == [({"0": ALL}, True, "")]


async def test_what_a_host_expert_took_before_it_was_restored(moe: Path, tmp_path: Path) -> None:
    async with node(tmp_path / "a") as a:
        await deploy(a, moe, layers="0-1")
    async with node(tmp_path / "a") as a:
        async with trio.open_nursery() as nursery:
            await nursery.start(lend, a, moe)
            await a.operating.deploying.restore(emit)
            lent, missing = await list_experts(a)
            assert lent == ({"0": ALL}, False, "") and "host-expert" in missing[2]
            with pytest.raises(ConfigError, match="host-expert"):
                await deploy(a, moe, layers="0")
            await remove(a, moe.name, layers="1")
            await remove(a, moe.name)
            assert await list_experts(a) == [lent]
            nursery.cancel_scope.cancel()
        assert await list_experts(a) == []


# -- a disk that doesn't answer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_written", [True, False])
async def test_after_an_unknown_outcome_the_store_is_read_again(
    is_written: bool, moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(tmp_path / "a") as a:
        await deploy(a, moe, layers="0-1")
        put = a.memory.store.put_deployment

        async def hang(deployment: Deployment) -> None:
            if is_written:
                await put(deployment)
            raise OutcomeUnknown("node.db: no answer from the disk", hint="do it again")

        async def fail(change: Any, **changes: Any) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(a.memory.store, "put_deployment", hang)
                with pytest.raises(OutcomeUnknown):
                    await change(a, moe if change is deploy else moe.name, **changes)

        await fail(deploy, layers="2")
        assert await get_held(a) == {"0": ALL, "1": ALL}
        await deploy(a, moe, layers="2")  # again
        assert await get_held(a) == {"0": ALL, "1": ALL, "2": ALL}
        await fail(remove, layers="0")
        await fail(remove, layers="1", experts="0-3")
        if is_written:
            assert await get_held(a) == {"1": ALL, "2": ALL}  # the first was seen when the second began
            with pytest.raises(ConfigError, match="nothing of tiny-olmoe in that range"):
                await remove(a, moe.name, layers="0")
            assert "0" not in await get_held(a) and "1" not in await get_held(a)
            await deploy(a, moe, layers="1", experts="4-7")
        else:
            await remove(a, moe.name, layers="0")
            await remove(a, moe.name, layers="1", experts="0-3")
        assert await list_experts(a) == [({"1": [4, 5, 6, 7], "2": ALL}, True, "")]
        assert await get_stored(a) == [("f32", {1: [4, 5, 6, 7], 2: ALL})]
