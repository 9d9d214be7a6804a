"""How commands end: signals at every moment, readers that go away, disks that are full."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from daaswarm.models.sources import find_model
from tests.e2e.processes import get_environment, run, run_json, running

pytestmark = pytest.mark.e2e

END_S = 30
DAASWARM = [sys.executable, "-m", "daaswarm"]


@pytest.fixture(autouse=True)
def own_cache(cache: Path, moe: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DAASWARM_CACHE", str(cache))
    find_model(str(moe), cache)
    return str(moe)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder of the commands, with a name as short as usual; nothing may be left in it."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)
        assert [path.name for path in Path(folder).iterdir() if path.name.startswith("daaswarm")] == []


def get_ended(children: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(children, timeout=10)[1]


# -- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signals", [[signal.SIGINT] * 2, [signal.SIGINT] * 4, [signal.SIGHUP], [signal.SIGTERM]])
def test_an_answer_with_hosts_of_its_own_is_interrupted(
    moe: Path, tmp_path: Path, temporary: Path, signals: list[int]
) -> None:
    options = ["--model", str(moe), "--max-tokens", "200", "--embedded", "2", "--data-dir", str(tmp_path / "home")]
    with running("infer", "Hello", *options) as asking:
        asking.wait_for("embedded")
        children = psutil.Process(asking.process.pid).children(recursive=True)
        assert children
        for number in signals:
            asking.process.send_signal(number)
        code, last = asking.wait(END_S)
        assert (code, last["error"]["code"]) == (130, "interrupted")
        assert get_ended(children)
    assert not [line for line in asking.errors if "Traceback" in line]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_node_that_is_told_to_leave(tmp_path: Path, number: int) -> None:
    with running("join", "--data-dir", str(tmp_path)) as joined:
        joined.wait_for("ready")
        assert joined.stop(number) == 0
    assert not (tmp_path / "control.sock").exists() and joined.errors == []


def test_nohup_is_respected(tmp_path: Path) -> None:
    code = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", code, *DAASWARM, "join", "--json", "--data-dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=get_environment()) as process:
        assert process.stdout is not None
        assert '"ready"' in process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        assert run_json("status", "--data-dir", str(tmp_path))["running"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(END_S) == 0


def test_ctrl_c_while_the_program_is_imported(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\ntime.sleep(9)\n"
    )
    done = run("status", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


STUCK = """
import sys, time, trio
from daaswarm.cli.run import run_async
from daaswarm.config import Config

async def command():
    print("started", flush=True)
    await trio.to_thread.run_sync(time.sleep, 60)  # nothing interrupts it

sys.exit(run_async(command, Config(), told=7, give_up=lambda: print("given up", flush=True)))
"""


@pytest.mark.parametrize(("numbers", "code"), [([signal.SIGINT] * 2, 130), ([signal.SIGTERM, signal.SIGHUP], 7)])
def test_a_second_signal_ends_what_does_not_end_by_itself(numbers: list[int], code: int) -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        for number in numbers:
            process.send_signal(number)
        assert process.wait(END_S) == code
        assert process.stdout.read() == "given up\n"


def test_after_a_clean_leave_nobody_is_sent_to_the_host(moe: Path, tmp_path: Path) -> None:
    with running("join", "--data-dir", str(tmp_path / "join")) as joined:
        bootstrap = ["--bootstrap", joined.wait_for("ready")["addrs"][0]]
        with running("host-expert", str(moe), *bootstrap, "--data-dir", str(tmp_path / "host")) as host:
            peer_id = host.wait_for("ready")["peer_id"]
            ask = ["infer", "Hello", "--model", str(moe), "--max-tokens", "2"]
            assert run_json(*ask, "--data-dir", str(tmp_path / "join"))["hosts"][0]["peer_id"] == peer_id
            assert host.stop(signal.SIGINT) == 130
        for options in (["--data-dir", str(tmp_path / "join")], [*bootstrap, "--data-dir", str(tmp_path / "ask")]):
            done = run(*ask, *options, DAASWARM_LOG_LEVEL="info")
            assert done.returncode == 3 and "no host found" in done.stderr
            assert peer_id not in done.stderr
        joined.stop()
    assert not [line for line in joined.errors if peer_id in line and "can't be asked" in line]


# -- output -------------------------------------------------------------------------------------------------------


def run_into(path: str, *arguments: str) -> tuple[int, str]:
    with Path(path).open("w") as file:
        done = subprocess.run(
            [*DAASWARM, *arguments], stdout=file, stderr=subprocess.PIPE, text=True, env=get_environment(), timeout=180
        )
    return done.returncode, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [["status"], ["status", "--json"], ["--help"], ["--version"], ["init"], ["config", "get"], ["join"],
     ["join", "--json"], ["status", "--data-dir", "/nowhere", "--json"]],
    ids=" ".join,
)  # fmt: skip
def test_a_full_disk(tmp_path: Path, arguments: list[str]) -> None:
    takes_folder = not arguments[0].startswith("-") and "--data-dir" not in arguments
    options = ["--data-dir", str(tmp_path)] if takes_folder else []
    code, err = run_into("/dev/full", *arguments, *options)
    lines = [line for line in err.splitlines() if line.startswith(("error", "Traceback"))]
    assert code == 1 and lines == ["error: can't write to standard output: No space left on device"], err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_in_mid_answer(moe: Path, tmp_path: Path, temporary: Path) -> None:
    ask = ["infer", "Hello", "--model", str(moe), "--max-tokens", "4", "--embedded", "1", "--data-dir", str(tmp_path)]
    for options in ([], ["--json"]):
        code, err = run_into("/dev/full", *ask, *options)
        assert code == 1 and err.splitlines()[-1] == "error: can't write to standard output: No space left on device"
        assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["--help"], ["config", "get"], ["join", "--json"], ["join"]], ids=" ".join)
def test_a_reader_that_went_away(tmp_path: Path, arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    options = [] if arguments == ["--help"] else ["--data-dir", str(tmp_path)]
    done = subprocess.run(
        [*DAASWARM, *arguments, *options], stdout=writing, stderr=subprocess.PIPE, text=True, env=get_environment(),
        timeout=60,
    )  # fmt: skip
    os.close(writing)
    assert done.returncode == 141
    assert "error" not in done.stderr and "Traceback" not in done.stderr


def test_messages_that_nobody_reads_cost_nothing(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*DAASWARM, "init", "--data-dir", str(tmp_path)], stdout=subprocess.PIPE, stderr=writing, env=get_environment()
    )
    os.close(writing)
    assert done.returncode == 0 and b"12D3Koo" in done.stdout


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_stream_that_is_closed(tmp_path: Path, number: int) -> None:
    done = subprocess.run(
        ["bash", "-c", f'exec "$@" {number}>&-', "bash", *DAASWARM, "status", "--json", "--data-dir", str(tmp_path)],
        capture_output=True,
        env=get_environment(),
    )
    assert done.returncode == 0 and done.stderr == b""
    assert number == 1 or json.loads(done.stdout)["running"] is False


STALLED = """
import os, subprocess, sys, trio
from daaswarm.inference.embedded import SAID_PIECES, _drain, _show

async def main():
    command = ["head", "-c", "4000000", "/dev/zero"]  # more than all buffers on the way
    process = await trio.lowlevel.open_process(["sh", "-c", " ".join(command) + " >&2"], stderr=subprocess.PIPE)
    said, to_show = trio.open_memory_channel(SAID_PIECES)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_show, to_show)
        await _drain(process, said)
        os.write(1, b"drained")
        os._exit(await process.wait())

trio.run(main)
"""


def test_a_reader_of_messages_that_stands_still_does_not_stop_the_node() -> None:
    reading, writing = os.pipe()  # nobody ever reads
    done = subprocess.run([sys.executable, "-c", STALLED], stdout=subprocess.PIPE, stderr=writing, timeout=60)
    os.close(reading)
    os.close(writing)
    assert (done.returncode, done.stdout) == (0, b"drained")
