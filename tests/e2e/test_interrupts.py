"""Ctrl-C at a terminal, in every phase of the commands that take a while: the prompt is back, and nothing is left.

The terminal is a real one, so Ctrl-C is a signal to all processes in the foreground, as it is for a person. How long it
took is printed (``pytest -rP``), not asserted: only that it ends.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from daaswarm.models.sources import find_model
from tests.e2e.processes import Running, running
from tests.e2e.terminal import CTRL_C, Terminal

pytestmark = pytest.mark.e2e

END_S = 20  # a machine with other things to do; the figure to look at is what is printed
MARK = "MARKED_BY_TEST"  # in the environment of all processes of one command


@pytest.fixture(scope="module")
def served(cache: Path, moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Running]]:
    """The tiny model on one host; (bootstrap address, host)."""
    find_model(str(moe), cache)
    folder = tmp_path_factory.mktemp("served")
    with running("host-expert", str(moe), "--data-dir", str(folder), DAASWARM_CACHE=str(cache)) as host:
        yield host.wait_for("ready")["addrs"][0], host


@pytest.fixture
def start(cache: Path, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Start a command in a terminal; afterwards, no process and no temporary folder of it may be left."""
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    opened: list[Terminal] = []
    with tempfile.TemporaryDirectory() as temporary:

        def start(*arguments: str) -> Terminal:
            extra = {MARK: mark, "TMPDIR": temporary, "DAASWARM_CACHE": str(cache)}
            opened.append(Terminal(*arguments, "--data-dir", str(tmp_path / "home"), **extra))
            return opened[-1]

        try:
            yield start
            assert [process.cmdline() for process in find_marked(mark)] == []
            assert [path.name for path in Path(temporary).iterdir() if path.name.startswith("daaswarm")] == []
        finally:
            for one in opened:
                one.close()
            for process in find_marked(mark):
                process.kill()


def find_marked(mark: str) -> list[psutil.Process]:
    """What still runs of a command, whoever its parent is now."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def interrupt(command: Terminal, phase: str) -> None:
    """Press Ctrl-C; the prompt has to come back with 130, and the cursor with it."""
    assert command.process.poll() is None, command.text[-2000:]
    before = time.monotonic()
    command.type(CTRL_C)
    code = command.wait(END_S)
    print(f"Ctrl-C during {phase}: {time.monotonic() - before:.2f} s")
    assert code == 130 and "Traceback" not in command.text, command.text[-3000:]
    assert command.raw.count(b"\x1b[?25l") <= command.raw.count(b"\x1b[?25h"), "the cursor stays hidden"


def test_while_the_program_starts(start: Callable[..., Terminal], moe: Path) -> None:
    command = start("infer", "Hi", "--model", str(moe))
    command.read(0.05)
    interrupt(command, "start of the program")


def test_while_hosts_start(start: Callable[..., Terminal], moe: Path) -> None:
    command = start("infer", "Hi", "--model", str(moe), "--embedded", "2")
    command.wait_for("starting 2 hosts")
    interrupt(command, "start of embedded hosts")


def test_while_libraries_are_loaded(start: Callable[..., Terminal], served: tuple[str, Running], moe: Path) -> None:
    command = start("infer", "Hi", "--model", str(moe), "--bootstrap", served[0])
    command.wait_for("waiting for the answer")
    command.read(0.5)
    interrupt(command, "load")


@pytest.fixture
def stop_host(served: tuple[str, Running]) -> Iterator[Callable[[], None]]:
    """Have the host stand still, so that whoever asks it waits."""
    process = served[1].process
    yield lambda: process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGCONT)


def ask_long(start: Callable[..., Terminal], address: str, moe: Path) -> Terminal:
    return start("infer", "Hi", "--model", str(moe), "--bootstrap", address, "--max-tokens", "400")


def test_while_the_answer_is_written(start: Callable[..., Terminal], served: tuple[str, Running], moe: Path) -> None:
    command = ask_long(start, served[0], moe)
    command.wait_for("~")  # a word of the tiny model
    interrupt(command, "decode")


def test_while_a_host_is_waited_for(
    start: Callable[..., Terminal], served: tuple[str, Running], moe: Path, stop_host: Callable[[], None]
) -> None:
    command = ask_long(start, served[0], moe)
    command.wait_for("~")
    stop_host()
    command.read(0.3)
    interrupt(command, "decode, the host stopped")


def test_join(start: Callable[..., Terminal]) -> None:
    command = start("join")
    command.wait_for("ready: ")
    interrupt(command, "join")


def test_hosting(start: Callable[..., Terminal], served: tuple[str, Running], moe: Path) -> None:
    command = start("host-expert", str(moe), "--bootstrap", served[0])
    command.wait_for("ready: ")
    interrupt(command, "hosting")
