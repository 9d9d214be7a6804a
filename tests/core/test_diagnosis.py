"""Verdicts on what was seen."""

from __future__ import annotations

import errno

import pytest

from daaswarm.core.diagnosis import (
    STEPS,
    Announced,
    Network,
    Step,
    get_skipped,
    get_worst,
    judge_announced,
    judge_bulk,
    judge_clock,
    judge_error,
    judge_known,
    judge_listening,
    judge_own_clock,
    judge_peers,
    judge_reachable,
    judge_way,
    merge,
)
from daaswarm.errors import (
    BadProof,
    Busy,
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
        (fail(step="peer id"), "peer id", ""),
        (fail(Busy), "data", "too many connections"),
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
    nowhere = judge_way("fe80::1", "", [])
    assert nowhere.verdict == "failed" and judge_error(fail(step="tcp"), nowhere).name == "interface"
    loopback = judge_way("127.0.0.1", "127.0.0.1", [])
    step = judge_error(fail(step="tcp", code=errno.EHOSTUNREACH), loopback)
    assert step.name == "tcp" and "on its network? 127.0.0.1 is the machine that asks" in step.next


def test_clocks() -> None:
    assert judge_clock(0.3, 0.1).verdict == "ok"
    assert judge_clock(-20.0, 0.1).verdict == "warning"
    assert judge_clock(20.0, 18.0).verdict == "ok"  # as far as one can tell
    assert judge_clock(-600.0, 0.1).verdict == "failed" and "behind" in judge_clock(-600.0, 0.1).seen


B, C = Announced(addr="B"), Announced(addr="C")
BLOCKED = Announced(addr="D", fault="refused")
FOREIGN = Announced(addr="E", fault="no answer", is_foreign=True)


@pytest.mark.parametrize(
    ("tried", "own", "verdict", "seen", "next_"),
    [
        ([], 0, "ok", "announces no address", ""),
        ([], 1, "failed", "its own machine only", "--listen"),
        ([B], 0, "ok", "the announced address answers", ""),
        ([B, C], 1, "ok", "all 2", ""),
        ([B, FOREIGN], 0, "ok", "E: no answer", ""),
        ([B, BLOCKED], 0, "warning", "1 of 2", "the port of D in"),
        ([B, BLOCKED, FOREIGN], 0, "warning", "1 of 3", "the port of D in"),
        ([BLOCKED], 0, "failed", "D: refused", "--announce"),
        ([FOREIGN], 0, "failed", "E: no answer", "--announce"),
    ],
)
def test_announced_addresses(tried: list[Announced], own: int, verdict: str, seen: str, next_: str) -> None:
    step = judge_announced("A", tried, own)
    assert (step.name, step.verdict) == ("data", verdict)
    assert seen in step.seen and next_ in step.next


def test_a_peer_behind_a_nat_needs_no_address_that_answers() -> None:
    for tried, own in (([], 1), ([BLOCKED], 0), ([FOREIGN, BLOCKED], 0), ([], 0)):
        step = judge_announced("A", tried, own, relays=2)
        assert step.verdict == "ok" and "through 2 relays only" in step.seen
    assert judge_announced("A", [B, BLOCKED], relays=1).verdict == "warning"


def test_bulk() -> None:
    assert judge_bulk(65536, "").verdict == "ok" and "64 KiB" in judge_bulk(65536, "").seen
    step = judge_bulk(65536, "no answer")
    assert step.verdict == "failed" and "MTU" in step.next and "no answer" in step.seen


@pytest.mark.parametrize(
    ("told", "verdict", "seen"),
    [
        ([], "ok", "no other peer"),
        ([None, None], "warning", "0 of 2"),
        ([["/a"], None], "ok", "1 of 2"),
        ([["/old"]], "warning", "/old"),
        ([["/old"], ["/old", "/a"]], "ok", "2 of 2"),
    ],
)
def test_what_others_know(told: list[list[str] | None], verdict: str, seen: str) -> None:
    step = judge_known("P", ["/a", "/b"], told)
    assert (step.name, step.verdict) == ("advert", verdict) and seen in step.seen
    assert bool(step.next) == (verdict == "warning")


def test_this_node() -> None:
    assert judge_listening(["/a"], True, False).verdict == "ok"
    assert judge_listening([], True, False).verdict == "ok"
    local = judge_listening(["/a"], False, True)
    assert local.verdict == "warning" and "no node runs here" in local.seen and "--listen" in local.next
    assert "docker0" in judge_listening(["/a"], True, False, ["172.17.0.1 (docker0: a bridge)"]).seen
    verdicts = {v: judge_reachable(v, 0).verdict for v in ("reachable", "unreachable", "unknown", "local")}
    assert verdicts == {"reachable": "ok", "unreachable": "failed", "unknown": "skipped", "local": "skipped"}
    assert judge_reachable("unreachable", 2).verdict == "ok"
    assert judge_peers(0, 0, False).verdict == "warning" and "--bootstrap" in judge_peers(0, 0, False).next
    assert judge_peers(3, 1, False).verdict == "ok"


def test_whose_clock_is_wrong() -> None:
    assert judge_own_clock([]).verdict == "skipped"
    assert judge_own_clock([(0.1, 0.1)]).verdict == "ok"
    one = judge_own_clock([(-600.0, 0.1)])
    assert one.verdict == "failed" and "the clock that is wrong" in one.next
    most = judge_own_clock([(600.0, 0.1), (601.0, 0.1), (0.0, 0.1)])
    assert most.verdict == "failed" and "this machine's clock is wrong" in most.next
    assert judge_own_clock([(600.0, 0.1), (0.0, 0.1), (0.1, 0.1)]).verdict == "ok"  # one peer's clock is its business


def test_looks_at_one_step_together() -> None:
    good, bad = (Step(name="data", verdict=v, seen=s, next=n) for v, s, n in (("ok", "a", ""), ("failed", "b", "c")))
    assert merge([good, bad]) == Step(name="data", verdict="failed", seen="a; b", next="c")


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
