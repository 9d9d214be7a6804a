"""``model pull`` where no peer is needed: a folder, a GGUF file, the default, or a repository of a hub. Blocking."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from daaswarm.errors import ConfigError, ModelError, Offline
from daaswarm.models.cache import make_once
from daaswarm.models.checkpoint import Checkpoint, find_shards
from daaswarm.models.files import FILES
from daaswarm.models.manifest import Progress
from daaswarm.models.manifest_file import MANIFEST_NAME, save_manifest
from daaswarm.models.parts import fill_hashes
from daaswarm.models.refusals import first_line
from daaswarm.models.sources import LocalModel, find_model, list_models, open_folder
from daaswarm.systems import expand_user

HUB = "hf:"
POLL_S = 0.3  # between looks at how much of a download is there
HUB_S = 15  # for a hub to answer; huggingface_hub's own default is 10
_SAFE = re.compile(r"[^A-Za-z0-9_.-]+")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


class HubName(NamedTuple):
    """``hf:owner/name@revision``."""

    repository: str
    revision: str | None


def fetch_model(source: str, cache: Path, progress: Progress, *, link: bool = False) -> LocalModel:
    """Have a model in the cache.

    Args:
        source: a folder in Hugging Face layout, a GGUF file, the default's name, or ``hf:owner/name[@revision]``.
        link: make hard links to a folder's files instead of copies. Whoever changes them then changes the cache.

    Raises:
        ModelError: it can't be used.
        Offline: the hub can't be reached.
        ConfigError: the cache can't be written.
    """
    if source.startswith(HUB):
        return fetch_from_hub(parse_hub_name(source), cache, progress)
    folder = expand_user(source)
    if folder.is_dir():
        return copy_folder(folder.resolve(), cache, progress, link=link)
    return find_model(source, cache, progress)


def parse_hub_name(text: str) -> HubName:
    """Raises:
    ConfigError: it is none.
    """
    repository, at, revision = text.removeprefix(HUB).partition("@")
    if not _REPOSITORY.fullmatch(repository) or (at and not re.fullmatch(r"[\w./-]{1,128}", revision)):
        raise ConfigError(
            f"{text} is not a repository of a hub", hint="write it like hf:owner/name or hf:owner/name@v1"
        )
    return HubName(repository, revision or None)


# -- a folder -----------------------------------------------------------------------------------------------------


def copy_folder(source: Path, cache: Path, progress: Progress, *, link: bool) -> LocalModel:
    """Copy a checkpoint into the cache, and check that what was written is what was read."""
    models = cache / "models"
    if source.parent == models.resolve():
        return open_folder(source, cache, progress)
    original = open_folder(source, cache, progress)
    name = choose_name(source.name, original.root, cache)

    def make(folder: Path) -> None:
        names = [*find_shards(source), *original.manifest.files]
        index = "model.safetensors.index.json"
        names += [index] if (source / index).is_file() else []
        total = sum((source / name).stat().st_size for name in names)
        done = 0
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            size = (source / name).stat().st_size
            if not (link and _try_link(source / name, target)):
                _copy(source / name, target, lambda at, done=done: progress("copying", done + at, total))
            done += size
            progress("copying", done, total)
        with Checkpoint(folder, sequential=True) as checkpoint:
            entries = fill_hashes(checkpoint, original.manifest.entries, progress)
        if entries != sorted(original.manifest.entries, key=lambda entry: entry.name):
            raise ModelError(
                f"{source} was changed while it was copied, or is not what its manifest says",
                hint=f"if you changed it on purpose, delete {original.manifest_path}",
            )
        save_manifest(original.manifest, folder / MANIFEST_NAME)

    return open_folder(make_once(models / name, make, progress), cache, progress)


def choose_name(wanted: str, root: str, cache: Path) -> str:
    """A folder's name in the cache: ``wanted``, with digits of the root where another model has that name."""
    name = _SAFE.sub("-", wanted).strip(".-") or "model"
    taken = {model.name: model.root for model in list_models(cache)}
    return name if taken.get(name, root) == root else f"{name}-{root[:12]}"


def _try_link(source: Path, target: Path) -> bool:
    try:
        os.link(source.resolve(), target)  # a hub's own cache has symbolic links, which point nowhere from elsewhere
    except OSError:  # another file system
        return False
    return True


def _copy(source: Path, target: Path, tell: Any) -> None:
    done = 0
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(4 << 20):
            writer.write(block)
            done += len(block)
            tell(done)


# -- a hub --------------------------------------------------------------------------------------------------------


def fetch_from_hub(name: HubName, cache: Path, progress: Progress) -> LocalModel:
    """Download a repository's safetensors and small files with huggingface_hub; a token it knows is used.

    Nothing else is downloaded: no code, no pickles.

    Raises:
        Offline: the hub, or that repository, can't be reached.
        ModelError: it holds no model that can be used.
    """
    label = name.repository if name.revision is None else f"{name.repository}@{name.revision}"
    target = cache / "models" / _SAFE.sub("-", label.replace("/", "--")).strip(".-")

    def make(folder: Path) -> None:
        _download(name, folder, progress)
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # huggingface_hub's notes
        open_folder(folder, folder / "no-cache", progress)

    return open_folder(make_once(target, make, progress), cache, progress)


def _download(name: HubName, folder: Path, progress: Progress) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when it is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    lost: Any = (*HfHubHTTPError.__bases__, OSError)  # the first is that of the HTTP library it was built on

    def download(info: Any) -> None:
        allowed = [*FILES, "additional_chat_templates/*.jinja", "*.safetensors", "model.safetensors.index.json"]
        commit = info.sha or name.revision
        snapshot_download(
            name.repository, revision=commit, local_dir=folder, allow_patterns=allowed, etag_timeout=HUB_S
        )

    try:
        progress(f"asking the hub for {name.repository}", 0, 0)
        info = HfApi().model_info(name.repository, revision=name.revision, files_metadata=True, timeout=HUB_S)
        total = sum(file.size or 0 for file in info.siblings or [] if file.rfilename.endswith(".safetensors"))
        if not total:
            raise ModelError(f"{name.repository} has no safetensors", hint="choose a repository that has")
        _watch(lambda: download(info), folder, f"downloading {name.repository}", total, progress)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"{name.repository} can't be had from the hub: {first_line(error)}",
            hint="check its name and revision; a private one needs a token (hf auth login)",
        ) from None
    except lost as error:
        raise Offline(
            f"{name.repository} could not be downloaded: {first_line(error)}",
            hint="check the network (HF_ENDPOINT names another hub), or pull from a folder or from peers",
        ) from None


def _watch(download: Callable[[], None], folder: Path, what: str, total: int, progress: Progress) -> None:
    """Run ``download`` in a thread of its own, and tell how much of it is in ``folder``.

    That thread can't be stopped; it ends with the process.
    """
    ended = threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            download()
        except BaseException as error:  # noqa: BLE001 - raised below
            failed.append(error)
        finally:
            ended.set()

    threading.Thread(target=work, daemon=True).start()
    while not ended.wait(POLL_S):
        progress(what, min(_get_size(folder), total - 1), total)
    if failed:
        raise failed[0]
    progress(what, total, total)


def _get_size(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        try:
            size += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue  # moved meanwhile
    return size
