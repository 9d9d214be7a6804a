"""What is known of the files that a node serves from, while they are read again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import trio

from daaswarm.config import Config, HostConfig
from daaswarm.models.fingerprint import Fingerprint, find_changed
from daaswarm.models.sources import LocalModel, find_model
from daaswarm.node import hosting as room
from daaswarm.node.hosting import Hosting, Wish
from tests.node.node_helpers import emit


class Quiet:
    """Stands for ``Discovery``: nobody is told."""

    def advertise(self, *arguments: object, **options: object) -> None: ...

    def withdraw(self, *arguments: object) -> None: ...


@pytest.fixture
def model(moe: Path, tmp_path: Path) -> LocalModel:
    return find_model(str(shutil.copytree(moe, tmp_path / "mine")), tmp_path / "cache")


@pytest.fixture
def hosting() -> Hosting:
    return Hosting(Config(host=HostConfig(threads=1)), Quiet())  # type: ignore[arg-type]


async def test_files_that_are_read_anew_during_a_look_at_them_are_not_called_changed(
    model: LocalModel, hosting: Hosting, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read_again() -> None:
        async with hosting.changing:
            await hosting.load(model, {1: [0]}, "f32", emit)

    def look(folder: Path, before: Fingerprint) -> list[str]:
        changed = find_changed(folder, before)
        trio.from_thread.run(read_again)
        return changed

    async with hosting.serve(Wish(model, "f32", {0: [0]}, 0), emit):
        os.utime(model.folder / "model.safetensors", (1.0, 1.0))  # the same bytes, copied there once more
        with monkeypatch.context() as patch:
            patch.setattr(room, "find_changed", look)
            await hosting.check_files()
        assert hosting.get_source(model.root) is model
        await hosting.check_files()
        assert hosting.get_source(model.root) is model


async def test_files_that_were_read_are_not_forgotten_before_they_are_served(
    model: LocalModel, hosting: Hosting
) -> None:
    held: Any = {0: [0]}
    async with hosting.changing:
        hosted, _ = await hosting.load(model, held, "f32", emit)
        await hosting.check_files()  # while a deployment is being written down
        hosting.get_service().add(hosted)
    assert hosting.get_source(model.root) is model
    hosting.get_service().remove(model.root, "f32", held)
    await hosting.check_files()
    assert hosting.get_source(model.root) is None and not hosting._read
