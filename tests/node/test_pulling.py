"""A model from peers: right ones, and every kind of wrong one."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import trio

from daaswarm.config import HostConfig
from daaswarm.core.adverts import Known
from daaswarm.errors import Busy, DeadlineExceeded, ExpertError, ModelError, NoPeerCouldServe, RemoteProtocolError
from daaswarm.messages import Advert, Contact, Failure, GetModelPart, ModelPart, Reply, Request, Signed
from daaswarm.models import assembly as assembly_room
from daaswarm.models.manifest import MANIFEST_BYTES, Manifest, get_root
from daaswarm.models.manifest_file import MANIFEST_NAME, load_manifest
from daaswarm.models.sources import LocalModel, find_model, list_models
from daaswarm.net.handshake import Identity
from daaswarm.net.memory import MemoryHub
from daaswarm.net.pool import ConnectionPool
from daaswarm.node import givers as givers_room
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
            return await self.sharing.answer(peer, message, deadline_s)

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
    monkeypatch.setattr(givers_room, "PIECE_S", 1.0)
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


async def blame_the_user(message: GetModelPart, answer: Any) -> tuple[Reply, Body]:
    return Failure(code="bad_input", message="you did it"), []


async def blame_the_model(message: GetModelPart, answer: Any) -> tuple[Reply, Body]:
    return await answer() if message.kind == "manifest" else (Failure(code="bad_model", message="it is bad"), [])


async def blame_a_tensor(message: GetModelPart, answer: Any) -> tuple[Reply, Body]:
    return (Failure(code="bad_input", message="no"), []) if message.kind == "tensor" else await answer()


async def be_slow(message: GetModelPart, answer: Any) -> tuple[Reply, Body]:
    """Every piece comes just in time."""
    if message.kind == "tensor":
        await trio.sleep(0.8)
    return await answer()


async def be_silent(message: GetModelPart, answer: Any) -> tuple[Reply, Body]:
    if message.kind == "tensor":
        await trio.sleep_forever()
    return await answer()


@pytest.mark.parametrize(
    "behave",
    [
        give_wrong_bytes, give_too_much, give_too_little, give_another_size, give_gigabytes, give_another_manifest,
        give_wrong_files, refuse, be_silent, blame_the_user, blame_the_model, blame_a_tensor,
    ],
)  # fmt: skip
async def test_a_bad_peer_is_dropped(model: LocalModel, cache: Path, behave: Behaviour) -> None:
    bad, good = Giver(model, behave), Giver(model)
    async with open_puller(model, bad, good) as puller:
        result = await pull(puller, model.root)
    peers = {peer["peer_id"]: peer["dropped"] for peer in result["peers"]}
    assert peers[bad.pool.peer_id] and not peers[good.pool.peer_id]
    check_same(model, Path(result["folder"]), cache)


@pytest.mark.parametrize("behave", [give_wrong_bytes, give_too_much, be_silent, refuse, blame_the_user, blame_a_tensor])
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


async def test_a_unit_has_a_deadline(model: LocalModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer each of whose pieces comes in time may still be too slow."""
    monkeypatch.setattr(room, "UNIT_S", 0.2)
    monkeypatch.setattr(room, "SLOWEST_BYTES_PER_S", 1e12)
    slow, good = Giver(model, be_slow), Giver(model)
    async with open_puller(model, slow, good) as puller:
        result = await pull(puller, model.root)
    assert "too long" in result["peers"][0]["dropped"] and not result["peers"][1]["dropped"]


async def test_the_only_peer_gets_more_time(model: LocalModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "UNIT_S", 0.5)
    monkeypatch.setattr(room, "SLOWEST_BYTES_PER_S", 1e12)
    monkeypatch.setattr(room, "PIECE_BYTES", 1 << 20)

    async def be_slow_once(message: GetModelPart, answer: Any) -> tuple[Reply, Body]:
        if message.name == model.manifest.entries[0].name:
            await trio.sleep(0.7)
        return await answer()

    async with open_puller(model, Giver(model, be_slow_once)) as puller:
        result = await pull(puller, model.root)
    check_same(model, Path(result["folder"]), cache)


async def test_slow_peers_keep_nobody_from_a_turn(
    model: LocalModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than are asked at a time: who comes after them gets the place of the first that is too slow."""
    monkeypatch.setattr(room, "PEERS", 2)
    monkeypatch.setattr(room, "UNIT_S", 0.2)
    monkeypatch.setattr(room, "SLOWEST_BYTES_PER_S", 1e12)
    givers = [*(Giver(model, be_slow) for _ in range(3)), Giver(model)]
    async with open_puller(model, *givers) as puller:
        result = await pull(puller, model.root)
    assert not result["peers"][-1]["dropped"]
    assert sum(ask.size for ask in givers[-1].asked if ask.kind == "tensor") == sum(
        unit.nbytes for entry in model.manifest.entries for unit in assembly_room.split(entry)
    )


async def test_an_idle_peer_takes_over(model: LocalModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a pull does not wait for a peer that is within its deadline and far slower than another."""
    monkeypatch.setattr(room, "PATIENCE_S", 0.1)
    monkeypatch.setattr(room, "IDLE_LOOK_S", 0.02)
    monkeypatch.setattr(givers_room, "PIECE_S", 20.0)
    asked = trio.Event()

    async def dawdle(message: GetModelPart, answer: Any) -> tuple[Reply, Body]:
        if message.kind == "tensor":
            asked.set()
            await trio.sleep(15)
        return await answer()

    async def wait_for_it(message: GetModelPart, answer: Any) -> tuple[Reply, Body]:
        if message.kind == "tensor":
            await asked.wait()
        return await answer()

    slow, good = Giver(model, dawdle), Giver(model, wait_for_it)
    async with open_puller(model, slow, good) as puller:
        result = await pull(puller, model.root)
    assert "too long" in result["peers"][0]["dropped"] and not result["peers"][1]["dropped"]
    check_same(model, Path(result["folder"]), cache)


async def test_a_peer_that_is_always_busy(model: LocalModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another has the manifest: the busy one's turn ends."""
    monkeypatch.setattr(room, "TURNS_S", (0.2, 20.0))
    monkeypatch.setattr(room, "PATIENCE_S", 0.1)

    async def be_busy(message: GetModelPart, answer: Any) -> tuple[Reply, Body]:
        raise Busy("later", retry_after_s=0.1)

    busy, good = Giver(model, be_busy), Giver(model)
    async with open_puller(model, busy, good) as puller:
        await pull(puller, model.root)
    assert len([ask for ask in busy.asked if ask.kind == "manifest"]) < 5
    assert not [ask for ask in busy.asked if ask.kind == "file"]  # who was late comes last


async def test_the_disk_is_not_waited_for_on_trios_thread(
    model: LocalModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has finished the model while this one waited for the lock."""
    threads: list[threading.Thread] = []

    def load(path: Path) -> Manifest:
        threads.append(threading.current_thread())
        return load_manifest(path)

    async with open_puller(model, Giver(model)) as puller:
        await pull(puller, model.root)
        monkeypatch.setattr(room, "find_known", lambda root, cache: None)
        monkeypatch.setattr(room, "load_manifest", load)
        again = await pull(puller, model.root)
    assert again["bytes_received"] == 0
    assert threads and threading.main_thread() not in threads


async def test_names_cost_nothing() -> None:
    """Of many peers at one address one is asked before those of other addresses, and who was late is asked last."""
    peers = {"a": "/ip4/1.2.3.4/tcp/1", "b": "/ip4/1.2.3.4/tcp/2", "c": "/ip4/1.2.3.4/tcp/3", "d": "/ip4/5.6.7.8/tcp/1"}

    class Found(NamedTuple):
        advert: Contact

    class Discovering:
        async def find_adverts(self, root: str) -> list[Found]:
            return [Found(Contact(peer_id=peer, addrs=[addr])) for peer, addr in peers.items()]

    async def say(text: str) -> None: ...

    class Connecting:
        peer_id = "me"

        def get(self, peer_id: str) -> None: ...

    givers = givers_room.Givers(Connecting(), Discovering(), ModelRoot("ab" * 32), say)  # type: ignore[arg-type]
    await givers.find()
    assert [source.contact.peer_id for source in givers.rank()] == ["a", "d", "b", "c"]
    await givers.drop(givers.all[0], DeadlineExceeded("slow"))
    assert [source.contact.peer_id for source in givers.rank()] == ["d", "b", "c"]
    for source in givers.all[1:]:
        await givers.drop(source, ExpertError("gone"))
    givers.all[3].late += 1
    await givers.find()
    assert [source.contact.peer_id for source in givers.rank()] == ["a", "b", "c", "d"]


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
        await giver.sharing.answer(PeerId("stranger"), message, 10.0)
    giver.sharing.close()
