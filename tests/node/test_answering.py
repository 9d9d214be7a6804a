"""How a node asks: what it refuses before anybody hears of it, and which hosts it turns to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from daaswarm.config import Config
from daaswarm.core.adverts import Known, to_bitmap
from daaswarm.errors import ConfigError, ModelError, NoPeerCouldServe
from daaswarm.inference.plan import HostPlan
from daaswarm.inference.preflight import check_prompt
from daaswarm.messages import Advert, Signed
from daaswarm.models.sources import LocalModel, find_model
from daaswarm.net.links import SharedLinks
from daaswarm.node.answering import Answering

PEERS = {
    "f32": "12D3KooWH3uVF6wv47WnArKHk5p6cvgCJEb74UTmxztmQDc298L3",
    "bf16": "12D3KooWCUqSPNf2A9ypw1L56Z79FPbn6A5vwswZTLeYN44fy5bU",
}
PARAMS: dict[str, Any] = {"prompt": "Hi", "system": None, "raw": False, "dtype": None, "force": True}


@pytest.fixture
def model(moe: Path, cache: Path) -> LocalModel:
    return find_model(str(moe), cache)


def make_known(model: LocalModel, dtype: str, layers: int) -> Known:
    held = {layer: to_bitmap(range(count)) for layer, count in list(model.layers.items())[:layers]}
    advert = Advert(
        peer_id=PEERS[dtype], model_root=model.root, model_name="m", kind=model.kind, held=held, dtype=dtype,
        device="cpu", addrs=["/ip4/127.0.0.1/tcp/1"], seq=1, expires_at=1e12,
    )  # fmt: skip
    return Known(advert, Signed(public_key=bytes(32), signature=bytes(64), payload=b""))


class FailingAnswering(Answering):
    """Its swarm has some hosts; those of ``failing`` dtypes break off after ``text``."""

    def __init__(self, known: list[Known], failing: set[str], text: str = "") -> None:
        class Discovery:
            async def find_adverts(self, root: str, is_enough: Any = None) -> list[Known]:
                return known

        class Network:
            peer_id = "me"
            links = SharedLinks()

        class Nobody:
            async def get_banned(self) -> dict[Any, Any]:
                return {}

            async def save(self) -> None:
                pass

        super().__init__(Config(), Network(), Discovery(), None, None, Nobody())  # type: ignore[arg-type]
        self.failing, self.text = failing, text
        self.asked: list[str] = []

    async def get_requester(self) -> Any:
        return None

    async def _ask(self, model: LocalModel, plan: HostPlan, params: Any, emit: Any) -> dict[str, Any]:
        self.asked.append(plan.dtype)
        if plan.dtype in self.failing:
            raise NoPeerCouldServe("nobody", text=self.text)
        return {"dtype": plan.dtype, "hosts": []}


async def ask(answering: Answering, model: LocalModel, **params: Any) -> Any:
    from daaswarm.errors import unwrap_groups

    async def emit(event: dict[str, Any]) -> None:
        pass

    with unwrap_groups():
        return await answering.answer(model, {**PARAMS, **params}, emit, embedded=None)


async def test_the_next_complete_dtype_is_asked_once(model: LocalModel) -> None:
    whole = len(model.layers)
    known = [make_known(model, "f32", whole), make_known(model, "bf16", whole)]
    answering = FailingAnswering(known, {"f32"})
    assert (await ask(answering, model))["dtype"] == "bf16"
    assert answering.asked == ["f32", "bf16"]

    answering = FailingAnswering(known, {"f32", "bf16"})
    with pytest.raises(NoPeerCouldServe):
        await ask(answering, model)
    assert answering.asked == ["f32", "bf16"]


async def test_no_other_dtype_is_asked(model: LocalModel) -> None:
    whole = len(model.layers)
    cases: list[tuple[int, str, dict[str, Any]]] = [
        (whole, "some text", {}),  # it was seen: what follows must not contradict it
        (whole, "", {"dtype": "f32"}),  # told to
        (whole - 1, "", {}),  # the other one has gaps
    ]
    for layers, text, params in cases:
        answering = FailingAnswering(
            [make_known(model, "f32", whole), make_known(model, "bf16", layers)], {"f32"}, text
        )
        with pytest.raises(NoPeerCouldServe):
            await ask(answering, model, **params)
        assert answering.asked == ["f32"]


def test_a_prompt_is_checked_without_hosts(model: LocalModel, tmp_path: Path) -> None:
    check_prompt(model, "Hello", None, False)
    with pytest.raises(ConfigError, match=r"the prompt has \d+ tokens; .* takes \d+"):
        check_prompt(model, "x" * 3000, None, False)
    earlier = [{"role": "user", "content": "x" * 3000}, {"role": "assistant", "content": "y"}]
    with pytest.raises(ConfigError, match=r"the prompt has \d+ tokens|conversation"):
        check_prompt(model, "Hello", None, False, earlier)
    folder = tmp_path / "copy"
    shutil.copytree(model.folder, folder)
    for path in [*folder.glob("tokenizer*"), *folder.glob("vocab*"), *folder.glob("special*")]:
        path.unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        check_prompt(model._replace(folder=folder), "Hello", None, False)


def test_a_system_prompt_needs_a_place(model: LocalModel) -> None:
    from daaswarm.models.trunk import load_tokenizer

    tokenizer: Any = load_tokenizer(model)
    if tokenizer.chat_template:
        check_prompt(model, "Hello", "Be brief", False)
    else:
        with pytest.raises(ConfigError, match="--system needs a chat template"):
            check_prompt(model, "Hello", "Be brief", False)


def test_a_short_prompt_is_not_counted(model: LocalModel, tmp_path: Path) -> None:
    """Counting costs seconds of imports, so that it happens only near the limit."""
    folder = tmp_path / "copy"
    shutil.copytree(model.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100_000}))
    (folder / "tokenizer.json").write_text("would be refused if it were read")
    check_prompt(model._replace(folder=folder), "Hello", None, False)
