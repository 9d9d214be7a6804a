"""What one peer may take of a node that gives its models away: nothing that others need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from daaswarm.config import HostConfig
from daaswarm.errors import Busy, ExpertError, ModelError
from daaswarm.messages import GetModelPart
from daaswarm.models.checkpoint import Checkpoint
from daaswarm.models.sources import LocalModel, find_model
from daaswarm.node import sharing as room
from daaswarm.node.neighbour import GoodNeighbour
from daaswarm.node.sharing import OPEN_MODELS, WAITING, WAITING_PER_PEER, Sharing
from daaswarm.testing.checkpoints import make_tiny_checkpoint
from daaswarm.types import ModelRoot, PeerId

TENSOR, BYTES = "model.embed_tokens.weight", 131_072  # of the tiny model
HONEST, GREEDY = PeerId("honest"), PeerId("greedy")


class Shelves:
    """Stands for ``Hosting``."""

    def __init__(self, *models: LocalModel) -> None:
        self.models = {model.root: model for model in models}

    def get_source(self, root: ModelRoot) -> LocalModel | None:
        return self.models.get(root)


class Inline(Sharing):
    """Without the thread: virtual time would run on while it works."""

    async def _run(self, source: Any, work: Callable[[], Any]) -> Any:
        await trio.lowlevel.checkpoint()
        return work()


class Counted(Checkpoint):
    """One that counts the files which are open."""

    made: list[Counted]

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.made.append(self)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    work = tmp_path_factory.mktemp("given")
    return find_model(str(make_tiny_checkpoint("llama", work / "llama")), work / "cache")


@pytest.fixture
def count_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    Counted.made = []
    monkeypatch.setattr(room, "Checkpoint", Counted)
    yield lambda: sum(len(checkpoint._files) for checkpoint in Counted.made)
    Counted.made.clear()


def make_sharing(model: LocalModel, upload: str = "") -> tuple[Sharing, GoodNeighbour]:
    neighbour = GoodNeighbour(HostConfig(upload=upload), lambda pause: None)
    return Inline(Shelves(model), neighbour), neighbour  # type: ignore[arg-type]


def ask(model: LocalModel, size: int = BYTES, **changes: Any) -> GetModelPart:
    return GetModelPart(**{"model_root": model.root, "kind": "tensor", "name": TENSOR, "size": size, **changes})


def make_copies(model: LocalModel, count: int) -> list[LocalModel]:
    """The same files as so many models."""
    roots = [f"{number:064x}" for number in range(count)]
    return [model._replace(manifest=msgspec.structs.replace(model.manifest, root=root)) for root in roots]


# -- bytes --------------------------------------------------------------------------------------------------------


async def test_who_gives_up_leaves_no_debt(
    model: LocalModel, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "SHARED_BYTES_PER_S", 2 * BYTES)
    sharing, _ = make_sharing(model, upload=f"{2 * BYTES}B")
    for _ in range(5):
        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = trio.current_time() + 0.001
            for _ in range(WAITING_PER_PEER):
                nursery.start_soon(sharing.answer, GREEDY, ask(model), 30.0)
    began = trio.current_time()
    await sharing.answer(HONEST, ask(model), 2.0)
    assert trio.current_time() - began <= 1.0
    assert not any(sharing._ahead) and not sharing._waiting
    sharing.close()


async def test_what_would_be_too_late_is_refused_at_once(
    model: LocalModel, autojump_clock: trio.testing.MockClock
) -> None:
    sharing, neighbour = make_sharing(model, upload=f"{BYTES // 8}B")
    began = trio.current_time()
    with pytest.raises(Busy, match="as much as it may") as info:
        await sharing.answer(HONEST, ask(model), 4.0)
    assert trio.current_time() == began and info.value.retry_after_s == pytest.approx(7.5 - 2.0)
    await sharing.answer(HONEST, ask(model), 20.0)
    assert trio.current_time() - began == pytest.approx(7.5, abs=0.1)  # and half a second's worth is left
    assert neighbour.may_send_now(BYTES // 16)
    sharing.close()


async def test_the_piece_in_turn_counts_once(model: LocalModel, autojump_clock: trio.testing.MockClock) -> None:
    sharing, _ = make_sharing(model, upload=f"{BYTES // 8}B")
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sharing.answer, GREEDY, ask(model), 60.0)
        await trio.sleep(7.0)  # it takes 7.5 s, so what is left for the next is 0.5 s and 8 s of its own
        nursery.start_soon(sharing.answer, HONEST, ask(model), 18.0)  # half of that, 9 s, is for waiting
    assert trio.current_time() - began == pytest.approx(7.5 + 8.0, abs=0.5)
    sharing.close()


async def test_only_what_is_sent_counts(model: LocalModel, autojump_clock: trio.testing.MockClock) -> None:
    size = (model.folder / "config.json").stat().st_size
    sharing, _ = make_sharing(model, upload=f"{4 * size}B")
    began = trio.current_time()
    for _ in range(2):
        _, (data,) = await sharing.answer(HONEST, ask(model, 1 << 20, kind="file", name="config.json"), 1.0)
        assert len(data) == size
    assert trio.current_time() == began
    sharing.close()


async def test_what_can_not_be_read_is_not_counted_as_sent(
    model: LocalModel, autojump_clock: trio.testing.MockClock
) -> None:
    sharing, neighbour = make_sharing(model, upload=f"{2 * BYTES}B")

    def fail(*_: object) -> bytes:
        raise ExpertError("gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "read_tensor", fail)
        with pytest.raises(ExpertError, match="gone"):
            await sharing.answer(HONEST, ask(model), 10.0)
    assert neighbour.may_send_now(2 * BYTES)
    sharing.close()


async def test_answers_to_calls_go_before_pieces(model: LocalModel, autojump_clock: trio.testing.MockClock) -> None:
    sharing, neighbour = make_sharing(model, upload="100kB")
    came = 0

    async def pull() -> None:
        nonlocal came
        while True:
            try:
                _, (data,) = await sharing.answer(GREEDY, ask(model, 32_768), 10.0)
                came += len(data)
            except Busy as busy:
                await trio.sleep(busy.retry_after_s)

    async with trio.open_nursery() as nursery:
        for _ in range(WAITING_PER_PEER):
            nursery.start_soon(pull)
        for _ in range(100):
            await trio.sleep(0.1)
            began = trio.current_time()
            async with neighbour.uploading(5_000, 1.0):
                pass
            assert trio.current_time() == began
        # Ten seconds, of which calls took half; up to half a burst is kept for them, and the other half is gone.
        assert 400_000 <= came <= 550_000
        nursery.cancel_scope.cancel()


async def test_pieces_for_which_calls_leave_nothing_are_refused(
    model: LocalModel, autojump_clock: trio.testing.MockClock
) -> None:
    sharing, neighbour = make_sharing(model, upload="100kB")

    async def call() -> None:
        while True:
            neighbour.note_sent(10_000)
            await trio.sleep(0.1)

    async with trio.open_nursery() as nursery:
        neighbour.note_sent(40_000)
        nursery.start_soon(call)
        began = trio.current_time()
        with pytest.raises(Busy, match="as much as it may"):
            await sharing.answer(HONEST, ask(model, 32_768), 10.0)
        assert trio.current_time() - began == pytest.approx(5.0)  # the other half of the deadline is the way back
        nursery.cancel_scope.cancel()
    await trio.sleep(1.0)
    assert neighbour.may_send_now(100_000)
    sharing.close()


# -- places -------------------------------------------------------------------------------------------------------


async def test_one_peer_takes_no_places_of_others(model: LocalModel, autojump_clock: trio.testing.MockClock) -> None:
    sharing, neighbour = make_sharing(model, upload="100kB")
    neighbour.note_sent(100_000)
    refused: list[Busy] = []

    async def try_it(peer: PeerId) -> None:
        try:
            await sharing.answer(peer, ask(model, 100), 30.0)
        except Busy as busy:
            refused.append(busy)

    async with trio.open_nursery() as nursery:
        for _ in range(WAITING):
            nursery.start_soon(try_it, GREEDY)
        await trio.testing.wait_all_tasks_blocked()
        assert len(refused) == WAITING - WAITING_PER_PEER
        refused.clear()
        nursery.start_soon(try_it, HONEST)
    assert not refused and not sharing._waiting
    sharing.close()


# -- files --------------------------------------------------------------------------------------------------------


async def test_files_of_many_models_are_closed(
    model: LocalModel, count_open: Callable[[], int], autojump_clock: trio.testing.MockClock
) -> None:
    """Each is asked for while all others are waiting to send, or done."""
    models = make_copies(model, 3 * OPEN_MODELS)
    neighbour = GoodNeighbour(HostConfig(upload="100kB"), lambda pause: None)
    sharing = Inline(Shelves(*models), neighbour)  # type: ignore[arg-type]
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            for number, each in enumerate(models):
                nursery.start_soon(sharing.answer, PeerId(str(number)), ask(each, 10_000), 30.0)
        assert 0 < count_open() <= OPEN_MODELS
        assert len(sharing._open) == OPEN_MODELS
    for each in models:
        await sharing.answer(HONEST, ask(each, 10), 30.0)
    assert count_open() == OPEN_MODELS
    sharing.close()
    assert count_open() == 0


async def test_files_are_closed_that_are_in_use_when_all_are(
    model: LocalModel, count_open: Callable[[], int], autojump_clock: trio.testing.MockClock
) -> None:
    sharing, neighbour = make_sharing(model, upload="100kB")
    await sharing.answer(HONEST, ask(model, 10), 30.0)
    neighbour.note_sent(100_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sharing.answer, HONEST, ask(model, 10_000), 30.0)
        await trio.testing.wait_all_tasks_blocked()
        sharing.close()
        assert count_open() == 1
    assert count_open() == 0 and not sharing._open


async def test_a_model_that_was_loaded_anew_is_read_where_it_is_now(
    model: LocalModel, count_open: Callable[[], int], tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    sharing, _ = make_sharing(model)
    await sharing.answer(HONEST, ask(model, 10), 30.0)
    sharing._hosting.models[model.root] = model._replace(folder=tmp_path)  # type: ignore[attr-defined]
    with pytest.raises(ModelError) as info:
        await sharing.answer(HONEST, ask(model, 10), 30.0)
    assert str(tmp_path) in info.value.message
    assert count_open() == 0
