"""Why a peer can't be reached, or what is wrong although it can: verdicts on what was seen, and what to do next.

Pure functions: what is seen comes from :mod:`daaswarm.net.examining`.
"""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from daaswarm.core.signing import CLOCK_SKEW_S
from daaswarm.errors import (
    BadProof,
    DaaswarmError,
    NotAllowed,
    PeerIdMismatch,
    RemoteProtocolError,
    WrongKey,
    WrongSwarm,
    WrongVersion,
)

Verdict = Literal["ok", "warning", "failed", "skipped"]

STEPS = (
    "name", "interface", "tcp", "tls", "peer id", "version", "swarm", "swarm key",
    "clock", "dht", "advert", "data", "relay",
)  # fmt: skip
"""In this order. Each stands on those before it."""

SKEW_WARNING_S = 5.0  # nothing fails yet, but a clock that is this far off isn't kept right


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step's verdict. ``next``: what to do, if anything; ``seconds``: how long it took."""

    name: str
    verdict: Verdict
    seen: str
    next: str = ""
    seconds: float = 0.0


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """A network that this machine is on: ``prefix`` like 192.168.1.0/24."""

    interface: str
    prefix: str


def judge_way(host: str, source: str, networks: Sequence[Network]) -> Step:
    """Whether an interface of this machine leads to ``host`` (an IP address).

    Args:
        source: the own address that the system would dial from; empty if it knows no way.
    """
    target = ipaddress.ip_address(host)
    if not source:
        text = f"no interface of this machine leads to {host}"
        return Step(name="interface", verdict="failed", seen=text, next=_describe_foreign(networks))
    via = next((n.interface for n in networks if ipaddress.ip_address(source) in ipaddress.ip_network(n.prefix)), "")
    seen = f"from {source}" + (f" of {via}" if via else "")
    if target.is_loopback:
        hint = "127.0.0.1 is the machine that asks: on another one, give the peer's address on the network"
        return Step(name="interface", verdict="ok", seen="this machine itself", next=hint)
    if is_foreign(host, networks):
        text = f"{host} is a private address, and this machine is not on its network ({seen})"
        return Step(name="interface", verdict="warning", seen=text, next=_describe_foreign(networks))
    return Step(name="interface", verdict="ok", seen=seen)


def is_foreign(host: str, networks: Iterable[Network]) -> bool:
    """Whether ``host`` means something only on a network that this machine isn't on."""
    target = ipaddress.ip_address(host)
    if not (target.is_private or target.is_link_local) or target.is_loopback:
        return False
    return not any(target in ipaddress.ip_network(network.prefix) for network in networks)


def _describe_foreign(networks: Sequence[Network]) -> str:
    own = ", ".join(sorted({network.prefix for network in networks})) or "none"
    return f"ask for an address on one of this machine's networks ({own}), a public one, or one through a relay"


def judge_error(error: DaaswarmError, way: Step | None = None) -> Step:
    """The step at which a dial failed, and why. ``way``: what :func:`judge_way` said of the same address."""
    name, next_ = _find_cause(error)
    seen = error.message
    if name == "tcp" and way is not None and way.verdict == "warning":
        return Step(name="interface", verdict="failed", seen=f"{way.seen}; {seen}", next=way.next)
    advice = [next_ or error.hint]
    if name == "tcp" and way is not None and way.next:
        advice.append(way.next)
    return Step(name=name, verdict="failed", seen=seen, next=". ".join(advice))


def _find_cause(error: DaaswarmError) -> tuple[str, str]:
    """The step's name, and what to do."""
    if isinstance(error, PeerIdMismatch | BadProof):
        return "peer id", ""
    if isinstance(error, WrongVersion):
        return "version", ""
    if isinstance(error, WrongSwarm):
        return "swarm", ""
    if isinstance(error, WrongKey | NotAllowed):
        return "swarm key", ""
    if error.step == "tcp":
        return "tcp", _advise_tcp(error)
    if error.step == "tls":
        if isinstance(error, RemoteProtocolError):
            return "tls", "another program has this port: check the address against the peer's ready line"
        return "tls", (
            "it takes connections and says nothing: another program, a stopped or overloaded node, "
            "or a firewall that lets only the first packets through"
        )
    if error.step == "handshake":
        return "version", "the peer hung up or was silent after TLS: its log (daaswarm logs, there) says why"
    if error.step == "name":
        return "name", "check the spelling, and whether this machine's name server knows it"
    return "tcp", _advise_tcp(error)


def _advise_tcp(error: DaaswarmError) -> str:
    code = error.__cause__.errno if isinstance(error.__cause__, OSError) else None
    if code == errno.ECONNREFUSED:
        return "nothing listens there: is the node running, and did its port change? daaswarm status, there, says it"
    if code in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return "no way leads there: is the peer's machine on, and is this one on its network?"
    if code is None:
        return (
            "no answer at all: a firewall drops it, the peer's machine is off, or a router in front of it passes "
            "nothing on. Open the port there; a node behind a router is met through a relay, at another address"
        )
    return ""


def judge_clock(skew_s: float, uncertainty_s: float) -> Step:
    """``skew_s``: the peer's clock less this machine's."""
    ahead = "ahead of" if skew_s > 0 else "behind"
    seen = f"{abs(skew_s):.1f} s {ahead} this machine's (+-{uncertainty_s:.2f} s)"
    certain = abs(skew_s) - uncertainty_s
    if certain > CLOCK_SKEW_S:
        return Step(
            name="clock",
            verdict="failed",
            seen=f"the peer's clock is {seen}; records are refused beyond {CLOCK_SKEW_S:.0f} s",
            next="set the clock that is wrong: timedatectl set-ntp true on Linux; the nodes notice by themselves",
        )
    if certain > SKEW_WARNING_S:
        return Step(name="clock", verdict="warning", seen=f"the peer's clock is {seen}", next="keep both clocks by NTP")
    return Step(name="clock", verdict="ok", seen=seen)


def judge_announced(dialled: str, tried: dict[str, str]) -> Step:
    """Whether others can dial what the peer announces.

    Args:
        tried: announced address → why it doesn't answer; empty if it does.
    """
    dead = {addr: reason for addr, reason in tried.items() if reason}
    if not tried:
        text = "it announces no address: it only dials, or is met through relays"
        return Step(name="data", verdict="ok", seen=text)
    if not dead:
        return Step(name="data", verdict="ok", seen=f"all {len(tried)} announced addresses answer")
    shown = "; ".join(f"{addr}: {reason}" for addr, reason in sorted(dead.items()))
    if len(dead) == len(tried):
        return Step(
            name="data",
            verdict="failed",
            seen=f"{dialled} answers, but nothing that the peer announces does: {shown}",
            next="others dial what it announces: open that port, or give the node --announce with what can be dialled",
        )
    return Step(
        name="data",
        verdict="warning",
        seen=f"{len(tried) - len(dead)} of {len(tried)} announced addresses answer; not {shown}",
        next="harmless if those are of a network that only others are on",
    )


def get_skipped(steps: Sequence[Step]) -> list[Step]:
    """What can't be said, since a step before it failed."""
    failed = next((step.name for step in steps if step.verdict == "failed"), "")
    there = {step.name for step in steps}
    return [Step(name=name, verdict="skipped", seen=f"needs {failed}") for name in STEPS if name not in there]


def get_worst(steps: Sequence[Step]) -> Step | None:
    """The step that names the cause: the first that failed, else the first warning."""
    for verdict in ("failed", "warning"):
        for step in steps:
            if step.verdict == verdict:
                return step
    return None
