"""A nursery for a service that runs as long as a ``with`` block."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_service_nursery() -> AsyncIterator[trio.Nursery]:
    """Like ``trio.open_nursery``, but cancelled at the end of the block, whose own error is raised as it is.

    A plain nursery would wrap it in an ``ExceptionGroup``, and no caller could catch a ``ConfigError`` any more.
    """
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except Exception as error:  # noqa: BLE001 - raised again below, outside of the nursery
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
