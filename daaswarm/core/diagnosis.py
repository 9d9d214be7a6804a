"""Why a peer can't be reached, or what is wrong although it can: verdicts on what was seen, and what to do next.

Pure functions: what is seen comes from :mod:`daaswarm.net.examining`.
"""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Collection, Iterable, Sequence
from statistics import median
from typing import Literal

import msgspec

from daaswarm.core.signing import CLOCK_SKEW_S
from daaswarm.errors import (
    BadProof,
    Busy,
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

_GRAVITY: tuple[Verdict, ...] = ("failed", "warning", "ok", "skipped")

SKEW_WARNING_S = 5.0  # nothing fails yet, but a clock that is this far off isn't kept right


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step's verdict. ``next``: what to do, if anything; ``seconds``: how long it took."""

    name: str
    verdict: Verdict
    seen: str
    next: str = ""
    seconds: float = 0.0


class Announced(msgspec.Struct, frozen=True, kw_only=True):
    """An address that a peer announces. ``fault``: why the peer doesn't answer there; empty if it does. ``is_foreign``:
    it's of a private network that this machine isn't on."""

    addr: str
    fault: str = ""
    is_foreign: bool = False


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
    prefixes = {network.prefix for network in networks if _leads_somewhere(network)}
    own = ", ".join(sorted(prefixes)) or "none"
    return f"ask for an address on one of this machine's networks ({own}), a public one, or one through a relay"


def _leads_somewhere(network: Network) -> bool:
    prefix = ipaddress.ip_network(network.prefix)
    return not (prefix.is_loopback or prefix.is_link_local)


def judge_error(error: DaaswarmError, way: Step | None = None) -> Step:
    """The step at which a dial failed, and why. ``way``: what :func:`judge_way` said of the same address."""
    name, next_ = find_cause(error)
    seen = error.message
    if name == "tcp" and way is not None and way.verdict in ("warning", "failed"):
        return Step(name="interface", verdict="failed", seen=f"{way.seen}; {seen}", next=way.next)
    advice = [next_ or error.hint]
    if name == "tcp" and way is not None and way.next:
        advice.append(way.next)
    return Step(name=name, verdict="failed", seen=seen, next=_join(advice))


def find_cause(error: DaaswarmError) -> tuple[str, str]:
    """The step at which a dial failed, and what to do if the error's own hint doesn't say it."""
    if isinstance(error, PeerIdMismatch | BadProof) or error.step == "peer id":
        return "peer id", ""
    if isinstance(error, WrongVersion):
        return "version", ""
    if isinstance(error, WrongSwarm):
        return "swarm", ""
    if isinstance(error, WrongKey | NotAllowed):
        return "swarm key", ""
    if isinstance(error, Busy):  # this node's own: it was reached, but there's no room for the connection
        return "data", "this node has too many connections in use: try again in a moment"
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
        return "version", (
            "the peer hung up or was silent after TLS: it is stopped, overloaded or very old; "
            "its log (daaswarm logs, there) says why"
        )
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


def judge_announced(dialled: str, tried: Sequence[Announced], own: int = 0, relays: int = 0) -> Step:
    """Whether others can dial what the peer announces.

    Args:
        own: how many more it announces that mean its own machine only (127.0.0.1).
        relays: how many more lead through relays.
    """
    dead = [each for each in tried if each.fault]
    if relays and len(dead) == len(tried):  # behind a NAT; what it is told of there is for its neighbours
        return Step(name="data", verdict="ok", seen=f"it is met through {relays} relay{'s' * (relays > 1)} only")
    if not tried and own:
        return Step(
            name="data",
            verdict="failed",
            seen=f"{dialled} answers, but the peer announces addresses of its own machine only",
            next="others can't dial those: start it with --listen /ip4/0.0.0.0/tcp/4001, or give it --announce",
        )
    if not tried:
        text = "it announces no address: it only dials, or is met through relays"
        return Step(name="data", verdict="ok", seen=text)
    if not dead:
        seen = f"all {len(tried)} announced addresses answer" if len(tried) > 1 else "the announced address answers"
        return Step(name="data", verdict="ok", seen=seen)
    shown = "; ".join(sorted(f"{each.addr}: {each.fault}" for each in dead))
    if len(dead) == len(tried):
        return Step(
            name="data",
            verdict="failed",
            seen=f"{dialled} answers, but nothing that the peer announces does: {shown}",
            next="others dial what it announces: open that port, or give the node --announce with what can be dialled",
        )
    seen = f"{len(tried) - len(dead)} of {len(tried)} announced addresses answer; not {shown}"
    blocked = sorted(each.addr for each in dead if not each.is_foreign)
    if not blocked:
        return Step(name="data", verdict="ok", seen=f"{seen} (of a network that this machine isn't on)")
    return Step(
        name="data",
        verdict="warning",
        seen=seen,
        next=f"open the port of {', '.join(blocked)} in the firewall or router there, or don't announce it",
    )


def judge_bulk(size: int, fault: str) -> Step:
    """Whether more than small messages pass. ``size``: bytes sent there and back; ``fault``: what went wrong."""
    if not fault:
        return Step(name="data", verdict="ok", seen=f"{size // 1024} KiB there and back")
    return Step(
        name="data",
        verdict="failed",
        seen=f"small messages pass, {size // 1024} KiB there and back don't: {fault}",
        next=(
            "a tunnel, firewall or proxy on the way drops large packets or stalls: lower the MTU of the interface "
            "(1280 always passes), or take another way"
        ),
    )


def judge_known(peer: str, announced: Collection[str], told: Sequence[Collection[str] | None]) -> Step:
    """Whether others can find the peer.

    Args:
        told: for each of the peers nearest to it that was asked, at which addresses it knows the peer; ``None`` if it
            doesn't.
    """
    if not told:
        return Step(name="advert", verdict="ok", seen="there is no other peer to ask for it")
    knowing = [addrs for addrs in told if addrs is not None]
    seen = f"{len(knowing)} of {len(told)} other peers asked know it"
    if not knowing:
        hint = "look again in a minute; if it stays so, it reaches no peers: daaswarm network diagnose, there"
        return Step(name="advert", verdict="warning", seen=seen, next=hint)
    stale = sorted({addr for addrs in knowing for addr in addrs} - set(announced))
    if announced and all(set(addrs).isdisjoint(announced) for addrs in knowing):
        text = f"{seen}, but at other addresses: {', '.join(stale[:3])}"
        hint = f"what they know of …{peer[-6:]} is old: it changes within a quarter of an hour"
        return Step(name="advert", verdict="warning", seen=text, next=hint)
    return Step(name="advert", verdict="ok", seen=seen)


# -- this node itself ------------------------------------------------------------------------------------------------


def judge_listening(addrs: Sequence[str], is_running: bool, is_local: bool, left_out: Sequence[str] = ()) -> Step:
    """Where this node listens.

    Args:
        addrs: what it announces, or would if it ran.
        is_local: it listens on loopback.
        left_out: own addresses that others aren't told, with the reasons.
    """
    seen = ("announces " if is_running else "no node runs here; one would announce ") + ", ".join(addrs)
    if left_out:
        seen += f"; not told: {', '.join(left_out)}"
    if not addrs:
        return Step(name="listen", verdict="ok", seen="it only dials")
    if is_local:
        return Step(
            name="listen",
            verdict="warning",
            seen=f"{seen}: this machine only",
            next="to let others in: daaswarm join --listen /ip4/0.0.0.0/tcp/4001",
        )
    return Step(name="listen", verdict="ok", seen=seen)


def judge_own_clock(skews: Sequence[tuple[float, float]]) -> Step:
    """``skews``: of each peer asked, what :func:`judge_clock` takes."""
    if not skews:
        return Step(name="clock", verdict="skipped", seen="no peer is connected to compare it with")
    skew = median(skew for skew, _ in skews)
    step = judge_clock(skew, max(uncertainty for _, uncertainty in skews))
    who = "the peer's clock" if len(skews) == 1 else f"the clocks of {len(skews)} peers"
    seen = f"{who}: {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} this machine's"
    if step.verdict == "ok" or len(skews) == 1:
        return msgspec.structs.replace(step, seen=seen)
    hint = "this machine's clock is wrong: timedatectl set-ntp true on Linux; the node notices by itself"
    return msgspec.structs.replace(step, seen=seen, next=hint)


def judge_reachable(verdict: str, relays: int) -> Step:
    """Whether others get through to this node; ``verdict`` as in ``status`` (:mod:`daaswarm.core.reachability`)."""
    if verdict == "reachable":
        return Step(name="reachable", verdict="ok", seen="others get through to this node")
    if verdict == "unreachable" and relays:
        return Step(name="reachable", verdict="ok", seen=f"behind a NAT or firewall, met through {relays} relays")
    if verdict == "unreachable":
        return Step(
            name="reachable",
            verdict="failed",
            seen="behind a NAT or firewall, and no peer relays for it",
            next="start one node that can be dialled and give it as --bootstrap, or forward the port in the router",
        )
    reason = {"local": "it listens to this machine only", "not_listening": "it only dials"}
    return Step(name="reachable", verdict="skipped", seen=reason.get(verdict, "no peer could say yet"))


def judge_peers(known: int, connected: int, has_bootstrap: bool) -> Step:
    """Whether this node has anybody to talk to."""
    seen = f"{known} known, {connected} connected"
    if known or connected:
        return Step(name="peers", verdict="ok", seen=seen)
    hint = "" if has_bootstrap else "give the address of any node of the swarm: --bootstrap ADDR"
    return Step(name="peers", verdict="warning", seen=seen, next=hint or "the bootstrap addresses below say why")


# -- several steps ---------------------------------------------------------------------------------------------------


def merge(parts: Sequence[Step]) -> Step:
    """Several looks at one step as one: the worst verdict, and all that was seen."""
    worst = min(parts, key=lambda part: _GRAVITY.index(part.verdict))
    return Step(
        name=parts[0].name,
        verdict=worst.verdict,
        seen="; ".join(part.seen for part in parts),
        next=_join(part.next for part in parts),
    )


def _join(advice: Iterable[str]) -> str:
    """Sentences in a row."""
    first, *others = [text for text in advice if text] or [""]
    for text in others:
        first += f"{'' if first.endswith(('?', '.')) else '.'} {text[0].upper()}{text[1:]}"
    return first


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
