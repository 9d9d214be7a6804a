"""Where a running node listens for commands, and the way in: for the user whose node it is, and nobody else.

``unix``: a Unix socket, mode 0600. ``tcp``: a port on 127.0.0.1, which any user of the machine can reach; the file then
holds the port and two secrets, and only its owner can read it. The client proves that it read the file by the first,
before anything else of it is read; the node by the second, before it is asked anything: a file that a killed node left
behind may name a port that is another program's by now.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
import stat
import sys
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import trio

from daaswarm.errors import ConfigError, RemoteProtocolError
from daaswarm.systems import claim_port, create_private

UNIX_PATH_BYTES = 103  # of a Unix socket: 104 with the closing zero on macOS, 108 on Linux
SECRET_BYTES = 32  # nobody guesses 256 bits
ADDRESS_BYTES = 1024  # of the file at most; it has about 160
BACKLOG = 16  # clients that knock in the same moment
PROBE_S = 2.0  # a local accept queue answers at once or is stuck
HOST = "127.0.0.1"

Way = Literal["unix", "tcp"]


class _Address(msgspec.Struct):
    """What the file says in the ``tcp`` way."""

    port: Annotated[int, msgspec.Meta(ge=1, le=65_535)]
    client: str  # hexadecimal, as the other
    node: str


class NobodyThere(OSError):
    """What listens at the port isn't the node that wrote the file."""

    def __init__(self) -> None:
        super().__init__("another program has its port")
        self.strerror = str(self)


def choose_way(path: Path) -> Way:
    """``unix`` where there are such sockets and the path fits into one's name."""
    if sys.platform == "win32" or len(os.fsencode(path)) > UNIX_PATH_BYTES:
        return "tcp"
    return "unix"


class Door:
    """A node's end. Use it as a context manager; the file is there as long."""

    def __init__(self, path: Path, sock: socket.socket, address: _Address | None) -> None:
        self._path = path
        self.sock = trio.socket.from_stdlib_socket(sock)
        self._address = address

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.sock.close()
        with contextlib.suppress(OSError):  # what stays is stale, and the next node's to remove
            self._path.unlink()

    async def greet(self, stream: trio.SocketStream) -> None:
        """Let a client in, or not; nothing behind its proof has been read.

        Raises:
            RemoteProtocolError: it doesn't know the secret.
            EOFError, trio.BrokenResourceError: it went away.
        """
        if self._address is None:
            return
        said = await _receive(stream, len(self._address.client))
        if not hmac.compare_digest(said, self._address.client.encode()):
            raise RemoteProtocolError("a client that doesn't know the secret")
        await stream.send_all(self._address.node.encode())


def open_door(path: Path, way: Way) -> Door:
    """Listen. The caller holds the data directory's lock, so a file that is there is stale.

    Raises:
        ConfigError: it can't be done there.
    """
    try:
        path.unlink(missing_ok=True)
        if way == "unix":
            return Door(path, _listen_unix(path), None)
        sock, address = _listen_tcp(path)
        return Door(path, sock, address)
    except OSError as error:
        raise ConfigError(
            f"control socket {path}: {error.strerror or error}", hint="choose another --data-dir"
        ) from error


def _listen_unix(path: Path) -> socket.socket:
    assert sys.platform != "win32"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)  # of the whole process: nothing may run between this and the next line but one
        try:
            sock.bind(os.fspath(path))
        finally:
            os.umask(before)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _listen_tcp(path: Path) -> tuple[socket.socket, _Address]:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        claim_port(sock)
        sock.bind((HOST, 0))
        sock.listen(BACKLOG)
        address = _Address(sock.getsockname()[1], secrets.token_hex(SECRET_BYTES), secrets.token_hex(SECRET_BYTES))
        with os.fdopen(create_private(path), "wb") as file:
            file.write(msgspec.json.encode(address))
    except OSError:
        sock.close()
        raise
    return sock, address


def _read_address(path: Path) -> _Address | None:
    """How to reach the node; ``None`` for a Unix socket.

    Raises:
        OSError: no node has been there, or what is there says nothing.
    """
    if stat.S_ISSOCK(path.stat().st_mode):
        return None
    with path.open("rb") as file:
        content = file.read(ADDRESS_BYTES)
    try:
        return msgspec.json.decode(content, type=_Address)
    except (msgspec.MsgspecError, ValueError):
        raise NobodyThere from None


async def connect(path: Path) -> trio.SocketStream:
    """A client's end, once each knows the other.

    Raises:
        OSError: no node listens there.
    """
    address = _read_address(path)
    if address is None:
        return await trio.open_unix_socket(os.fspath(path))
    sock = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        await sock.connect((HOST, address.port))
        stream = trio.SocketStream(sock)
        try:
            await stream.send_all(address.client.encode())
            said = await _receive(stream, len(address.node))
        except (EOFError, trio.BrokenResourceError):
            raise NobodyThere from None
        if not hmac.compare_digest(said, address.node.encode()):
            raise NobodyThere
    except BaseException:
        sock.close()
        raise
    return stream


async def _receive(stream: trio.SocketStream, count: int) -> bytes:
    """Exactly ``count`` bytes.

    Raises:
        EOFError: it ended before.
    """
    said = b""
    while len(said) < count:
        data = await stream.receive_some(count - len(said))
        if not data:
            raise EOFError("ended before its proof")
        said += data
    return said


def is_anybody_there(path: Path) -> bool:
    """Whether a node listens; also one that is stopped or stuck. Blocks for :data:`PROBE_S` at most twice."""
    try:
        address = _read_address(path)
        if address is None:
            assert sys.platform != "win32"
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(PROBE_S)
                probe.connect(os.fspath(path))
                return True
        with socket.create_connection((HOST, address.port), timeout=PROBE_S) as probe:
            return _is_node(probe, address)
    except OSError:
        return False


def _is_node(probe: socket.socket, address: _Address) -> bool:
    probe.sendall(address.client.encode())
    try:
        with probe.makefile("rb") as stream:
            said = stream.read(len(address.node))
    except TimeoutError:  # who has the port says nothing: the node, and it is stuck
        return True
    return hmac.compare_digest(said, address.node.encode())
