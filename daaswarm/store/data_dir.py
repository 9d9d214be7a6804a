"""The data directory of a node: identity key, settings, lock, control socket, and where the rest of it is."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from nacl.signing import SigningKey

from daaswarm.errors import ConfigError
from daaswarm.systems import create_private, sync, try_lock, unlock


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
        self.socket_path = path.absolute() / "control.sock"
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
            name = self.path / f".identity-{secrets.token_hex(4)}"
            fd = create_private(name)
            try:
                with os.fdopen(fd, "w", encoding="ascii") as file:
                    file.write(SigningKey.generate().encode().hex() + "\n")
                    file.flush()
                    sync(file.fileno())
                with contextlib.suppress(FileExistsError):  # another process was first: its key counts
                    os.link(name, self.key_path)
            finally:
                name.unlink()
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
            if not try_lock(file.fileno()):
                file.seek(0)
                owner = file.read(32).decode("ascii", "replace").strip()
                raise ConfigError(
                    f"a node already runs on {self.path}" + (f" (process {owner})" if owner else ""),
                    hint="use it (host-expert and infer attach to it), stop it, or choose another --data-dir",
                )
            with contextlib.suppress(OSError):  # it only says whose lock it is: a full disk doesn't make it less of one
                file.truncate(0)
                file.write(f"{os.getpid()}\n".encode())
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    file.truncate(0)
                unlock(file.fileno())
