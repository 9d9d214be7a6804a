"""Runs the asynchronous part of a command: logging, signals, endings."""

from __future__ import annotations

import logging
import signal
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import trio

from daaswarm.api.control import Emit, is_running, request
from daaswarm.cli.output import Output
from daaswarm.config import Config
from daaswarm.errors import EXIT_INTERRUPTED, EXIT_OK, unwrap_groups
from daaswarm.store.data_dir import DataDir

Command = Callable[[], Awaitable[None]]


def set_up_logging(level: str) -> None:
    """Log to standard error; third parties only when something is wrong."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.ERROR)
    logging.getLogger("daaswarm").setLevel(level.upper())


def run_async(command: Command, config: Config) -> int:
    """Run ``command`` until it ends or is told to: Ctrl-C gives 130, SIGTERM a clean 0. Errors pass through."""
    set_up_logging(config.log.level)
    received: list[int] = []

    async def watch(scope: trio.CancelScope, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                received.append(number)
                scope.cancel()

    async def supervise() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(watch, nursery.cancel_scope)
            await command()
            nursery.cancel_scope.cancel()

    with unwrap_groups(BrokenPipeError):
        trio.run(supervise)
    if signal.SIGINT in received:
        return EXIT_INTERRUPTED
    return EXIT_OK


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
        output.message(f"ready: {event['peer_id']}")
        for address in event["addrs"]:
            output.message(f"  {address}")
        for line in event.get("lines", []):
            output.message(line)
    else:
        output.event(event)


def is_node_running(data_dir: DataDir) -> bool:
    return is_running(data_dir.socket_path)
