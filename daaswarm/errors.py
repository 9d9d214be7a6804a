"""Every error that daaswarm raises on purpose, grouped by who has to act.

The text of an error says what happened and to what; ``hint`` says what to do next. ``code`` is a stable
word for scripts (``{"error": {"code": ...}}``) and on the wire.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Iterator
from typing import ClassVar, cast

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


class DaaswarmError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what happened, to what.
        hint: the next step for whoever has to act; may be empty.
    """

    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.step = ""  # of reaching a peer, at which this came: name, tcp, tls or handshake; empty elsewhere


class ConfigError(DaaswarmError):
    """The user has to act: a bad argument, file, key, model or address. Exit code 2."""

    code = "bad_input"


class ModelError(ConfigError):
    """A model that can't be used: unknown, damaged, altered, unsupported, quantised."""

    code = "bad_model"


class Offline(DaaswarmError):
    """Something must be fetched and can't be."""

    code = "offline"


class LocalProtocolError(DaaswarmError):
    """Our own code asked for something the protocol forbids (too large, after close). Nobody else is to blame."""

    code = "local_protocol_error"


class RemoteProtocolError(DaaswarmError):
    """The peer broke the protocol: garbage, oversized or truncated frames, a wrong certificate.

    Args:
        reject: the connection ends and the peer is scored; otherwise only the message is dropped.
    """

    code = "remote_protocol_error"

    def __init__(self, message: str, *, hint: str = "", reject: bool = True) -> None:
        super().__init__(message, hint=hint)
        self.reject = reject


class PeerIdMismatch(RemoteProtocolError):
    """Whoever answered at an address proved another PeerId than the address names."""

    code = "peer_id_mismatch"


class WrongVersion(RemoteProtocolError):
    """The peer speaks another version of the protocol."""

    code = "wrong_version"


class WrongSwarm(RemoteProtocolError):
    """The peer belongs to a swarm of another name."""

    code = "wrong_swarm"


class WrongKey(RemoteProtocolError):
    """A swarm of that name, but one side has another key, or none."""

    code = "wrong_key"


class NotAllowed(RemoteProtocolError):
    """A PeerId that an allow-list leaves out: the peer's on ours, or ours on the peer's."""

    code = "not_allowed"


class BadProof(RemoteProtocolError):
    """The peer did not prove the PeerId that it claims."""

    code = "bad_proof"


class Unreachable(DaaswarmError):
    """No connection could be made: refused, no route, silent past the deadline."""

    code = "unreachable"


class ConnectionLost(DaaswarmError):
    """The connection ended while something was still expected from it."""

    code = "connection_lost"


class DeadlineExceeded(DaaswarmError):
    """No answer before the deadline."""

    code = "deadline_exceeded"


class Busy(DaaswarmError):
    """The peer refused because a queue is full. ``retry_after_s`` says when to try again."""

    code = "busy"

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float = 0.1) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class RelayRefused(DaaswarmError):
    """A relay does not do what it was asked: it serves as none, or the peer holds no reservation there."""

    code = "relay_refused"


class TooLarge(DaaswarmError):
    """A message is over its limit; the limit is named."""

    code = "too_large"


class ExpertError(DaaswarmError):
    """The host has to act: it doesn't hold the expert, or computing failed."""

    code = "expert_error"


class WrongAnswer(DaaswarmError):
    """What a host computed did not pass a check."""

    code = "wrong_answer"


class Interrupted(DaaswarmError):
    """The user stopped it. Exit code 130.

    Args:
        text: what had been generated before.
    """

    code = "interrupted"

    def __init__(self, message: str, *, hint: str = "", text: str = "") -> None:
        super().__init__(message, hint=hint)
        self.text = text


class OutputLost(DaaswarmError):
    """Standard output can't be written to.

    Args:
        is_closed: its reader went away, which is no failure (``| head``): exit code 141, and nothing is said.
    """

    code = "output_lost"

    def __init__(self, message: str, *, hint: str = "", is_closed: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.is_closed = is_closed


class StorageError(DaaswarmError):
    """The disk has to be seen to: full, read-only, or a file that can't be read. A running node goes on without it."""

    code = "storage"


class OutcomeUnknown(StorageError):
    """The disk has not answered yet, and it is too late to take the write back: it may happen or not."""


class NoPeerCouldServe(DaaswarmError):
    """No live host for some experts. Exit code 3.

    Args:
        missing: ``{layer: [experts]}`` without a live host.
        text: what had been generated before.
    """

    code = "no_peer"

    def __init__(
        self, message: str, *, hint: str = "", missing: dict[int, list[int]] | None = None, text: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.missing = missing or {}
        self.text = text


EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_NO_PEER = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_PIPE_CLOSED = 141  # 128 + SIGPIPE: what a program has that dies of it


def get_exit_code(error: DaaswarmError) -> int:
    """The exit code of the command line for an error (the contract is in ``docs/reference/exit-codes.md``)."""
    if isinstance(error, ConfigError):
        return EXIT_BAD_INPUT
    if isinstance(error, Interrupted):
        return EXIT_INTERRUPTED
    if isinstance(error, OutputLost) and error.is_closed:
        return EXIT_PIPE_CLOSED
    if isinstance(error, NoPeerCouldServe | Unreachable):
        return EXIT_NO_PEER
    return EXIT_FAILED


@contextlib.contextmanager
def unwrap_groups(*expected: type[BaseException]) -> Generator[None, None, None]:
    """Turn the exception group of a nursery into the one error of ours in it.

    A nursery wraps whatever ends it in a group. Where all that went wrong is errors raised on purpose (or
    ``expected`` ones), the first is what the caller has to act on; a group with anything else in it is a bug and
    passes unchanged.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        leaves = list(_get_leaves(group))
        if not all(isinstance(leaf, (DaaswarmError, *expected)) for leaf in leaves):
            raise
        raise leaves[0] from None


def _get_leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        inner = cast("tuple[BaseException, ...]", error.exceptions)  # pyright: ignore[reportUnknownMemberType]
        for part in inner:
            yield from _get_leaves(part)
    else:
        yield error
