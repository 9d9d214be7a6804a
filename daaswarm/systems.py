"""What operating systems do differently, in one place: locks, private files, flushing to the disk, ports, reading.

The branches of Windows and macOS were never run, only checked for types: docs/reference/systems.md.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

if sys.platform == "win32":
    import ctypes
    import msvcrt
    from ctypes import wintypes
else:
    import fcntl

LOCK_AT = 1 << 30  # Windows locks bytes, and nobody can read those: one far behind what any locked file holds
OWNER_ONLY = "D:P(A;;FA;;;OW)"  # Windows' mode 0600: nothing inherited, all rights to the owner


def expand_user(path: str | os.PathLike[str]) -> Path:
    """``~`` and ``~name`` as shells read them: as they are where there is no such user, for which pathlib raises."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def try_lock(file: int) -> bool:
    """Lock an open file for this process; False if somebody holds the lock. It ends with :func:`unlock`, with the
    file's closing, or with the process."""
    try:
        if sys.platform == "win32":
            os.lseek(file, LOCK_AT, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            os.lseek(file, 0, os.SEEK_SET)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def unlock(file: int) -> None:
    """Now: Windows takes its time to release what is closed locked."""
    with contextlib.suppress(OSError):
        if sys.platform == "win32":
            os.lseek(file, LOCK_AT, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_UNLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_UN)


def create_private(path: Path) -> int:
    """A new file that only its owner may read, from its first moment on: the descriptor to write it with.

    Raises:
        OSError: it can't be made, or is there already.
    """
    if sys.platform == "win32":
        return _create_private_on_windows(path)
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)


if sys.platform == "win32":

    class _SecurityAttributes(ctypes.Structure):  # SECURITY_ATTRIBUTES
        _fields_ = [
            ("nLength", wintypes.DWORD),
            ("lpSecurityDescriptor", wintypes.LPVOID),
            ("bInheritHandle", wintypes.BOOL),
        ]

    def _create_private_on_windows(path: Path) -> int:
        """``os.open`` knows modes, but Windows ignores them: access is what the security descriptor says."""
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        security = ctypes.WinDLL("advapi32", use_last_error=True)
        convert = security.ConvertStringSecurityDescriptorToSecurityDescriptorW
        convert.argtypes = [wintypes.LPCWSTR, wintypes.DWORD, ctypes.POINTER(wintypes.LPVOID), wintypes.LPVOID]
        convert.restype = wintypes.BOOL
        create = kernel.CreateFileW
        create.argtypes = [
            *(wintypes.LPCWSTR, wintypes.DWORD, wintypes.DWORD, ctypes.POINTER(_SecurityAttributes)),
            *(wintypes.DWORD, wintypes.DWORD, wintypes.HANDLE),
        ]
        create.restype = wintypes.HANDLE
        free = kernel.LocalFree
        free.argtypes, free.restype = [wintypes.HLOCAL], wintypes.HLOCAL
        generic_write, share_read, create_new, normal, revision = 0x4000_0000, 1, 1, 0x80, 1
        descriptor = wintypes.LPVOID()
        if not convert(OWNER_ONLY, revision, ctypes.byref(descriptor), None):
            raise ctypes.WinError(ctypes.get_last_error())
        try:
            attributes = _SecurityAttributes(ctypes.sizeof(_SecurityAttributes), descriptor, False)
            handle = create(
                os.fspath(path), generic_write, share_read, ctypes.byref(attributes), create_new, normal, None
            )
            if handle == wintypes.HANDLE(-1).value:
                raise ctypes.WinError(ctypes.get_last_error())
        finally:
            free(descriptor)
        return msvcrt.open_osfhandle(handle, os.O_WRONLY | os.O_NOINHERIT | os.O_BINARY)


def sync(file: int) -> None:
    """What was written to the file survives a power cut.

    Raises:
        OSError: the disk is full or fails.
    """
    if sys.platform == "darwin":  # there fsync() leaves it in the drive's own cache
        with contextlib.suppress(OSError):  # network drives don't know it
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return
    os.fsync(file)


def claim_port(sock: socket.socket) -> None:
    """Before ``bind``: let the port of a process that just ended be taken, that of one which runs not."""
    if sys.platform == "win32":  # where SO_REUSEADDR would take it from who listens
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
    else:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def wait_any_readable(files: Sequence[int], timeout_s: float) -> list[int]:
    """Block this thread until one of the sockets (by number) can be read, or for that long; those that can."""
    if sys.platform == "win32":
        return select.select(files, [], [], timeout_s)[0]
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    return [file for file, _ in poll.poll(timeout_s * 1000)]


def wait_readable(sock: socket.socket, timeout_s: float) -> None:
    """Block this thread until the socket can be read, or for that long."""
    if sys.platform == "win32":
        select.select([sock], [], [], timeout_s)
    else:  # select() refuses descriptors from 1,024 on
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        poll.poll(timeout_s * 1000)
