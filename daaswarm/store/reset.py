"""What ``daaswarm reset`` removes: the files that daaswarm made in a data directory, and no others."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from daaswarm.errors import StorageError
from daaswarm.store.data_dir import DataDir
from daaswarm.store.files import SIDE_FILES
from daaswarm.store.log_file import LOG_FILES

# Made by daaswarm, as whole names: a copy that its owner made is none of ours, however it is called. The lock stays: it
# is held while the others go, and holds nothing.
SIDE = "|".join(map(re.escape, SIDE_FILES))
MADE = re.compile(
    rf"node\.db({SIDE})?"
    rf"|node\.db\.corrupt-\d{{8}}T\d{{6}}Z(-\d+)?({SIDE})?"  # see files.set_aside
    r"|chat-history(\.new)?|config\.toml\.new|control\.sock"
    r"|\.(identity|swarm)-[a-z0-9_]{8}"  # see DataDir._create_key and store/swarm_keys.py
)
LOGS = re.compile(rf"node\.log(\.[1-{LOG_FILES - 1}])?")  # in the folder of logs, which goes when it is empty then
KEPT_UNLESS_ALL = re.compile(r"identity\.key|config\.toml|[^/]+\.swarm-key")
LEFT = ("node.lock",)


class Doomed(msgspec.Struct, frozen=True):
    """A file that a reset removes, or a link: never what it points to."""

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
            if KEPT_UNLESS_ALL.fullmatch(path.name):
                (doomed if everything else kept).append(path)
            elif path == data_dir.log_path.parent and path.is_symlink():
                doomed.append(path)  # the logs behind it are where their owner wants them
            elif path == data_dir.log_path.parent and path.is_dir():
                for file in sorted(path.iterdir()):
                    (doomed if _is_made(file, LOGS) else foreign).append(file)
            elif _is_made(path, MADE):
                doomed.append(path)
            else:
                foreign.append(path)
        return ResetPlan([Doomed(path, path.lstat().st_size) for path in doomed], kept, foreign)
    except OSError as error:
        raise StorageError(f"{error.filename} can't be read: {error.strerror}", hint="check its owner") from error


def _is_made(path: Path, names: re.Pattern[str]) -> bool:
    return names.fullmatch(path.name) is not None and (path.is_symlink() or not path.is_dir())


def remove(data_dir: DataDir, plan: ResetPlan) -> None:
    """Remove what is doomed; the folder of logs too when nothing is left in it.

    Raises:
        StorageError: something can't be removed; what came before it is gone.
    """
    try:
        for doomed in plan.doomed:
            doomed.path.unlink(missing_ok=True)
        folder = data_dir.log_path.parent
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise StorageError(
            f"{error.filename} can't be removed: {error.strerror}", hint="check its owner, then run reset again"
        ) from error
