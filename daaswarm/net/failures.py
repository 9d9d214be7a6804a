"""Errors of ours to ``Failure`` messages and back: a refusal keeps its name across the wire."""

from __future__ import annotations

from daaswarm.errors import (
    BadProof,
    Busy,
    ConfigError,
    ConnectionLost,
    DaaswarmError,
    DeadlineExceeded,
    ExpertError,
    ModelError,
    NotAllowed,
    Offline,
    RelayRefused,
    RemoteProtocolError,
    TooLarge,
    WrongKey,
    WrongSwarm,
    WrongVersion,
)
from daaswarm.messages import Failure

MESSAGE_CHARS = 1000  # of Failure.message and Failure.hint, which the wire caps at 1,024
MAX_RETRY_S = 30.0  # a peer can't talk anyone into waiting longer

UNSUPPORTED = "unsupported"

_BY_CODE: dict[str, type[DaaswarmError]] = {
    kind.code: kind
    for kind in (
        BadProof,
        ConfigError,
        ConnectionLost,
        DeadlineExceeded,
        ExpertError,
        ModelError,
        NotAllowed,
        Offline,
        RelayRefused,
        RemoteProtocolError,
        TooLarge,
        WrongKey,
        WrongSwarm,
        WrongVersion,
    )
}


def get_failure(error: DaaswarmError) -> Failure:
    """What the peer is told about ``error``."""
    retry_after_s = error.retry_after_s if isinstance(error, Busy) else 0.0
    return Failure(
        code=error.code,
        message=error.message[:MESSAGE_CHARS],
        hint=error.hint[:MESSAGE_CHARS],
        retry_after_s=retry_after_s,
    )


def get_error(failure: Failure, peer: str) -> DaaswarmError:
    """The error that ``peer`` answered with; a code of a newer version becomes an :class:`ExpertError` naming it."""
    message, hint = f"{peer}: {_clean(failure.message)}", _clean(failure.hint)
    if failure.code == Busy.code:
        retry_after_s = failure.retry_after_s
        if not 0 <= retry_after_s <= MAX_RETRY_S:  # also when it is NaN
            retry_after_s = MAX_RETRY_S
        return Busy(message, hint=hint, retry_after_s=retry_after_s)
    kind = _BY_CODE.get(failure.code)
    if kind is None:
        return ExpertError(f"{message} ({_clean(failure.code)})", hint=hint)
    if issubclass(kind, RemoteProtocolError):
        return kind(message, hint=hint, reject=False)
    return kind(message, hint=hint)


def _clean(text: str) -> str:
    """A peer's words end up in a terminal and in the log: no control characters, no further lines."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
