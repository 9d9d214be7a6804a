"""Commands that have a result, and are told to stop before they have it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import trio

from daaswarm.cli import expert, network, plan
from daaswarm.cli.app import run
from daaswarm.sim import running

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def end(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, Any, str]:
    code = run(arguments)
    out, err = capfd.readouterr()
    return code, json.loads(out.splitlines()[-1]) if "--json" in arguments else out, err


def check(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert end(arguments, capfd) == (130, "", "interrupted\n")
    code, last, err = end([*arguments, "--json"], capfd)
    assert (code, last["error"]["code"], err) == (130, "interrupted", "")


@pytest.fixture
def told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A node runs and is asked; it is silent, and the command is told to stop while it waits."""

    async def attach(*arguments: Any) -> dict[str, Any]:
        os.kill(os.getpid(), request.param)
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setenv("DAASWARM_HOME", str(tmp_path))
    for module in (expert, network, plan):
        monkeypatch.setattr(module, "attach", attach)
        monkeypatch.setattr(module, "is_node_running", lambda folder: True)


@pytest.mark.parametrize("told", SIGNALS, indirect=True)
@pytest.mark.parametrize(
    "arguments",
    [
        ["network", "diagnose"],
        ["plan", "MODEL"],
        ["expert", "list"],
        ["expert", "list", "--available"],
        ["expert", "remove", "0" * 64, "--layers", "0"],
        ["expert", "verify", "MODEL"],
        ["model", "pull", "0" * 64],
    ],
)
def test_of_a_running_node(told: None, arguments: list[str], moe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check([str(moe) if word == "MODEL" else word for word in arguments], capfd)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_simulation(number: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def run_simulation(wanted: Any, note: Any) -> Any:
        os.kill(os.getpid(), number)
        while True:
            note(0, 1)

    monkeypatch.setattr(running, "run_simulation", run_simulation)
    check(["bench", "sim", "--no-growth"], capfd)
