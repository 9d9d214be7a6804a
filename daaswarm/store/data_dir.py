"""The data directory of a node: identity key, settings, lock, control socket, and where the rest of it is."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nacl.signing import SigningKey

from daaswarm.errors import ConfigError

LOCKED_BYTE = 1 << 20  # on Windows, where a locked byte can't be read: behind what the file says
SOCKET_PATH_BYTES = 100  # sun_path holds 104 (macOS) to 108 (Linux)


class DataDir:
    """Paths and small files of one node.

    Args:
        path: the directory; made (mode 0700) when first written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key_path = path / "identity.key"
        self.config_path = path / "config.toml"
        self.lock_path = path / "node.lock"
        self.database_path = path / "node.db"
        self.history_path = path / "chat-history"
        self.log_path = path / "logs" / "node.log"

    def create(self) -> None:
        """Make the directory.

        Raises:
            ConfigError: it can't be made or is a file.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"data directory {self.path} can't be made: {error.strerror}", hint="choose another with --data-dir"
            ) from error

    @property
    def socket_path(self) -> Path:
        """Where a running node answers. A path too long for a socket gets a short one in the temporary folder."""
        path = self.path.absolute() / "control.sock"
        if sys.platform == "win32":  # a file there, of any length
            return path
        if len(os.fsencode(path)) <= SOCKET_PATH_BYTES:
            return path
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"daaswarm-{os.getuid()}"
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
        try:
            owned = folder.lstat()
        except OSError as error:
            raise ConfigError(f"{folder} can't be made: {error.strerror}", hint="use a shorter --data-dir") from error
        if not stat.S_ISDIR(owned.st_mode) or owned.st_uid != os.getuid() or owned.st_mode & 0o077:
            raise ConfigError(f"{folder} is not a private folder of yours", hint="use a shorter --data-dir")
        return folder / f"{digest}.sock"

    def is_used(self) -> bool:
        """Whether a node was ever made or run here."""
        return self.has_key() or self.lock_path.exists()

    def has_key(self) -> bool:
        return self.key_path.exists()

    def load_key(self) -> SigningKey:
        """The node's Ed25519 key; made on first use, mode 0600.

        Raises:
            ConfigError: unreadable, readable by others, or not a key. It is never overwritten.
        """
        if not self.key_path.exists():
            self._create_key()
        try:
            mode = self.key_path.stat().st_mode
            content = self.key_path.read_text("ascii").strip()
            seed = bytes.fromhex(content)
        except OSError as error:
            raise ConfigError(f"{self.key_path} can't be read: {error.strerror}", hint="check its owner") from error
        except ValueError:
            seed = b""
        else:
            if os.name == "posix" and mode & 0o077:
                raise ConfigError(f"{self.key_path} is readable by others", hint=f"run chmod 600 {self.key_path}")
        if len(seed) != 32:
            raise ConfigError(
                f"{self.key_path} holds no Ed25519 key (64 hex digits)",
                hint="restore it from a backup, or move it away to start with a new identity",
            )
        return SigningKey(seed)

    def _create_key(self) -> None:
        self.create()
        try:
            fd, name = tempfile.mkstemp(dir=self.path, prefix=".identity-")  # mode 0600 from the start
            try:
                with os.fdopen(fd, "w", encoding="ascii") as file:
                    file.write(SigningKey.generate().encode().hex() + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                with contextlib.suppress(FileExistsError):  # another process was first: its key counts
                    os.link(name, self.key_path)
            finally:
                Path(name).unlink()
        except OSError as error:
            raise ConfigError(
                f"{self.key_path} can't be written: {error.strerror}",
                hint="check the folder's owner and its free space, or choose another with --data-dir",
            ) from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for one node at a time; released by the kernel when the process dies.

        Raises:
            ConfigError: another node runs on it.
        """
        self.create()
        try:
            opened = self.lock_path.open("a+b", buffering=0)
        except OSError as error:
            raise ConfigError(
                f"{self.lock_path} can't be opened: {error.strerror}", hint="check its owner, or choose --data-dir"
            ) from error
        with opened as file:
            try:
                _lock(file.fileno())
            except OSError:
                file.seek(0)
                owner = file.read(32).decode("ascii", "replace").strip()
                raise ConfigError(
                    f"a node already runs on {self.path}" + (f" (process {owner})" if owner else ""),
                    hint="use it (host-expert and infer attach to it), stop it, or choose another --data-dir",
                ) from None
            with contextlib.suppress(OSError):  # it only says whose lock it is: a full disk doesn't make it less of one
                file.truncate(0)
                file.write(f"{os.getpid()}\n".encode())
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    file.truncate(0)


def _lock(file: int) -> None:
    """Raises:
    OSError: another process holds it.
    """
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file, LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
