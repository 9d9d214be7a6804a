"""``bench load``: what a host does when it is asked for more than it can compute.

One host process, several caller processes. The load rises in steps; each caller asks at its rate whatever comes back,
and the first one asks for half of everything, to see whether it takes the others' part.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
import trio

from daaswarm.bench.child import Child, start_process
from daaswarm.bench.expert_calls import START_S
from daaswarm.bench.load_caller import Outcome, Step, merge
from daaswarm.errors import DaaswarmError
from daaswarm.node.reporting import Emit

LOADS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # times the capacity
IN_FLIGHT = 4  # calls of each caller at any time while the capacity is measured
GREEDY_SHARE = 0.5  # of the load that comes from the first caller
SAMPLE_S = 0.1  # between two looks at the host's memory
ANSWER_S = 60.0  # beyond its step's time that a caller may take to report it


async def run_load(
    *, dim: int, batch: int, callers: int, seconds: float, deadline_s: float, folder: Path, emit: Emit
) -> dict[str, Any]:
    """The capacity, then a step of ``seconds`` for each of :data:`LOADS`.

    Raises:
        DaaswarmError: a process didn't start, or ended before it should.
    """
    async with AsyncExitStack() as stack:
        for_host, for_callers = get_cores()
        options = ["--dim", f"{dim}", "--data-dir", f"{folder / 'host'}"]
        with on_cores(for_host):
            host = Child(await start_process("bench", "serve-expert", "--expert", "ffn", *options))
        stack.push_async_callback(host.close)
        failure = DaaswarmError("a process of the benchmark did not start", hint="its messages are above")
        contact = await host.wait_ready(START_S, failure)
        where = msgspec.json.encode(contact).decode()
        running: list[Child] = []
        for number in range(callers):
            place = ["--contact", where, "--batch", f"{batch}", "--dim", f"{dim}", "--seed", f"{number}"]
            with on_cores(for_callers):
                child = Child(
                    await start_process("bench", "call-load", *place, "--data-dir", f"{folder / f'{number}'}")
                )
            stack.push_async_callback(child.close)
            running.append(child)
        for child in running:
            await child.wait_ready(START_S, failure)
        usage = Usage(host.process.pid)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(usage.watch)
            closed = Step(0.0, seconds, deadline_s, IN_FLIGHT)
            outcomes = await _order(running, [closed] * callers)
            capacity = sum(outcome.served for outcome in outcomes) / closed.seconds
            if not capacity:
                raise DaaswarmError("no call was answered", hint="choose a smaller --dim or --batch, or more --seconds")
            steps: list[dict[str, Any]] = []
            for load in LOADS:
                await emit(
                    {"event": "progress", "what": f"{load:g} x capacity", "done": len(steps), "total": len(LOADS)}
                )
                rates = split(load * capacity, callers)
                orders = [Step(rate, seconds, deadline_s) for rate in rates]
                usage.peak = 0
                async with trio.open_nursery() as both:
                    both.start_soon(usage.measure_cpu, deadline_s, seconds)
                    outcomes = await _order(running, orders)
                step = {"load": load, **describe(outcomes, seconds)}
                steps.append({**step, "host_cpu_s": round(usage.cpu_s, 2), "rss_mib": usage.peak >> 20})
            nursery.cancel_scope.cancel()
    peak = max(step["served_per_s"] for step in steps)
    for step in steps:
        step["of_peak"] = round(step["served_per_s"] / peak, 3)
    return {
        "dim": dim,
        "batch": batch,
        "callers": callers,
        "seconds": seconds,
        "deadline_s": deadline_s,
        "host_cores": len(for_host) or os.cpu_count(),
        "capacity_per_s": round(capacity, 1),
        "rss_mib": usage.series,
        "steps": steps,
    }


def get_cores() -> tuple[list[int], list[int]]:
    """The host's cores and the callers': on one machine callers would take from the host what it computes with. Empty
    where there is but one, or the system can't tell.
    """
    if sys.platform != "linux":
        return [], []
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    return (cores[:half], cores[half:]) if half else ([], [])


@contextmanager
def on_cores(cores: list[int]) -> Iterator[None]:
    """Processes that are started meanwhile run there, if anything is said."""
    if sys.platform != "linux" or not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Usage:
    """What a process takes.

    Attributes:
        series: MiB of RSS, one for each second.
        peak: bytes of RSS since it was last set.
        cpu_s: of all its threads, when last measured. On a machine that others use it is less than its cores' time.
    """

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.peak = 0
        self.cpu_s = 0.0
        self.series: list[int] = []

    async def measure_cpu(self, after_s: float, seconds: float) -> None:
        await trio.sleep(after_s)
        before = self._process.cpu_times()
        await trio.sleep(seconds)
        after = self._process.cpu_times()
        self.cpu_s = after.user - before.user + after.system - before.system

    async def watch(self) -> None:
        started = time.monotonic()
        while True:
            rss = self._process.memory_info().rss
            self.peak = max(self.peak, rss)
            if time.monotonic() - started >= len(self.series):
                self.series.append(rss >> 20)
            await trio.sleep(SAMPLE_S)


def split(rate: float, callers: int) -> list[float]:
    """Each caller's part: the first has :data:`GREEDY_SHARE`, the others the same each."""
    if callers == 1:
        return [rate]
    return [rate * GREEDY_SHARE] + [rate * (1 - GREEDY_SHARE) / (callers - 1)] * (callers - 1)


def compute_fair_shares(asked: Sequence[float], total: float) -> list[float]:
    """``total`` split so that nobody gets more than it asked for, and nobody could get more without taking it from one
    who has no more (max-min fairness; Bertsekas and Gallager, Data Networks, section 6.5.2).
    """
    shares = [0.0] * len(asked)
    left = total
    for done, place in enumerate(sorted(range(len(asked)), key=lambda i: asked[i])):
        shares[place] = min(asked[place], left / (len(asked) - done))
        left -= shares[place]
    return shares


def describe(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """A step's figures. ``least_share``: of its fair share that the caller got which was treated worst."""
    served = [outcome.served for outcome in outcomes]
    fair = compute_fair_shares([outcome.asked for outcome in outcomes], sum(served))
    parts = [got / share for got, share in zip(served, fair, strict=True) if share]
    errors: Counter[str] = Counter()
    for outcome in outcomes:
        errors.update(outcome.errors)
    answers, refusals = merge(each.answer_s for each in outcomes), merge(each.busy_s for each in outcomes)
    return {
        "asked_per_s": round(sum(outcome.asked for outcome in outcomes) / seconds, 1),
        "served_per_s": round(sum(served) / seconds, 1),
        "busy": sum(outcome.busy for outcome in outcomes),
        "held_back": sum(outcome.held_back for outcome in outcomes),
        "errors": dict(errors),
        "answer_p50_ms": answers.get_ms(0.5),
        "answer_p99_ms": answers.get_ms(0.99),
        "busy_p50_ms": refusals.get_ms(0.5),
        "busy_p99_ms": refusals.get_ms(0.99),
        "served_by_caller": served,
        "least_share": round(min(parts, default=1.0), 3),
    }


async def _order(children: Sequence[Child], steps: Sequence[Step]) -> list[Outcome]:
    """All at once; what came of each.

    Raises:
        DaaswarmError: one ended, or says nothing.
    """
    outcomes: list[Outcome | None] = [None] * len(children)

    async def order(place: int) -> None:
        child, step = children[place], steps[place]
        assert child.process.stdin is not None
        with suppress(trio.BrokenResourceError, msgspec.MsgspecError):
            await child.process.stdin.send_all(msgspec.json.encode(step) + b"\n")
            event = await child.read()
            if event is not None:
                outcomes[place] = msgspec.convert(event, Outcome, strict=False)

    with trio.move_on_after(max(step.seconds + 2 * step.deadline_s for step in steps) + ANSWER_S):
        async with trio.open_nursery() as nursery:
            for place in range(len(children)):
                nursery.start_soon(order, place)
    known = [outcome for outcome in outcomes if outcome is not None]
    if len(known) < len(children):
        raise DaaswarmError("a caller's process ended too soon", hint="its messages are above")
    return known
