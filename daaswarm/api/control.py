"""The control socket: how ``status``, ``host-expert`` and ``infer`` reach a node that already runs.

It is at :mod:`daaswarm.api.endpoint`. The client sends a line of JSON, ``{"method": ..., "params": {...}}``; the node
answers with lines of JSON: ``{"event": "accepted"}`` at once, then the method's events, ``{"result": ...}`` or
``{"error": ...}`` last. A client that goes away cancels what it asked for.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import trio

from daaswarm.api.endpoint import Door, Way, choose_way, connect, open_door
from daaswarm.errors import (
    DaaswarmError,
    NoPeerCouldServe,
    Offline,
    RemoteProtocolError,
    TooLarge,
    get_exit_code,
    unwrap_groups,
)
from daaswarm.types import format_bytes

LINE_BYTES = 16 << 20  # a prompt of the longest context, with room
CLIENTS = 64  # at once; each may hold a generation
REQUEST_S = 10.0  # for the request line: a local client has it at hand
ACCEPTED_S = 15.0  # for the node to say that it heard: at once, unless it is stopped, or its loop is stuck
ACCEPT_PAUSE_S = 0.1  # when there are no file descriptors left

ACCEPTED = {"event": "accepted"}

T = TypeVar("T")
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


async def serve_control(
    path: Path,
    handler: ControlHandler,
    *,
    way: Way | None = None,
    task_status: Any = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer on the socket until cancelled. The caller holds the data directory's lock, so a leftover file is stale.

    Raises:
        ConfigError: the socket can't be made there.
    """
    limiter = trio.Semaphore(CLIENTS)
    with open_door(path, way or choose_way(path)) as door:
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                await limiter.acquire()
                client = await _accept(door.sock)
                nursery.start_soon(_serve_client, door, trio.SocketStream(client), handler, limiter)


async def _accept(listening: trio.socket.SocketType) -> trio.socket.SocketType:
    while True:
        try:
            return (await listening.accept())[0]
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED):
                raise
            logger.warning("control socket: %s", error.strerror)
            await trio.sleep(ACCEPT_PAUSE_S)


async def _serve_client(
    door: Door, stream: trio.SocketStream, handler: ControlHandler, limiter: trio.Semaphore
) -> None:
    turn = trio.Lock()  # several tasks of one request may report at the same time

    async def emit(event: dict[str, Any]) -> None:
        line = _encode_line(event)
        async with turn:
            await stream.send_all(line)

    async def watch(scope: trio.CancelScope) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while await stream.receive_some(1024):
                pass
        scope.cancel()

    try:
        async with stream:
            try:
                with trio.fail_after(REQUEST_S):
                    await door.greet(stream)
                    asked = _decode_line(await _Lines(stream).read(), Asked)
                    await emit(ACCEPTED)
            except EOFError:  # a look whether a node is there ends like this
                logger.debug("control socket: nothing was asked")
                return
            except (trio.TooSlowError, trio.BrokenResourceError, DaaswarmError) as error:
                logger.info("control socket: bad request: %s", error)
                return
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, nursery.cancel_scope)
                try:
                    with unwrap_groups(trio.BrokenResourceError, trio.ClosedResourceError):
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
    except Exception:  # a bug costs its client, not the node
        logger.exception("control socket: a client could not be served")
    finally:
        limiter.release()


class _Lines:
    """The lines that arrive on a stream, each up to LINE_BYTES."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._searched = 0  # bytes known to hold no line's end

    async def read(self) -> bytes:
        """The next line.

        Raises:
            EOFError: the stream ended, or broke, before the line did.
            RemoteProtocolError: it is too long.
        """
        buffer = self._buffer
        while (end := buffer.find(b"\n", self._searched)) < 0:
            self._searched = len(buffer)
            if len(buffer) > LINE_BYTES:
                raise RemoteProtocolError(f"a line of more than {format_bytes(LINE_BYTES)}")
            try:
                data = await self._stream.receive_some(65_536)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                raise EOFError("ended before a line")
            buffer += data
        line = bytes(buffer[:end])
        del buffer[: end + 1]
        self._searched = 0
        return line


def _encode_line(value: dict[str, Any]) -> bytes:
    try:
        line = msgspec.json.encode(value) + b"\n"
    except UnicodeEncodeError:  # a file's name, in some error, may be no text
        line = msgspec.json.encode(_as_text(value)) + b"\n"
    if len(line) > LINE_BYTES:
        raise TooLarge(
            f"{format_bytes(len(line))} at once to or from the node; {format_bytes(LINE_BYTES)} is the limit"
        )
    return line


def _as_text(value: Any) -> Any:
    """The same with what can't be written in UTF-8 as escapes."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_as_text(key): _as_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_text(item) for item in value]
    return value


def _decode_line(line: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:  # nested too deeply; not UTF-8
        raise RemoteProtocolError(f"an undecodable line: {error}") from error


async def request(path: Path, method: str, params: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """Ask a running node; yields its events, the last one ``{"result": ...}``.

    Raises:
        RemoteError: what the node reported.
        Offline: the node doesn't answer, or stopped while it was asked.
        TooLarge: the request is over the limit of a line.
        RemoteProtocolError: what answers there doesn't speak as a node does.
    """
    line = _encode_line({"method": method, "params": params})
    try:
        with trio.fail_after(ACCEPTED_S):
            stream = await connect(path)
    except OSError as error:
        raise Offline(f"the node at {path} doesn't answer: {error.strerror}", hint="start it again") from error
    except trio.TooSlowError:
        raise _stuck(path) from None
    lines = _Lines(stream)
    async with stream:
        try:
            try:
                with trio.fail_after(ACCEPTED_S):
                    with contextlib.suppress(trio.BrokenResourceError):  # it stopped; said below
                        await stream.send_all(line)
                    event = _decode_line(await lines.read(), dict[str, Any])
            except trio.TooSlowError:
                raise _stuck(path) from None
            while True:
                if "error" in event:
                    raise RemoteError(event, event.pop("exit_code"))
                if event != ACCEPTED:
                    yield event
                if "result" in event:
                    return
                event = _decode_line(await lines.read(), dict[str, Any])
        except EOFError:
            text = "the node stopped before it had answered"
            raise Offline(text, hint="look at its output, start it again") from None


def _stuck(path: Path) -> Offline:
    return Offline(
        f"the node at {path} runs, but has not answered for {ACCEPTED_S:g} s",
        hint="it is stopped, stuck or serves too many clients: continue it, or kill it and start it again",
    )
