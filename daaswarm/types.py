"""Names shared by every room: what a peer, an expert, a dtype and a range are. No I/O, no third-party import."""

from __future__ import annotations

from typing import Literal, NamedTuple, NewType, get_args

from daaswarm.errors import ConfigError

PeerId = NewType("PeerId", str)
"""A libp2p PeerId in base58 (``12D3Koo...``): the identity multihash of an Ed25519 public key."""

ModelRoot = NewType("ModelRoot", str)
"""The Merkle root of a model's manifest, 64 hex digits: a model's name in the swarm."""

Dtype = Literal["f32", "bf16", "f16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
DTYPE_BYTES: dict[str, int] = {"f32": 4, "bf16": 2, "f16": 2}

Codec = Literal["none", "f16", "bf16", "int8"]
"""How rows and sums travel (``models.codecs``): ``none`` is as they are."""
CODECS: tuple[str, ...] = tuple(codec for codec in get_args(Codec) if codec != "none")


class ExpertId(NamedTuple):
    """One expert of a model: an MoE expert, or a slice of a dense FFN."""

    layer: int
    expert: int


def parse_range(text: str, *, option: str, limit: int | None = None) -> list[int]:
    """``"0-3,7"`` → ``[0, 1, 2, 3, 7]``; ranges are inclusive.

    Raises:
        ConfigError: not a range, or (with ``limit``) a number outside ``0..limit-1``.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(
                f"{option} {text!r} is not a range", hint=f"write it like {option} 0-14 or {option} 0,3,7"
            )
        low, high = int(first), int(last or first)
        if low > high:
            raise ConfigError(f"{option} {text!r}: {low} is greater than {high}", hint=f"write {option} {high}-{low}")
        if high > 1_000_000:
            raise ConfigError(f"{option} {text!r}: {high} is out of range", hint="no model has that many")
        numbers.update(range(low, high + 1))
    if limit is not None and max(numbers) >= limit:
        raise ConfigError(
            f"{option} {text}: this model has {limit}, numbered 0 to {limit - 1}", hint=f"{option} 0-{limit - 1} is all"
        )
    return sorted(numbers)


def format_range(numbers: list[int]) -> str:
    """``[0, 1, 2, 7]`` → ``"0-2,7"``: the inverse of :func:`parse_range`."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in runs)


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_bytes(text: str, *, option: str) -> int:
    """``"4GB"`` → 4,000,000,000; ``"4GiB"`` → 4,294,967,296.

    Raises:
        ConfigError: not an amount of memory.
    """
    body = text.strip().lower().removesuffix("b")
    binary = body.endswith("i")
    body = body.removesuffix("i")
    unit = body[-1:] if body[-1:] in _UNITS else ""
    number = body[: len(body) - len(unit)]
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise ConfigError(f"{option} {text!r} is not an amount of memory", hint=f"write it like {option} 4GB")
    factor = 1024 ** "_kmgt".index(unit) if binary and unit else _UNITS[unit]
    return int(value * factor)


def format_bytes(size: float) -> str:
    """12,600,000 → ``"12.6 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def parse_quiet_hours(text: str, *, option: str) -> tuple[int, int]:
    """``"08:00-18:00"`` → ``(480, 1080)``, in minutes of the day. ``"22:00-06:00"`` spans midnight.

    Raises:
        ConfigError: not two times of the day, or the same twice.
    """
    minutes: list[int] = []
    for part in text.split("-"):
        hour, colon, minute = part.strip().partition(":")
        digits = hour.isdecimal() and minute.isdecimal() and hour.isascii() and minute.isascii() and len(minute) == 2
        if not (colon and digits and len(hour) <= 2 and int(hour) * 60 + int(minute) <= 24 * 60 and int(minute) < 60):
            break
        minutes.append((int(hour) * 60 + int(minute)) % (24 * 60))
    if len(minutes) != 2 or text.count("-") != 1:
        raise ConfigError(f"{option} {text!r} is not a time of the day", hint=f"write it like {option} 08:00-18:00")
    if minutes[0] == minutes[1]:
        raise ConfigError(
            f"{option} {text!r} begins when it ends", hint="a host that is never to compute need not be started"
        )
    return minutes[0], minutes[1]
