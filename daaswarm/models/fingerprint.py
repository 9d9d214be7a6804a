"""Whether the files of a checkpoint are still those that were read. Looks at the folder, not at the weights."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from daaswarm.errors import ModelError
from daaswarm.models.checkpoint import find_shards


class FileState(NamedTuple):
    """What changes when a file is written, cut off or replaced."""

    size: int
    mtime_ns: int
    inode: int


Fingerprint = dict[str, FileState]


def take_fingerprint(folder: Path) -> Fingerprint:
    """The state of each file that holds the model; one that is missing is left out. Blocks, briefly."""
    try:
        names = [*find_shards(folder), "config.json"]
    except (ModelError, OSError):
        names = ["config.json"]
    found: Fingerprint = {}
    for name in names:
        try:
            state = (folder / name).stat()
        except OSError:
            continue
        found[name] = FileState(state.st_size, state.st_mtime_ns, state.st_ino)
    return found


def find_changed(folder: Path, before: Fingerprint) -> list[str]:
    """The files that are no longer as they were, by name. Blocks, briefly."""
    after = take_fingerprint(folder)
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
