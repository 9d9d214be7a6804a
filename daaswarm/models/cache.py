"""Work that is done once on this machine, by one process: fetching and converting models."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from daaswarm.errors import ConfigError
from daaswarm.models.manifest import Progress

_LOCK_POLL_S = 0.2  # between looks at a lock that another process holds


def make_once(folder: Path, make: Callable[[Path], None], progress: Progress) -> Path:
    """Fill ``folder`` by calling ``make(temporary folder)``, unless it is there already.

    The folder appears whole or not at all, so an interrupted call starts afresh; a second process waits for the first.

    Raises:
        ConfigError: the cache is not writable.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{folder.name}.lock"), progress):
            if folder.is_dir():
                return folder
            for old in folder.parent.glob(f".{folder.name}-*"):
                shutil.rmtree(old, ignore_errors=True)  # whoever made it held the lock, and no longer does
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            try:
                make(temporary)
                temporary.chmod(0o755)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except (PermissionError, NotADirectoryError) as error:
        raise ConfigError(f"the cache {folder.parent} is not writable: {error}", hint="choose another cache") from None
    return folder


@contextlib.contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system releases it if this process dies."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while not _try_lock(file):
            progress("waiting for another process that prepares this model", 0, 0)
            time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(file)


def _try_lock(file: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
