"""Who has to act, with which exit code, and what becomes of a nursery's group."""

from __future__ import annotations

import sys

import pytest
import trio

from daaswarm.errors import (
    Busy,
    ConfigError,
    ConnectionLost,
    DaaswarmError,
    DeadlineExceeded,
    ExpertError,
    LocalProtocolError,
    ModelError,
    NoPeerCouldServe,
    Offline,
    PeerIdMismatch,
    RemoteProtocolError,
    TooLarge,
    Unreachable,
    get_exit_code,
    unwrap_groups,
)

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup


@pytest.mark.parametrize(
    ("kind", "code", "exit_code"),
    [
        (DaaswarmError, "error", 1),
        (ConfigError, "bad_input", 2),
        (ModelError, "bad_model", 2),
        (Offline, "offline", 1),
        (LocalProtocolError, "local_protocol_error", 1),
        (RemoteProtocolError, "remote_protocol_error", 1),
        (PeerIdMismatch, "peer_id_mismatch", 1),
        (Unreachable, "unreachable", 3),
        (ConnectionLost, "connection_lost", 1),
        (DeadlineExceeded, "deadline_exceeded", 1),
        (Busy, "busy", 1),
        (TooLarge, "too_large", 1),
        (ExpertError, "expert_error", 1),
        (NoPeerCouldServe, "no_peer", 3),
    ],
)
def test_codes(kind: type[DaaswarmError], code: str, exit_code: int) -> None:
    error = kind("what", hint="next")
    assert (error.code, error.message, error.hint, str(error)) == (code, "what", "next", "what")
    assert get_exit_code(error) == exit_code


def test_what_an_error_carries() -> None:
    assert RemoteProtocolError("x").reject and not RemoteProtocolError("x", reject=False).reject
    assert Busy("x", retry_after_s=2.5).retry_after_s == 2.5
    error = NoPeerCouldServe("x", missing={3: [1]}, text="so far")
    assert error.missing == {3: [1]} and error.text == "so far"
    assert NoPeerCouldServe("x").missing == {}


def test_one_error_comes_out_of_nested_groups() -> None:
    error = ConfigError("the cause")
    with pytest.raises(ConfigError) as info, unwrap_groups():
        raise ExceptionGroup("", [ExceptionGroup("", [error])])
    assert info.value is error


def test_the_first_of_several_is_what_the_caller_has_to_act_on() -> None:
    first, second = ExpertError("first"), Busy("second")
    with pytest.raises(ExpertError), unwrap_groups():
        raise ExceptionGroup("", [first, ExceptionGroup("", [second])])


def test_a_bug_in_the_group_is_not_hidden() -> None:
    group = ExceptionGroup("", [ConfigError("x"), ZeroDivisionError()])
    with pytest.raises(BaseExceptionGroup) as info, unwrap_groups():
        raise group
    assert info.value is group


def test_expected_errors_of_others_are_unwrapped_too() -> None:
    with pytest.raises(BrokenPipeError), unwrap_groups(BrokenPipeError):
        raise ExceptionGroup("", [BrokenPipeError()])
    with pytest.raises(BaseExceptionGroup), unwrap_groups():
        raise ExceptionGroup("", [BrokenPipeError()])


def test_plain_errors_and_no_error_pass() -> None:
    with unwrap_groups():
        pass
    with pytest.raises(KeyError), unwrap_groups():
        raise KeyError("x")


async def test_with_a_nursery() -> None:
    async def fail() -> None:
        raise NoPeerCouldServe("nobody")

    with pytest.raises(NoPeerCouldServe), unwrap_groups():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            await trio.sleep_forever()
