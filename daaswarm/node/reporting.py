"""How the long tasks of a node tell what they are doing, and the longest of them: getting a model ready."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from daaswarm.config import get_cache_dir
from daaswarm.models.sources import LocalModel, find_model

PROGRESS_S = 0.1  # between two progress events of one task

Event = dict[str, Any]
Emit = Callable[[Event], Awaitable[None]]


def make_progress(emit: Emit) -> Callable[[str, int, int], None]:
    """A progress callback for a worker thread, which reports at most every :data:`PROGRESS_S`."""
    last: dict[str, float] = {}

    def progress(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - last.get(what, 0.0) < PROGRESS_S:
            return
        last[what] = now
        trio.from_thread.run(emit, {"event": "progress", "what": what, "done": done, "total": total})

    return progress


async def get_model(name_or_path: str, emit: Emit) -> LocalModel:
    """The model on this machine: fetched, converted or hashed first if need be, with progress.

    Raises:
        ModelError: unknown, damaged, or impossible to split.
        Offline: it has to be fetched and can't be.
    """
    return await trio.to_thread.run_sync(
        find_model, name_or_path, get_cache_dir(), make_progress(emit), abandon_on_cancel=True
    )
