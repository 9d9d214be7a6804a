"""How much of what hosts say is checked: ``off``, ``sample`` or ``sample=0.1``, ``every``, ``twin`` or ``twin=0.1``."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from daaswarm.errors import ConfigError

VerifyKind = Literal["off", "sample", "every", "twin"]
SHARE = 0.05  # of the calls of a host that has earned trust
HINT = "write off, sample, sample=0.1, every or twin"


class Verify(msgspec.Struct, frozen=True):
    """``kind``: ``sample`` and ``every`` check by sketches where there are some and else by a second host, ``twin``
    always by a second host. ``share``: of the calls of a trusted host; those of others are checked more often.
    """

    kind: VerifyKind = "sample"
    share: float = SHARE

    def __str__(self) -> str:
        return self.kind if self.kind in ("off", "every") else f"{self.kind}={self.share:g}"


OFF = Verify("off", 0.0)


def parse_verify(text: str) -> Verify:
    """Raises:
    ConfigError: it is none.
    """
    name, equals, share = text.strip().lower().partition("=")
    if name not in ("off", "sample", "every", "twin") or (equals and name in ("off", "every")):
        raise ConfigError(f"verify {text!r} is not known", hint=HINT)
    kind: VerifyKind = name  # type: ignore[assignment]
    if not equals:
        return Verify(kind, {"off": 0.0, "every": 1.0}.get(name, SHARE))
    try:
        number = float(share)
    except ValueError:
        number = math.nan
    if not 0 < number <= 1:
        raise ConfigError(f"verify {text!r}: the share of calls is from above 0 to 1", hint=HINT)
    return Verify(kind, number)
