"""What ``daaswarm reset`` removes: the files that daaswarm made in a data directory, and no others."""

from __future__ import annotations

from pathlib import Path

import msgspec

from daaswarm.errors import StorageError
from daaswarm.store.data_dir import DataDir

# Made by daaswarm, as patterns of names. The lock stays: it is held while the others go, and holds nothing.
MADE = ("node.db*", "chat-history*", "chat-history*", "config.toml.new", ".identity-*")
LOGS = "node.log*"  # in the folder of logs, which goes when it is empty then
KEPT_UNLESS_ALL = ("identity.key", "config.toml")
LEFT = ("node.lock",)


class Doomed(msgspec.Struct, frozen=True):
    """A file that a reset removes."""

    path: Path
    bytes: int


class ResetPlan(msgspec.Struct, frozen=True):
    """What a reset would do.

    Attributes:
        kept: the key and the settings, if they are there and stay.
        foreign: what daaswarm did not make, which stays.
    """

    doomed: list[Doomed]
    kept: list[Path]
    foreign: list[Path]


def plan_reset(data_dir: DataDir, *, everything: bool) -> ResetPlan:
    """Look, change nothing.

    Args:
        everything: the key and the settings too.

    Raises:
        StorageError: the folder can't be read.
    """
    doomed: list[Path] = []
    kept: list[Path] = []
    foreign: list[Path] = []
    try:
        for path in sorted(data_dir.path.iterdir()):
            if path.name in LEFT:
                continue
            if path.name in KEPT_UNLESS_ALL:
                (doomed if everything else kept).append(path)
            elif path == data_dir.log_path.parent and path.is_dir():
                doomed += sorted(path.glob(LOGS))
                foreign += sorted(set(path.iterdir()) - set(doomed))
            elif path == data_dir.socket_path or any(path.match(pattern) for pattern in MADE):
                doomed.append(path)
            else:
                foreign.append(path)
        return ResetPlan([Doomed(path, path.lstat().st_size) for path in doomed], kept, foreign)
    except OSError as error:
        raise StorageError(f"{error.filename} can't be read: {error.strerror}", hint="check its owner") from error


def remove(data_dir: DataDir, plan: ResetPlan) -> None:
    """Remove what is doomed; the folder of logs too when nothing is left in it.

    Raises:
        StorageError: something can't be removed; what came before it is gone.
    """
    try:
        for doomed in plan.doomed:
            doomed.path.unlink(missing_ok=True)
        folder = data_dir.log_path.parent
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise StorageError(
            f"{error.filename} can't be removed: {error.strerror}", hint="check its owner, then run reset again"
        ) from error
