"""Runs the asynchronous part of a command: logging, signals, endings."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import trio

from daaswarm.api.control import Emit, request
from daaswarm.api.endpoint import is_anybody_there
from daaswarm.cli.log_setup import set_up_logging
from daaswarm.cli.output import Output
from daaswarm.cli.progress import BARS
from daaswarm.cli.streams import finish_writing
from daaswarm.config import Config
from daaswarm.errors import EXIT_INTERRUPTED, EXIT_OK, ConfigError, Interrupted, unwrap_groups
from daaswarm.store.data_dir import DataDir

CLEAN_UP_S = 20.0  # a layer that computes, hosts that leave, a large file that is being read
HURRY_S = 2.0  # after a second signal

Command = Callable[[], Awaitable[None]]


def run_async(
    command: Command,
    config: Config,
    *,
    give_up: Callable[[], None] = lambda: None,
    told: int = EXIT_OK,
    on_interrupt: Callable[[], bool] = lambda: False,
) -> int:
    """Run ``command`` until it ends or is told to: Ctrl-C gives 130, SIGTERM and SIGHUP ``told``. Errors pass through.

    A second signal leaves :data:`HURRY_S` for cleaning up, since whoever sends it means it; without one it's
    :data:`CLEAN_UP_S`. Past that the process ends as it is, and its host processes with it (their input closes).

    Args:
        give_up: says the last words in that case.
        on_interrupt: Ctrl-C ended something smaller than the command, and the command goes on.
    """
    set_up_logging(config.log.level)
    received: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    for name in ("SIGHUP", "SIGBREAK"):  # Unix: the terminal closed; Windows: Ctrl-Break
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup
            numbers.append(number)

    def get_code() -> int:
        if signal.SIGINT in received:
            return EXIT_INTERRUPTED
        return told if received else EXIT_OK

    async def watch(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
        deadline = math.inf
        while True:
            with trio.move_on_at(deadline) as waiting:
                number = await signals.__anext__()
                if number == signal.SIGINT and not received and on_interrupt():
                    continue
                received.append(number)
            if waiting.cancelled_caught:
                give_up()
                BARS.end()
                sys.stdout.flush()
                finish_writing()
                os._exit(get_code())
            scope.cancel()
            deadline = min(deadline, trio.current_time() + (CLEAN_UP_S if len(received) == 1 else HURRY_S))

    async def supervise() -> None:
        # The receiver outlives the command's clean-up: a second signal must not cut it short with an exception.
        with trio.open_signal_receiver(*numbers) as signals:
            async with trio.open_nursery() as nursery:
                with trio.CancelScope() as scope:
                    nursery.start_soon(watch, signals, scope)
                    await command()
                nursery.cancel_scope.cancel()

    before = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in numbers}
    try:
        with unwrap_groups():
            trio.run(supervise)
    finally:
        if not received:  # else what was decided stands: the last words must come out whole
            for number, handler in before.items():
                signal.signal(number, handler)
    return get_code()


def run_to_end(command: Command, config: Config, output: Output) -> None:
    """:func:`run_async` for a command that has a result: told to stop, by whichever signal, it has none.

    Raises:
        Interrupted: it was told to stop.
    """
    interrupted = Interrupted("the command was interrupted")
    code = run_async(command, config, give_up=lambda: output.error(interrupted), told=EXIT_INTERRUPTED)
    output.end_progress()
    if code != EXIT_OK:
        raise interrupted


async def attach(data_dir: DataDir, method: str, params: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Have the node that runs on ``data_dir`` do it; its events go to ``emit``. Returns its result."""
    async with aclosing(request(data_dir.socket_path, method, params)) as events:
        async for event in events:
            if "result" in event:
                return event["result"]
            await emit(event)
    raise AssertionError("request() ends with a result or an error")


def show(event: dict[str, Any], output: Output) -> None:
    """Events that look the same in every command."""
    if event.get("event") == "text":
        output.json(event)
        output.text(event["text"])
    elif event.get("event") == "ready":
        output.json(event)
        output.result(f"ready: {event['peer_id']}")
        for address in event["addrs"]:
            output.result(f"  {address}")
        for line in event.get("lines", []):
            output.message(line)
    else:
        output.event(event)


def is_node_running(data_dir: DataDir) -> bool:
    return is_anybody_there(data_dir.socket_path)


def refuse_attached(data_dir: DataDir, **given: object) -> None:
    """Raises:
    ConfigError: an option was given that says how to start a node, and one runs already.
    """
    for name, value in given.items():
        if value is not None and value != []:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} has no meaning here: a node runs on {data_dir.path} already, and this command uses it",
                hint=f"leave {option} away, give it to daaswarm join, or choose another --data-dir",
            )
