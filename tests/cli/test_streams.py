"""Readers that stop reading: a node goes on serving."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from daaswarm.cli.streams import Aside
from tests.e2e.processes import START_S, get_environment, run

END_S = 30


def make_full_pipe() -> tuple[int, int]:
    """``(read, write)``: whoever writes to it waits."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b" " * 4096)
    except BlockingIOError:
        os.set_blocking(write, True)
    return read, write


@pytest.mark.e2e
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_node_whose_output_nobody_reads_goes_on(stream: str, tmp_path: Path) -> None:
    read, write = make_full_pipe()
    home = ["--data-dir", str(tmp_path / "home")]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: write}
    command = [sys.executable, "-m", "daaswarm", "join", *home]
    environment = get_environment(DAASWARM_NETWORK_LIBP2P="false")  # it is ready at once, and says so
    with subprocess.Popen(command, env=environment, **pipes) as node:
        os.close(write)
        try:
            until = time.monotonic() + START_S
            while not (status := json.loads(run("status", "--json", *home).stdout)).get("running"):
                assert time.monotonic() < until and node.poll() is None
            assert status["pid"] == node.pid
            node.send_signal(signal.SIGTERM)
            assert node.wait(END_S) == 0
        finally:
            node.kill()
    os.close(read)


def test_a_reader_that_comes_back_has_it_all() -> None:
    read, write = make_full_pipe()
    aside = Aside(write)
    for number in range(100):
        aside.write(b"line %d\n" % number)
    assert not aside.wait(0.0)
    os.set_blocking(read, False)
    text = b""
    while not aside.wait(0.01):
        text += os.read(read, 1 << 20)
    os.close(write)
    text += os.read(read, 1 << 20)
    os.close(read)
    assert text.strip().decode().splitlines() == [f"line {number}" for number in range(100)]


def test_a_reader_that_went_away_is_noticed_at_once() -> None:
    read, write = os.pipe()
    aside = Aside(write)
    aside.write(b"x")
    os.close(read)
    with pytest.raises(BrokenPipeError):
        aside.write(b"x")
    os.close(write)
