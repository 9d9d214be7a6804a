"""Verdicts on what was seen."""

from __future__ import annotations

import errno

import pytest

from daaswarm.core.diagnosis import (
    STEPS,
    Network,
    Step,
    get_skipped,
    get_worst,
    judge_announced,
    judge_clock,
    judge_error,
    judge_way,
)
from daaswarm.errors import (
    BadProof,
    DaaswarmError,
    NotAllowed,
    PeerIdMismatch,
    RemoteProtocolError,
    Unreachable,
    WrongKey,
    WrongSwarm,
    WrongVersion,
)

LAN = Network(interface="eth0", prefix="192.168.1.0/24")


def fail(kind: type[DaaswarmError] = Unreachable, step: str = "", code: int | None = None) -> DaaswarmError:
    error = kind("it failed")
    error.step = step
    if code is not None:
        error.__cause__ = OSError(code, "x")
    return error


@pytest.mark.parametrize(
    ("error", "name", "next_"),
    [
        (fail(PeerIdMismatch), "peer id", ""),
        (fail(BadProof, "handshake"), "peer id", ""),
        (fail(WrongVersion, "handshake"), "version", ""),
        (fail(WrongSwarm, "handshake"), "swarm", ""),
        (fail(WrongKey, "handshake"), "swarm key", ""),
        (fail(NotAllowed, "handshake"), "swarm key", ""),
        (fail(step="tcp", code=errno.ECONNREFUSED), "tcp", "nothing listens there"),
        (fail(step="tcp", code=errno.EHOSTUNREACH), "tcp", "no way leads there"),
        (fail(step="tcp"), "tcp", "a firewall drops it"),
        (fail(), "tcp", "a firewall drops it"),
        (fail(step="tls"), "tls", "says nothing"),
        (fail(RemoteProtocolError, "tls"), "tls", "another program"),
        (fail(step="handshake"), "version", "its log"),
        (fail(step="name"), "name", "spelling"),
    ],
)
def test_every_failure_has_its_step(error: DaaswarmError, name: str, next_: str) -> None:
    step = judge_error(error)
    assert (step.name, step.verdict) == (name, "failed") and next_ in step.next


def test_ways() -> None:
    assert judge_way("192.168.1.9", "192.168.1.2", [LAN]).verdict == "ok"
    assert judge_way("8.8.8.8", "192.168.1.2", [LAN]).verdict == "ok"
    assert judge_way("8.8.8.8", "", [LAN]).verdict == "failed"
    foreign = judge_way("10.9.0.4", "192.168.1.2", [LAN])
    assert foreign.verdict == "warning" and "192.168.1.0/24" in foreign.next
    step = judge_error(fail(step="tcp"), foreign)
    assert (step.name, step.verdict) == ("interface", "failed")
    assert judge_error(fail(step="tls"), foreign).name == "tls"  # it was reached after all
    assert judge_way("fe80::1", "", []).verdict == "failed"


def test_clocks() -> None:
    assert judge_clock(0.3, 0.1).verdict == "ok"
    assert judge_clock(-20.0, 0.1).verdict == "warning"
    assert judge_clock(20.0, 18.0).verdict == "ok"  # as far as one can tell
    assert judge_clock(-600.0, 0.1).verdict == "failed" and "behind" in judge_clock(-600.0, 0.1).seen


def test_announced_addresses() -> None:
    assert judge_announced("A", {}).verdict == "ok"
    assert judge_announced("A", {"B": "", "C": ""}).verdict == "ok"
    assert judge_announced("A", {"B": "", "C": "refused"}).verdict == "warning"
    assert judge_announced("A", {"B": "refused"}).verdict == "failed"


def test_what_stands_on_a_failure_is_skipped() -> None:
    steps = [Step(name="name", verdict="ok", seen=""), Step(name="tcp", verdict="failed", seen="")]
    skipped = get_skipped(steps)
    assert {step.name for step in [*steps, *skipped]} == set(STEPS)
    assert all(step.seen == "needs tcp" for step in skipped)


def test_the_cause_is_the_first_failure() -> None:
    warning, failed = (Step(name=n, verdict=v, seen="") for n, v in (("tcp", "warning"), ("dht", "failed")))
    assert get_worst([warning, failed]) is failed
    assert get_worst([warning]) is warning
    assert get_worst([Step(name="tcp", verdict="ok", seen="")]) is None
