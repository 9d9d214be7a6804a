"""Where the keys of private swarms come from: a file of their own in the data directory each, a file that the user
names, or the environment. Never a command line's argument, since all users of a machine see those."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from daaswarm.config import ENV_SWARM_KEY, Config, NetworkConfig
from daaswarm.core.swarm_keys import KEY_BYTES, MAX_TEXT, SwarmKey, is_private_id, parse_swarm_key
from daaswarm.errors import ConfigError
from daaswarm.store.data_dir import DataDir
from daaswarm.systems import create_private, expand_user, sync

SUFFIX = ".swarm-key"
PUBLIC = NetworkConfig().swarm  # whose name no private swarm may have: whoever means one would be in the other


def load_swarm_key(data_dir: DataDir, config: Config, environ: Mapping[str, str] | None = None) -> SwarmKey | None:
    """The key that a node with these settings needs; ``None`` for a swarm that anybody may join.

    Args:
        environ: defaults to ``os.environ``.

    Raises:
        ConfigError: a private swarm without its key, a key of another swarm, or a key that can't be read.
    """
    swarm = config.network.swarm
    text = (os.environ if environ is None else environ).get(ENV_SWARM_KEY, "")
    if config.network.swarm_key_file:
        key = read_key_file(Path(config.network.swarm_key_file))
    elif text:
        key = parse_swarm_key(text, source=f"the environment variable {ENV_SWARM_KEY}")
    elif is_private_id(swarm):
        key = get_stored(data_dir, swarm)
        if key is None:
            raise ConfigError(
                f"{swarm} is a private swarm, and its key is not here",
                hint="give it with --swarm-key FILE, or keep it here for good: daaswarm swarm add FILE",
            )
    else:
        for swarm_id in list_stored(data_dir):
            if swarm_id.partition("@")[0] == swarm:
                raise ConfigError(
                    f"{swarm} is a swarm that anybody may join, and a private one is called so too",
                    hint=f"to join that, write {swarm_id}",
                )
        return None
    if swarm not in (key.swarm_id, key.name, PUBLIC):
        raise ConfigError(
            f"the swarm key is of {key.swarm_id}, not of {swarm}",
            hint="leave --swarm-id away, or give the key of that swarm",
        )
    return key


def create_swarm_key(name: str) -> SwarmKey:
    """A new swarm's.

    Raises:
        ConfigError: a name that no private swarm may have.
    """
    if name == PUBLIC:
        raise ConfigError(f"{name} is the name of the swarm that anybody may join", hint="choose another name")
    return SwarmKey(name, secrets.token_bytes(KEY_BYTES))


def list_stored(data_dir: DataDir) -> list[str]:
    """The ids of the swarms whose keys are in the data directory."""
    try:
        names = sorted(path.name for path in data_dir.path.iterdir() if path.name.endswith(SUFFIX))
    except OSError:
        return []
    return [name.removesuffix(SUFFIX) for name in names if is_private_id(name.removesuffix(SUFFIX))]


def get_stored(data_dir: DataDir, swarm_id: str) -> SwarmKey | None:
    """Raises:
    ConfigError: it is there, but can't be read, or is of another swarm.
    """
    path = get_key_path(data_dir, swarm_id)
    if not path.exists():
        return None
    text = _read(path)
    hint = f"daaswarm swarm remove {swarm_id} --yes, then daaswarm swarm add with the right one"
    try:
        key = parse_swarm_key(text, source=str(path))
    except ConfigError as error:
        raise ConfigError(error.message, hint=hint) from error
    if key.swarm_id != swarm_id:
        raise ConfigError(f"{path} holds the key of {key.swarm_id}", hint=hint)
    return key


def get_key_path(data_dir: DataDir, swarm_id: str) -> Path:
    """Raises:
    ConfigError: not the id of a private swarm.
    """
    if not is_private_id(swarm_id):
        raise ConfigError(
            f"{swarm_id[:64]!r} is not the id of a private swarm", hint="it looks like home@k3x7q2m4a5bcd2ef"
        )
    return data_dir.path / f"{swarm_id}{SUFFIX}"


def store_swarm_key(data_dir: DataDir, key: SwarmKey) -> Path:
    """Write the key, mode 0600; where it is. A key that is there already is left alone.

    Raises:
        ConfigError: the folder can't be written, or its file holds another key.
    """
    path = get_key_path(data_dir, key.swarm_id)
    if get_stored(data_dir, key.swarm_id) is not None:
        return path
    data_dir.create()
    name = data_dir.path / f".swarm-{secrets.token_hex(4)}"
    try:
        fd = create_private(name)
        try:
            with os.fdopen(fd, "w", encoding="ascii") as file:
                file.write(key.text + "\n")
                file.flush()
                sync(file.fileno())
            with contextlib.suppress(FileExistsError):  # another process was first, with the same key
                os.link(name, path)
        finally:
            name.unlink()
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}", hint="check the folder's owner") from error
    return path


def read_key_file(path: Path) -> SwarmKey:
    """``~`` in ``path`` is the user's home.

    Raises:
    ConfigError: unreadable, readable by others, or not a key.
    """
    return parse_swarm_key(_read(path), source=str(path))


def _read(path: Path) -> str:
    try:
        path = expand_user(path)
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(MAX_TEXT + 2)
    except OSError as error:
        raise ConfigError(f"the swarm key {path} can't be read: {error.strerror}", hint="check the path") from error
    except ValueError as error:  # a NUL
        raise ConfigError(f"{str(path)!r} is no path: {error}", hint="check the path") from error
    if os.name == "posix" and stat.S_ISREG(status.st_mode) and status.st_mode & 0o077:
        raise ConfigError(f"the swarm key {path} is readable by others", hint=f"run chmod 600 {path}")
    return content.decode("ascii", "replace")
