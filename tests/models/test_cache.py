"""The folders of the cache: whose is whose, when they count, and what removing one removes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from daaswarm.models.assembly import Assembly, get_pulled_folder
from daaswarm.models.cache import make_once, publish
from daaswarm.models.fetching import fetch_model
from daaswarm.models.library import forget_folder, list_kept
from daaswarm.models.manifest_file import MANIFEST_NAME
from daaswarm.models.sources import find_model

Tiny = Callable[[str], Path]


def quiet(what: str, done: int, total: int) -> None: ...


@pytest.mark.parametrize("other", ["a-b", "a-bcdefgh", "a-abandoned", "a-bcdefgh-abandoned", "A"])
def test_a_model_whose_name_begins_alike_is_being_made(tmp_path: Path, other: str) -> None:
    def make(folder: Path) -> None:
        (folder / "weights").write_bytes(b"1")
        make_once(tmp_path / "a", lambda folder: None, quiet)

    make_once(tmp_path / other, make, quiet)
    assert (tmp_path / other / "weights").is_file()


def test_an_unfinished_pull_is_left_alone(tmp_path: Path) -> None:
    partial = tmp_path / f".root-{'ab' * 32}.partial"
    partial.mkdir()
    make_once(tmp_path / "root", lambda folder: None, quiet)
    assert partial.is_dir()


def test_what_was_left_is_removed(tmp_path: Path) -> None:
    for name in (".a+b-abcd_123", ".a+b-abcd_123-abandoned"):
        (tmp_path / name).mkdir()
    make_once(tmp_path / "a+b", lambda folder: None, quiet)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["a+b"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was synced and renamed, in order, by inode."""
    made: list[tuple[str, int]] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(file: int) -> None:
        made.append(("fsync", os.fstat(file).st_ino))
        fsync(file)

    def record_rename(source: Path, target: Path) -> None:
        made.append(("rename", Path(source).stat().st_ino))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    return made


def check_synced(calls: list[tuple[str, int]], folder: Path) -> None:
    at = calls.index(("rename", folder.stat().st_ino))
    due = {("fsync", path.stat().st_ino) for path in (*folder.rglob("*"), folder)}
    assert due <= set(calls[:at])
    assert ("fsync", folder.parent.stat().st_ino) in calls[at:]


@pytest.mark.skipif(os.name == "nt", reason="folders can't be synced")
def test_all_is_on_the_disk_before_it_counts(tmp_path: Path, calls: list[tuple[str, int]]) -> None:
    made = tmp_path / "made"
    (made / "inner").mkdir(parents=True)
    for name in ("config.json", "inner/template.jinja"):
        (made / name).write_text("x")
    publish(made, tmp_path / "model")
    check_synced(calls, tmp_path / "model")


@pytest.mark.skipif(os.name == "nt", reason="folders can't be synced")
def test_a_pulled_and_a_copied_model_are_on_the_disk(tiny: Tiny, tmp_path: Path, calls: list[tuple[str, int]]) -> None:
    cache = tmp_path / "cache"
    copied = fetch_model(str(shutil.copytree(tiny("llama"), tmp_path / "source")), cache, quiet)
    check_synced(calls, copied.folder)
    assembly = Assembly(copied.manifest, cache)
    for name in copied.manifest.files:
        assert assembly.put_file(name, (copied.folder / name).read_bytes())
    check_synced(calls, assembly.finish())


def test_links_to_a_hubs_blobs(tiny: Tiny, tmp_path: Path) -> None:
    """The files of a snapshot are relative links to blobs; the model must not depend on where it lies."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1234"
    shutil.copytree(tiny("llama"), blobs)
    (blobs / MANIFEST_NAME).unlink(missing_ok=True)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("..", "..", "blobs", blob.name))
    model = fetch_model(str(snapshot), tmp_path / "cache", quiet, link=True)
    assert model.folder.is_relative_to(tmp_path / "cache")
    assert not [path for path in model.folder.iterdir() if path.is_symlink()]
    assert (model.folder / "model.safetensors").samefile(blobs / "model.safetensors")


def test_removing_a_link_removes_the_link(tmp_path: Path) -> None:
    target, models = tmp_path / "mine", tmp_path / "models"
    target.mkdir()
    models.mkdir()
    (target / "weights").write_bytes(b"1")
    (models / "mine").symlink_to(target)
    forget_folder(models / "mine")
    assert (target / "weights").is_file() and [path.name for path in models.iterdir()] == [".mine.lock"]


def test_the_finished_model_comes_before_the_unfinished(tiny: Tiny, tmp_path: Path) -> None:
    model = find_model(str(shutil.copytree(tiny("llama"), tmp_path / "models" / "x")), tmp_path)
    partial = get_pulled_folder(tmp_path, model.root).with_name(f".root-{model.root}.partial")
    partial.mkdir()
    assert [(kept.root, Path(kept.folder)) for kept in list_kept(tmp_path)] == [
        (model.root, model.folder), (model.root, partial)
    ]  # fmt: skip
