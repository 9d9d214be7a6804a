"""The control socket: how ``status``, ``host-expert`` and ``infer`` reach a node that already runs.

A Unix socket, mode 0600, in the data directory. The client sends a line of JSON, ``{"method": ..., "params": {...}}``;
the node answers with lines of JSON, events first, ``{"result": ...}`` or ``{"error": ...}`` last. A client that
goes away cancels what it asked for.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import trio

from daaswarm.errors import ConfigError, DaaswarmError, NoPeerCouldServe, Offline, get_exit_code, unwrap_groups

LINE_BYTES = 16 << 20  # a prompt of the longest context, with room
CLIENTS = 64  # at once; each may hold a generation
REQUEST_S = 10.0  # for the request line: a local client has it at hand
ACCEPT_PAUSE_S = 0.1  # when there are no file descriptors left

Emit = Callable[[dict[str, Any]], Awaitable[None]]
ControlHandler = Callable[[str, dict[str, Any], Emit], Awaitable[dict[str, Any]]]

logger = logging.getLogger(__name__)


def describe_error(error: DaaswarmError) -> dict[str, Any]:
    """The ``{"error": ...}`` object of the command contract."""
    described: dict[str, Any] = {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
    described["text"] = getattr(error, "text", "")
    if isinstance(error, NoPeerCouldServe):
        described["missing"] = {str(layer): experts for layer, experts in error.missing.items()}
    return described


class Asked(msgspec.Struct):
    """The request line."""

    method: str
    params: dict[str, Any] = {}


class RemoteError(DaaswarmError):
    """An error that happened in the node a command is attached to, carried over as it was."""

    def __init__(self, described: dict[str, Any], exit_code: int) -> None:
        error = described["error"]
        super().__init__(error["message"], hint=error["hint"])
        self.described = described
        self.exit_code = exit_code


async def serve_control(path: Path, handler: ControlHandler, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
    """Answer on the socket until cancelled. The caller holds the data directory's lock, so a leftover file is stale.

    Raises:
        ConfigError: the socket can't be made there.
    """
    limiter = trio.Semaphore(CLIENTS)
    _remove(path)
    listening = trio.socket.from_stdlib_socket(_bind(path))
    try:
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                await limiter.acquire()
                client = await _accept(listening)
                nursery.start_soon(_serve_client, trio.SocketStream(client), handler, limiter)
    finally:
        listening.close()
        _remove(path)


def _bind(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)  # of the whole process: nothing may run between this and the next line but one
        try:
            listening.bind(os.fspath(path))
        finally:
            os.umask(before)
        listening.listen(16)
    except OSError as error:
        listening.close()
        raise ConfigError(f"control socket {path}: {error.strerror}", hint="choose another --data-dir") from error
    return listening


async def _accept(listening: trio.socket.SocketType) -> trio.socket.SocketType:
    while True:
        try:
            return (await listening.accept())[0]
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED):
                raise
            logger.warning("control socket: %s", error.strerror)
            await trio.sleep(ACCEPT_PAUSE_S)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


async def _serve_client(stream: trio.SocketStream, handler: ControlHandler, limiter: trio.Semaphore) -> None:
    turn = trio.Lock()  # several tasks of one request may report at the same time

    async def emit(event: dict[str, Any]) -> None:
        async with turn:
            await stream.send_all(msgspec.json.encode(event) + b"\n")

    async def watch(scope: trio.CancelScope) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while await stream.receive_some(1024):
                pass
        scope.cancel()

    try:
        async with stream:
            try:
                with trio.fail_after(REQUEST_S):
                    line = await _read_line(stream)
                asked = msgspec.json.decode(line, type=Asked)
            except (trio.TooSlowError, trio.BrokenResourceError, msgspec.MsgspecError, EOFError) as error:
                logger.info("control socket: bad request: %s", error)
                return
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, nursery.cancel_scope)
                try:
                    with unwrap_groups():
                        result = await handler(asked.method, asked.params, emit)
                    await emit({"result": result})
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    logger.info("control socket: client went away")
                except DaaswarmError as error:
                    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                        await emit({**describe_error(error), "exit_code": get_exit_code(error)})
                except Exception as error:  # a bug ends this one request; the node and its other clients go on
                    logger.exception("control socket: %s failed", asked.method)
                    failed = DaaswarmError(f"the node failed: {error!r}", hint="its output says more; report it")
                    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                        await emit({**describe_error(failed), "exit_code": get_exit_code(failed)})
                nursery.cancel_scope.cancel()
    finally:
        limiter.release()


async def _read_line(stream: trio.SocketStream) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        data = await stream.receive_some(65_536)
        if not data:
            raise EOFError("ended before a line")
        line += data
        if len(line) > LINE_BYTES:
            raise EOFError("line too long")
    return bytes(line)


def is_running(path: Path) -> bool:
    """Whether a node answers on the socket."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(2.0)  # a local accept queue answers at once or is stuck
            probe.connect(os.fspath(path))
            return True
    except OSError:
        return False


async def request(path: Path, method: str, params: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """Ask a running node; yields its events, the last one ``{"result": ...}``.

    Raises:
        RemoteError: what the node reported.
        Offline: the node stopped while it was asked.
    """
    try:
        stream = await trio.open_unix_socket(os.fspath(path))
    except OSError as error:
        raise Offline(f"the node at {path} doesn't answer: {error.strerror}", hint="start it again") from error
    buffer = bytearray()
    async with stream:
        with contextlib.suppress(trio.BrokenResourceError):  # it stopped; said below
            await stream.send_all(msgspec.json.encode({"method": method, "params": params}) + b"\n")
        while True:
            try:
                data = await stream.receive_some(65_536)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                raise Offline("the node stopped before it had answered", hint="look at its output, start it again")
            buffer += data
            *lines, rest = bytes(buffer).split(b"\n")
            buffer = bytearray(rest)
            for line in lines:
                event = msgspec.json.decode(line, type=dict[str, Any])
                if "error" in event:
                    raise RemoteError(event, event.pop("exit_code"))
                yield event
                if "result" in event:
                    return
