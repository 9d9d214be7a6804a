"""The control socket, over a real one."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from daaswarm.api import control, endpoint
from daaswarm.api.control import Emit, RemoteError, request, serve_control
from daaswarm.api.endpoint import HOST, UNIX_PATH_BYTES, connect, is_anybody_there, open_door
from daaswarm.errors import ConfigError, NoPeerCouldServe, Offline, RemoteProtocolError, TooLarge

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup


class Node:
    """What answers: a handler with one method for each case."""

    def __init__(self) -> None:
        self.started = trio.Event()
        self.cancelled = trio.Event()

    async def handle(self, method: str, params: dict[str, Any], emit: Emit) -> dict[str, Any]:
        if method == "count":
            for n in range(params["to"]):
                await emit({"event": "n", "n": n})
            return {"done": params["to"]}
        if method == "wait":
            self.started.set()
            try:
                await emit({"event": "waiting"})
                await trio.sleep_forever()
            finally:
                self.cancelled.set()
        if method == "grouped":
            raise ExceptionGroup("", [NoPeerCouldServe("nobody", hint="wait", missing={3: [0, 1]}, text="so far")])
        if method == "large":
            return {"text": "x" * 2000}
        if method == "name":
            raise ConfigError("no file \udce9.txt", hint="look at \udce9")
        if method == "bug":
            return {"x": params["missing"]}
        raise ConfigError(f"unknown method {method!r}", hint="none")


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[Node]:
    node = Node()
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_control, path, node.handle, way="tcp" if path.suffix == ".tcp" else "unix"))
        yield node
        nursery.cancel_scope.cancel()


async def ask(path: Path, method: str, params: dict[str, Any]) -> list[dict[str, Any]]:
    async with aclosing(request(path, method, params)) as events:
        return [event async for event in events]


@pytest.fixture(params=["unix", "tcp"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"control.{request.param}"


@pytest.fixture
def unix_path(tmp_path: Path) -> Path:
    return tmp_path / "control.unix"


async def test_events_then_the_result(path: Path) -> None:
    async with serving(path):
        assert await trio.to_thread.run_sync(is_anybody_there, path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert await ask(path, "count", {"to": 3}) == [
            *({"event": "n", "n": n} for n in range(3)),
            {"result": {"done": 3}},
        ]
        assert len(await ask(path, "count", {"to": 3, "text": "ü" * 300_000})) == 4  # longer than one read
    assert not path.exists() and not is_anybody_there(path)


async def test_an_error_comes_over_as_it_was(path: Path) -> None:
    async with serving(path):
        with pytest.raises(RemoteError, match="unknown method 'x'") as info:
            await ask(path, "x", {})
        assert info.value.exit_code == 2 and info.value.hint == "none"
        error = {"code": "bad_input", "message": "unknown method 'x'", "hint": "none"}
        assert info.value.described == {"error": error, "text": ""}
        with pytest.raises(RemoteError) as info:
            await ask(path, "grouped", {})
        assert info.value.exit_code == 3
        assert info.value.described["text"] == "so far" and info.value.described["missing"] == {"3": [0, 1]}


async def test_a_bug_ends_one_request_and_not_the_node(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(path):
        with pytest.raises(RemoteError, match="KeyError") as info:
            await ask(path, "bug", {})
        assert info.value.exit_code == 1
        assert "Traceback" in caplog.text
        assert len(await ask(path, "count", {"to": 1})) == 2


async def test_a_client_that_goes_away_cancels_what_it_asked_for(path: Path) -> None:
    async with serving(path) as node:
        async with aclosing(request(path, "wait", {})) as events:
            assert await events.__anext__() == {"event": "waiting"}
        with trio.fail_after(5):
            await node.cancelled.wait()
        assert len(await ask(path, "count", {"to": 1})) == 2


async def test_a_client_that_never_reads_holds_up_only_itself(path: Path) -> None:
    async with serving(path), await connect(path) as stream:
        await stream.send_all(b'{"method": "count", "params": {"to": 100000}}\n')
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert len(await ask(path, "count", {"to": 1})) == 2


@pytest.mark.parametrize(
    "line",
    [
        b"garbage\n",
        b"\xff\xff\n",
        b"[]\n",
        b"{}\n",
        b'{"method": 1}\n',
        b'{"method": "count", "params": []}\n',
        b"\n",
        b"[" * 100_000 + b"\n",
        b'{"method": "count", "more": ' + b"[" * 100_000 + b"\n",
        b'{"method": "count", "params": {"x": ' + b"[" * 100_000 + b"\n",
        b'{"method": "\xff"}\n',
        b"no end",
        b"",
    ],
)
async def test_a_garbage_line_ends_that_client(path: Path, line: bytes) -> None:
    async with serving(path):
        async with await connect(path) as stream:
            await stream.send_all(line)
            await stream.send_eof()
            with trio.fail_after(5):
                assert await stream.receive_some() == b""
        assert len(await ask(path, "count", {"to": 1})) == 2


async def test_a_line_that_never_ends_and_a_client_that_says_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LINE_BYTES", 100_000)
    monkeypatch.setattr(control, "REQUEST_S", 0.05)
    async with serving(path):
        for data in (b"x" * 200_000, b""):
            async with await connect(path) as stream:
                with trio.fail_after(5):
                    try:
                        await stream.send_all(data)
                        assert await stream.receive_some() == b""
                    except trio.BrokenResourceError:
                        pass  # it hung up before all was sent
        assert len(await ask(path, "count", {"to": 1})) == 2


async def test_a_node_that_is_stuck(unix_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = unix_path
    monkeypatch.setattr(control, "ACCEPTED_S", 0.05)
    with socket.socket(socket.AF_UNIX) as stuck:  # it listens, as a stopped process does, but never answers
        stuck.bind(os.fspath(path))
        stuck.listen(16)
        assert is_anybody_there(path)
        for text in ("", "x" * 1_000_000):  # also one that doesn't fit into the socket's buffer
            with pytest.raises(Offline, match="has not answered") as info, trio.fail_after(5):
                await ask(path, "count", {"to": 1, "text": text})
            assert "kill it" in info.value.hint


async def test_a_node_says_at_once_that_it_heard(path: Path) -> None:
    async with serving(path), await connect(path) as stream:
        await stream.send_all(b'{"method": "wait"}\n')
        with trio.fail_after(5):
            assert (await stream.receive_some()).startswith(b'{"event":"accepted"}\n')


async def test_lines_are_bounded_both_ways(unix_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = unix_path
    monkeypatch.setattr(control, "LINE_BYTES", 1000)
    async with serving(path):
        with pytest.raises(TooLarge):
            await ask(path, "count", {"to": 1, "text": "x" * 1000})
        with pytest.raises(RemoteError, match="limit") as info:
            await ask(path, "large", {})
        assert info.value.described["error"]["code"] == "too_large"
    async with trio.open_nursery() as nursery:

        async def talk(stream: trio.SocketStream) -> None:
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    await stream.send_all(b"x" * 1000)

        with socket.socket(socket.AF_UNIX) as plain:
            plain.bind(os.fspath(path))
            plain.listen()
            listening = trio.SocketListener(trio.socket.from_stdlib_socket(plain))
            nursery.start_soon(trio.serve_listeners, talk, [listening])
            with pytest.raises(RemoteProtocolError, match="a line of more than"), trio.fail_after(5):
                await ask(path, "count", {})
            nursery.cancel_scope.cancel()


async def test_a_stale_socket_file_is_replaced(unix_path: Path) -> None:
    path = unix_path
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(os.fspath(path))
    assert path.exists() and not is_anybody_there(path)
    async with serving(path):
        assert is_anybody_there(path)


async def test_where_there_is_no_node(path: Path) -> None:
    assert not is_anybody_there(path)
    with pytest.raises(Offline, match="doesn't answer"):
        await ask(path, "count", {})
    path.write_text("a file")
    assert not is_anybody_there(path)


async def test_a_node_that_stops_in_between(path: Path) -> None:
    async with serving(path):
        events = request(path, "wait", {})
        await events.__anext__()
    with pytest.raises(Offline, match="stopped before"):
        await events.__anext__()


async def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="control socket"):
        await serve_control(tmp_path / "missing" / "control.sock", Node().handle)


async def test_a_name_that_is_no_text_costs_nobody_anything(path: Path) -> None:
    async with serving(path):
        for _ in range(2):
            with pytest.raises(RemoteError, match=r"no file \\udce9\.txt"):
                await ask(path, "name", {})


async def test_a_bug_here_costs_its_client_only(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(path):
        with monkeypatch.context() as patch:
            patch.setattr(control, "get_exit_code", lambda error: 1 // 0)
            with pytest.raises(Offline):
                await ask(path, "name", {})
        assert "could not be served" in caplog.text
        assert await ask(path, "count", {"to": 1})


@pytest.mark.parametrize("said", [b"", b"x" * 64, b"short", b'{"method": "count", "params": {"to": 1}}\n' * 2])
async def test_over_tcp_nobody_asks_without_the_secret(
    tmp_path: Path, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "REQUEST_S", 0.05)
    path = tmp_path / "control.tcp"
    async with serving(path):
        file = json.loads(path.read_bytes())
        async with await trio.open_tcp_stream(HOST, file["port"]) as stream:
            with trio.fail_after(5):
                await stream.send_all(said)
                with contextlib.suppress(trio.BrokenResourceError):  # it hung up before all was read
                    assert await stream.receive_some() == b""
        assert len(await ask(path, "count", {"to": 1})) == 2


async def test_over_tcp_another_program_on_a_dead_nodes_port(tmp_path: Path) -> None:
    path = tmp_path / "control.tcp"
    dead = open_door(path, "tcp")

    async def hang_up(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with trio.open_nursery() as nursery:
        listening = trio.SocketListener(dead.sock)
        nursery.start_soon(trio.serve_listeners, hang_up, [listening])
        assert not await trio.to_thread.run_sync(is_anybody_there, path)
        with pytest.raises(Offline, match=r"another program|broke"), trio.fail_after(5):
            await ask(path, "count", {"to": 1})
        nursery.cancel_scope.cancel()


async def test_over_tcp_a_secret_lasts_one_start(tmp_path: Path) -> None:
    path = tmp_path / "control.tcp"
    secrets = []
    for _ in range(2):
        async with serving(path):
            secrets.append(json.loads(path.read_bytes())["client"])
        assert not path.exists()
    assert secrets[0] != secrets[1]


async def test_a_path_too_long_for_a_unix_socket_is_served_over_tcp(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * UNIX_PATH_BYTES)
    folder.mkdir()
    path = folder / "control.sock"
    node = Node()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, path, node.handle)
        assert stat.S_ISREG(path.stat().st_mode) and stat.S_IMODE(path.stat().st_mode) == 0o600
        assert len(await ask(path, "count", {"to": 1})) == 2
        nursery.cancel_scope.cancel()


async def test_over_tcp_a_node_that_is_stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "ACCEPTED_S", 0.05)
    monkeypatch.setattr(endpoint, "PROBE_S", 0.05)
    path = tmp_path / "control.tcp"
    with open_door(path, "tcp"):  # it listens, as a stopped process does, but never answers
        assert is_anybody_there(path)
        with pytest.raises(Offline, match="has not answered"), trio.fail_after(5):
            await ask(path, "count", {"to": 1})


@pytest.mark.parametrize("content", [b"", b"{}", b'{"port": 0, "client": "a", "node": "b"}', b'{"port": 70000'])
async def test_over_tcp_a_file_that_no_node_wrote(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "control.tcp"
    path.write_bytes(content)
    assert not is_anybody_there(path)
    with pytest.raises(Offline, match="another program"):
        await ask(path, "count", {"to": 1})
    async with serving(path):  # what was left there is replaced
        assert len(await ask(path, "count", {"to": 1})) == 2
