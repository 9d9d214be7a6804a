"""Lets another program own a command: when the pipe on its standard input closes, the command leaves."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def ended_by_eof(wanted: bool) -> AsyncIterator[None]:
    """Cancel the body when standard input ends, if ``wanted``. A supervisor that dies closes it too."""
    if not wanted:
        yield
        return

    async def watch(scope: trio.CancelScope) -> None:
        while await trio.to_thread.run_sync(os.read, 0, 1024, abandon_on_cancel=True):
            pass
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, nursery.cancel_scope)
        yield
        nursery.cancel_scope.cancel()
