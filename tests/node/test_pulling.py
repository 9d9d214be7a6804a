"""A model from peers: right ones, and every kind of wrong one."""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from daaswarm.config import HostConfig
from daaswarm.core.adverts import Known
from daaswarm.errors import ModelError, NoPeerCouldServe, RemoteProtocolError
from daaswarm.messages import Advert, Contact, Failure, GetModelPart, ModelPart, Reply, Request, Signed
from daaswarm.models import assembly as assembly_room
from daaswarm.models.manifest import MANIFEST_BYTES, Manifest, get_root
from daaswarm.models.manifest_file import MANIFEST_NAME
from daaswarm.models.sources import LocalModel, find_model, list_models
from daaswarm.net.handshake import Identity
from daaswarm.net.memory import MemoryHub
from daaswarm.net.pool import ConnectionPool
from daaswarm.node import pulling as room
from daaswarm.node.neighbour import GoodNeighbour
from daaswarm.node.pulling import Pulling
from daaswarm.node.sharing import Sharing
from daaswarm.testing.checkpoints import make_tiny_checkpoint
from daaswarm.types import ModelRoot, PeerId

Body = Sequence[Any]
Behaviour = Callable[[GetModelPart, Callable[[], Awaitable[tuple[ModelPart, Body]]]], Awaitable[tuple[Reply, Body]]]


class Shelf:
    """Stands for ``Hosting``: one model, whose files are what was loaded."""

    def __init__(self, model: LocalModel) -> None:
        self.model = model

    def get_source(self, root: ModelRoot) -> LocalModel | None:
        return self.model if root == self.model.root else None


class Giver:
    """A peer that hosts the model; ``behave`` answers instead of it if there is one."""

    def __init__(self, model: LocalModel, behave: Behaviour | None = None) -> None:
        self.sharing = Sharing(Shelf(model), GoodNeighbour(HostConfig(), lambda pause: None))  # type: ignore[arg-type]
        self.behave = behave
        self.asked: list[GetModelPart] = []
        self.pool: ConnectionPool

    async def handle(
        self, peer: PeerId, contact: Contact | None, message: Request, body: memoryview, deadline_s: float
    ) -> tuple[Reply, Body]:
        assert isinstance(message, GetModelPart)
        self.asked.append(message)

        async def answer() -> tuple[ModelPart, Body]:
            return await self.sharing.answer(message, deadline_s)

        return await (answer() if self.behave is None else self.behave(message, answer))


class Directory:
    """Stands for ``Discovery``: everybody is known."""

    def __init__(self, givers: list[Giver], root: ModelRoot) -> None:
        self.givers, self.root = givers, root

    async def find_adverts(self, root: ModelRoot) -> list[Known]:
        found: list[Known] = []
        for giver in self.givers:
            assert giver.pool.contact is not None
            advert = Advert(
                peer_id=giver.pool.peer_id, model_root=self.root, model_name="m", kind="moe", held={}, dtype="f32",
                device="cpu", addrs=giver.pool.contact.addrs, seq=1, expires_at=time.time() + 100,
            )  # fmt: skip
            found.append(Known(advert, Signed(public_key=bytes(32), signature=bytes(64), payload=b"")))
        return found


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    work = tmp_path_factory.mktemp("given")
    return find_model(str(make_tiny_checkpoint("llama", work / "llama")), work / "cache")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DAASWARM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(room, "PIECE_BYTES", 32_768)
    monkeypatch.setattr(room, "PIECE_S", 1.0)
    monkeypatch.setattr(assembly_room, "UNIT_BYTES", 65_536)
    return tmp_path / "cache"


@asynccontextmanager
async def open_puller(model: LocalModel, *givers: Giver) -> AsyncIterator[Pulling]:
    hub = MemoryHub()
    async with AsyncExitStack() as stack:
        for number, giver in enumerate(givers, start=1):
            giver.pool = await stack.enter_async_context(hub.open_node(make_identity(number), handler=giver.handle))
        asker = await stack.enter_async_context(
            hub.open_node(make_identity(0), handler=givers[0].handle, dialable=False)
        )
        yield Pulling(asker, Directory(list(givers), model.root))  # type: ignore[arg-type]
        for giver in givers:
            giver.sharing.close()


def make_identity(number: int) -> Identity:
    return Identity.from_seed(bytes([number + 1]) * 32, bytes(32), "test")


async def pull(puller: Pulling, root: str, said: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    async def emit(event: dict[str, Any]) -> None:
        if said is not None:
            said.append(event)

    return await puller.pull({"root": root}, emit)


def check_same(model: LocalModel, folder: Path, cache: Path) -> None:
    """What came is a model of the same root, whose every part is right."""
    assert find_model(model.root, cache).root == model.root
    shutil.copytree(folder, cache / "again")
    (cache / "again" / MANIFEST_NAME).unlink()
    assert find_model(str(cache / "again"), cache).root == model.root  # hashed anew


async def test_from_several_peers(model: LocalModel, cache: Path) -> None:
    givers = [Giver(model) for _ in range(3)]
    said: list[dict[str, Any]] = []
    async with open_puller(model, *givers) as puller:
        result = await pull(puller, model.root, said)
        again = await pull(puller, model.root)
    assert all(any(ask.kind == "tensor" for ask in giver.asked) for giver in givers)
    progress = [event for event in said if event["event"] == "progress" and event["what"] == "pulling"]
    assert progress[-1]["done"] == progress[-1]["total"] > 0
    assert again["folder"] == result["folder"] and again["bytes_received"] == 0
    check_same(model, Path(result["folder"]), cache)


async def give_wrong_bytes(message: GetModelPart, answer: Any) -> tuple[Reply, Body]:
    part, (data,) = await answer()
    return part, [bytes(data[:-1]) + bytes([data[-1] ^ 1]) if message.kind == "tensor" else data]


async def give_too_much(message: GetModelPart, answer: Any) -> tuple[Reply, Body]:
    part, (data,) = await answer()
    return part, [data + data] if message.kind == "tensor" else [data]


async def give_too_little(message: GetModelPart, answer: Any) -> tuple[Reply, Body]:
    part, (data,) = await answer()
    return part, [data[:-1]]


async def give_another_size(message: GetModelPart, answer: Any) -> tuple[Reply, Body]:
    part, body = await answer()
    return ModelPart(total=part.total + 8), body


async def give_gigabytes(message: GetModelPart, answer: Any) -> tuple[Reply, Body]:
    part, body = await answer()
    return (ModelPart(total=MANIFEST_BYTES + 1), body) if message.kind == "manifest" else (part, body)


async def give_another_manifest(message: GetModelPart, answer: Any) -> tuple[Reply, Body]:
    return (ModelPart(total=4), [b"\x81\xa1a\x01"]) if message.kind == "manifest" else await answer()


async def give_wrong_files(message: GetModelPart, answer: Any) -> tuple[Reply, Body]:
    part, (data,) = await answer()
    return part, [bytes(data)[::-1] if message.kind == "file" else data]


async def refuse(message: GetModelPart, answer: Any) -> tuple[Reply, Body]:
    return Failure(code="expert_error", message="not here"), []


async def be_silent(message: GetModelPart, answer: Any) -> tuple[Reply, Body]:
    if message.kind == "tensor":
        await trio.sleep_forever()
    return await answer()


@pytest.mark.parametrize(
    "behave",
    [
        give_wrong_bytes, give_too_much, give_too_little, give_another_size, give_gigabytes, give_another_manifest,
        give_wrong_files, refuse, be_silent,
    ],
)  # fmt: skip
async def test_a_bad_peer_is_dropped(model: LocalModel, cache: Path, behave: Behaviour) -> None:
    bad, good = Giver(model, behave), Giver(model)
    async with open_puller(model, bad, good) as puller:
        result = await pull(puller, model.root)
    peers = {peer["peer_id"]: peer["dropped"] for peer in result["peers"]}
    assert peers[bad.pool.peer_id] and not peers[good.pool.peer_id]
    check_same(model, Path(result["folder"]), cache)


@pytest.mark.parametrize("behave", [give_wrong_bytes, give_too_much, be_silent, refuse])
async def test_only_bad_peers(model: LocalModel, cache: Path, behave: Behaviour) -> None:
    async with open_puller(model, Giver(model, behave)) as puller:
        with pytest.raises(NoPeerCouldServe, match="can't be pulled"):
            await pull(puller, model.root)
    assert not list_models(cache) and not assembly_room.get_pulled_folder(cache, model.root).exists()


async def test_a_peer_that_stops_half_way(model: LocalModel, cache: Path) -> None:
    """What was verified is not asked for again."""
    first, count = Giver(model), 0

    async def stop(message: GetModelPart, answer: Any) -> tuple[Reply, Body]:
        nonlocal count
        count += message.kind == "tensor"
        if count > 20:
            raise RemoteProtocolError("gone", reject=False)
        return await answer()

    first.behave = stop
    async with open_puller(model, first) as puller:
        with pytest.raises(NoPeerCouldServe):
            await pull(puller, model.root)
    # A kill leaves more than was verified: pieces of parts, and here also a part that is wrong.
    partial = next((cache / "models").glob(".root-*.partial"))
    second, said = Giver(model), list[dict[str, Any]]()
    async with open_puller(model, second) as puller:
        result = await pull(puller, model.root, said)
    assert not partial.exists()
    pieces = sum(ask.size for ask in second.asked if ask.kind == "tensor")
    total = sum(unit.nbytes for entry in model.manifest.entries for unit in assembly_room.split(entry))
    assert 0 < pieces < total
    assert any("going on" in event.get("text", "") for event in said)
    check_same(model, Path(result["folder"]), cache)


async def test_cancelled(model: LocalModel, cache: Path) -> None:
    giver = Giver(model, be_silent)
    async with open_puller(model, giver) as puller:
        with trio.move_on_after(0.2) as scope:
            await pull(puller, model.root)
    assert scope.cancelled_caught and not list_models(cache)


@pytest.mark.parametrize(
    "name",
    ["../../evil", "/etc/evil", "evil.py", "additional_chat_templates/../x.jinja", "model.safetensors", "a/../b"],
)
async def test_a_manifest_that_names_other_files(model: LocalModel, cache: Path, name: str) -> None:
    """Its root is right: the user was given the root of a hostile model."""
    files = {**model.manifest.files, name: bytes(32)}
    hostile: Manifest = msgspec.structs.replace(model.manifest, files=files)
    hostile = msgspec.structs.replace(hostile, root=get_root(hostile))
    giver = Giver(model._replace(manifest=hostile))
    async with open_puller(model._replace(manifest=hostile), giver) as puller:
        with pytest.raises(ModelError, match="names a file"):
            await pull(puller, hostile.root)
    assert not (cache / "models").exists() or not [p for p in (cache / "models").iterdir() if p.suffix != ".lock"]


@pytest.mark.parametrize(
    ("kind", "name", "offset"),
    [("file", "../llama/config.json", 0), ("file", "model.safetensors", 0), ("tensor", "/etc/passwd", 0),
     ("tensor", "model.norm.weight", 1 << 40)],
)  # fmt: skip
async def test_what_is_not_given(model: LocalModel, kind: str, name: str, offset: int) -> None:
    giver = Giver(model)
    message = GetModelPart(model_root=model.root, kind=kind, name=name, offset=offset, size=10)
    with pytest.raises((room.DaaswarmError,)):
        await giver.sharing.answer(message, 10.0)
    giver.sharing.close()
