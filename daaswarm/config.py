"""Settings: defaults < TOML file < environment < flags. An unknown key or a bad value is an error that names both.

The file is ``config.toml`` in the data directory. A key ``network.listen`` is overridden by the environment
variable ``DAASWARM_NETWORK_LISTEN`` and by the flag of the same name where a command has one.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import platformdirs
import tomli
import tomli_w
from msgspec import Meta

from daaswarm.errors import ConfigError
from daaswarm.types import Codec, Dtype, parse_bytes, parse_quiet_hours

ENV_HOME = "DAASWARM_HOME"
ENV_CACHE = "DAASWARM_CACHE"
ENV_SWARM_KEY = "DAASWARM_SWARM_KEY"  # the key's text itself (daaswarm/store/swarm_keys.py)
ENV_PREFIX = "DAASWARM_"
CONFIG_BYTES = 1 << 20  # a settings file is small; anything larger is not one
PEER_ID = re.compile(r"12D3Koo[1-9A-HJ-NP-Za-km-z]{45}")  # checked to the last bit by core/allow_list.py
TAGS, TAG_CHARS = 16, 64  # in an advert (daaswarm/messages.py)


class NetworkConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How this node reaches others."""

    bootstrap: list[str] = []  # multiaddresses with a PeerId
    listen: str = "/ip4/127.0.0.1/tcp/0"
    announce: list[str] = []  # addresses to advertise instead of those listened on
    interfaces: list[str] = []  # patterns, like eth*: whose addresses others are told; empty: chosen by kind
    swarm: Annotated[str, Meta(min_length=1, max_length=64)] = "main"
    swarm_key_file: str = ""  # of a private swarm; empty: its file in the data directory
    allow: list[str] = []  # the only PeerIds that are met; empty: all of the swarm
    libp2p: bool = True  # also speak libp2p on the same port
    lan: bool = True  # find peers on the local network, unless this node listens on loopback alone
    relay: bool = True  # pass the traffic of peers that can't be dialled, as long as this node can


VerifyText = Annotated[str, Meta(pattern=r"^(off|every|(sample|twin)(=(1|0?\.[0-9]{1,6}|1\.0))?)$")]
DeviceText = Annotated[str, Meta(pattern="^(cpu|auto|cuda(:[0-9]{1,2})?)$")]


class HostConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What this node gives."""

    memory: str = "2GB"  # all experts together
    dtype: Dtype = "f32"
    device: DeviceText = "cpu"  # where experts compute
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0  # 0: one per core
    nice: Annotated[int, Meta(ge=0, le=19)] = 0  # how far behind other programs this one stands
    tags: list[str] = []  # what these experts are good at, in the operator's words; others look for them
    quiet_hours: list[str] = []  # local time, like 08:00-18:00
    pause_when_busy: Annotated[float, Meta(ge=0, le=1)] = 0.0  # of all cores, used by other programs; 0: never
    upload: str = ""  # bytes a second of replies and model pieces, like 50MB; empty: no limit


class InferConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How this node asks."""

    model: str = "smollm2-135m-instruct"
    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] = 256
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    call_timeout_s: Annotated[float, Meta(gt=0, le=30)] = 10.0
    embedded_hosts: Annotated[int, Meta(ge=1, le=64)] = 3
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0  # 0: one per core
    device: DeviceText = "cpu"  # where the requester's own part computes
    prompt_lookup: bool = True  # guess at tokens where that is measured to be faster
    verify: VerifyText = "sample"  # checks of what hosts answer: off, sample, sample=0.1, every, twin; see infer --help
    codec: Codec = "none"  # how hidden states travel to hosts that take it: as they are, or f16, bf16, int8


class LogConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What is logged, to standard error and to the log file of a node."""

    level: Annotated[str, Meta(pattern="^(debug|info|warning|error)$")] = "warning"
    file_level: Annotated[str, Meta(pattern="^(debug|info|warning|error)$")] = "info"


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """All settings, by section."""

    network: NetworkConfig = NetworkConfig()
    host: HostConfig = HostConfig()
    infer: InferConfig = InferConfig()
    log: LogConfig = LogConfig()


def get_keys() -> dict[str, Any]:
    """``{"network.listen": type, ...}``: every key that exists."""
    return {
        f"{section.name}.{field.name}": field.type
        for section in msgspec.structs.fields(Config)
        for field in msgspec.structs.fields(section.type)
    }


def get_default_data_dir() -> Path:
    """``$DAASWARM_HOME``, else the platform's data folder for this user."""
    return Path(os.environ.get(ENV_HOME) or platformdirs.user_data_path("daaswarm"))


def get_cache_dir() -> Path:
    """``$DAASWARM_CACHE``, else the platform's cache folder: fetched and converted models, shared by all nodes."""
    return Path(os.environ.get(ENV_CACHE) or platformdirs.user_cache_path("daaswarm"))


def load_config(
    path: Path, *, environ: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None
) -> Config:
    """Settings for one command.

    Args:
        path: the TOML file; it may be missing.
        environ: defaults to ``os.environ``.
        flags: dotted keys from the command line; ``None`` values are not given.

    Raises:
        ConfigError: an unknown key or a bad value, with the file (or variable, or flag) and the key.
    """
    values: dict[str, object] = {}
    for key, value in read_file(path).items():
        values[key] = convert(key, value, source=str(path))
    for name, value in (os.environ if environ is None else environ).items():
        if name.startswith(ENV_PREFIX) and name not in (ENV_HOME, ENV_CACHE, ENV_SWARM_KEY):
            key = name.removeprefix(ENV_PREFIX).lower().replace("_", ".", 1)
            values[key] = convert(key, value, source=f"environment variable {name}")
    for key, value in (flags or {}).items():
        if value is not None:
            values[key] = convert(key, value, source=f"--{key.split('.')[1].replace('_', '-')}")
    nested: dict[str, dict[str, object]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = value
    return msgspec.convert(nested, Config)


def read_file(path: Path) -> dict[str, object]:
    """The file's settings as ``{"section.key": raw value}``; unknown keys are errors, values are not yet checked.

    Raises:
        ConfigError: unreadable, not TOML, or an unknown section or key.
    """
    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise ConfigError(f"{path} is larger than {CONFIG_BYTES} bytes", hint="this is no settings file")
        document = tomli.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}", hint="mend or remove the file") from error
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}", hint="check its owner and mode") from error
    found: dict[str, object] = {}
    for section, content in document.items():
        if not isinstance(content, dict):
            raise unknown_key(section, source=str(path))
        for name, value in content.items():  # pyright: ignore[reportUnknownVariableType]
            key = f"{section}.{name}"
            if key not in get_keys():
                raise unknown_key(key, source=str(path))
            found[key] = value
    return found


def convert(key: str, value: object, *, source: str) -> Any:
    """``value`` as the type of ``key``; text (environment, command line) is parsed, a list by its commas.

    Raises:
        ConfigError: unknown key or bad value, naming ``source`` and the key.
    """
    kind = get_keys().get(key)
    if kind is None:
        raise unknown_key(key, source=source)
    if isinstance(value, str) and kind == list[str]:
        value = [part.strip() for part in value.split(",") if part.strip()]
    try:
        converted = msgspec.convert(value, kind, strict=source.endswith(".toml"))
    except msgspec.ValidationError as error:
        reason = str(error).replace("`", "").replace("Expected", "expected")
        hint = f"see daaswarm config get {key}, or docs/reference/config.md"
        raise ConfigError(f"{source}: {key} = {value!r} is not valid: {reason}", hint=hint) from error
    if key == "host.memory" or (key == "host.upload" and converted):
        try:
            parse_bytes(converted, option=key)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error.message}", hint="write it like 4GB or 512MiB") from error
    elif key == "host.tags":
        if len(converted) > TAGS or not all(0 < len(tag) <= TAG_CHARS for tag in converted):
            text = f"{source}: {key}: at most {TAGS} tags of 1 to {TAG_CHARS} letters"
            raise ConfigError(text, hint="write it like code,german")
    elif key == "network.allow":
        for peer in converted:
            if not PEER_ID.fullmatch(peer):
                text = f"{source}: {key}: {peer[:64]!r} is not the PeerId of an Ed25519 key"
                raise ConfigError(
                    text, hint="PeerIds begin with 12D3Koo and have 52 letters; daaswarm status shows them"
                )
    elif key == "host.quiet_hours":
        for hours in converted:
            try:
                parse_quiet_hours(hours, option=key)
            except ConfigError as error:
                raise ConfigError(f"{source}: {error.message}", hint="write it like 08:00-18:00") from error
    elif isinstance(converted, float) and not math.isfinite(converted):  # NaN passes every comparison with a bound
        raise ConfigError(f"{source}: {key} = {value!r} is not valid: not a number", hint="write a number")
    return converted


def unknown_key(key: str, *, source: str) -> ConfigError:
    """The error for a key that doesn't exist, with the nearest one that does."""
    import difflib

    near = difflib.get_close_matches(key, get_keys(), 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(get_keys())}"
    return ConfigError(f"{source}: unknown key {key!r}", hint=hint)


def set_value(path: Path, key: str, value: str) -> Any:
    """Write one setting to the file, keeping the others; returns the typed value.

    Raises:
        ConfigError: unknown key, bad value, or the file can't be written.
    """
    typed = convert(key, value, source="config set")
    current = read_file(path)
    current[key] = typed
    document: dict[str, dict[str, object]] = {}
    for dotted, item in current.items():
        section, _, name = dotted.partition(".")
        document.setdefault(section, {})[name] = item
    temporary = path.with_suffix(".toml.new")
    try:
        temporary.write_text(tomli_w.dumps(document), "utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}", hint="check its owner and mode") from error
    return typed
