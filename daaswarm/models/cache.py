"""Work that is done once on this machine, by one process: fetching and converting models."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from daaswarm import systems
from daaswarm.errors import ConfigError
from daaswarm.models.manifest import Progress

ABANDONED = "-abandoned"  # ends the name of a temporary folder that is being removed
LOCK_POLL_S = 0.2  # between looks at a lock that another process holds
WAITING = "waiting for another process that prepares this model"


def make_once(folder: Path, make: Callable[[Path], None], progress: Progress) -> Path:
    """Fill ``folder`` by calling ``make(temporary folder)``, unless it is there already.

    The folder appears whole or not at all, so an interrupted call starts afresh; a second process waits for the first.
    What a process left that was killed is removed by the next call; see also :func:`remove_unfinished`.

    Raises:
        ConfigError: the cache is not writable, or the disk is full.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{folder.name}.lock"), progress):
            if folder.is_dir():
                return folder
            # Exactly what mkdtemp makes below: a model whose name begins alike has folders, and a lock, of its own.
            left = re.compile(rf"\.{re.escape(folder.name)}-[a-z0-9_]{{8}}({ABANDONED})?")
            for old in folder.parent.iterdir():
                if left.fullmatch(old.name):
                    shutil.rmtree(old, ignore_errors=True)  # whoever made it held the lock, and no longer does
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            _unfinished.add(temporary)
            try:
                make(temporary)
                temporary.chmod(0o755)
                publish(temporary, folder)
            finally:
                _unfinished.discard(temporary)
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"the cache {folder.parent} can't be written: {error}", hint="make room or choose another cache"
        ) from None
    return folder


def publish(made: Path, folder: Path) -> None:
    """Give a folder its name once all that is in it is on the disk: a power cut leaves the whole of it, or nothing.

    Raises:
        OSError: the disk is full or fails.
    """
    for path in made.rglob("*"):
        if path.is_dir():
            _sync_folder(path)
        else:
            _sync(path)
    _sync_folder(made)
    made.rename(folder)
    _sync_folder(folder.parent)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # what Windows lets one sync
    try:
        systems.sync(file)
    finally:
        os.close(file)


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # Windows and some network drives can't
        _sync(path)


_unfinished: set[Path] = set()


@atexit.register
def remove_unfinished() -> None:
    """Remove the temporary folders of calls that still run in threads, when the process is about to end.

    They are renamed first, so that the thread can't put anything more into them. Runs at exit; whoever leaves by
    ``os._exit`` calls it before.
    """
    while _unfinished:
        temporary = _unfinished.pop()
        doomed = temporary.with_name(temporary.name + ABANDONED)
        with contextlib.suppress(OSError):
            temporary.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    while (file := try_lock(path)) is None:
        progress(WAITING, 0, 0)
        time.sleep(LOCK_POLL_S)
    try:
        yield
    finally:
        os.close(file)


def try_lock(path: Path) -> int | None:
    """Lock a file for this process: the descriptor to close when done, or None if somebody else holds the lock. The
    system releases it if this process dies.

    Raises:
        OSError: the file can't be made.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    if not systems.try_lock(file):
        os.close(file)
        return None
    return file
