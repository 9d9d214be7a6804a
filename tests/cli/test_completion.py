"""Tab in real shells: what they complete with the scripts that ``daaswarm completion`` gives them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from daaswarm.cli.app import run
from daaswarm.cli.complete import complete_dtypes
from daaswarm.cli.completion import SHELLS, VARIABLE
from daaswarm.models.sources import DEFAULT_MODEL
from daaswarm.store.data_dir import DataDir
from daaswarm.store.database import Database
from daaswarm.store.records import PeerRecord
from daaswarm.types import PeerId

PEER = "12D3KooWH3uVF6wv47WnArKHk5p6cvgCJEb74UTmxztmQDc298L3"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with ``daaswarm`` on its path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DAASWARM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DAASWARM_CACHE", str(tmp_path / "cache"))
    program = tmp_path / "bin" / "daaswarm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m daaswarm "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return tmp_path


def need(shell: str) -> str:
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"{shell} is not installed")
    return found


def get_script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert run(["completion", "show", shell]) == 0
    return capsys.readouterr().out


ASKED = [
    ("daaswarm conf", {"config"}),
    ("daaswarm config get network.li", {"network.listen", "network.libp2p"}),
    ("daaswarm infer hello --model smol", {DEFAULT_MODEL}),
    ("daaswarm host-expert x --dty", {"--dtype"}),
    ("daaswarm host-expert x --dtype b", {"bf16"}),
    ("daaswarm completion install z", {"zsh"}),
]


@pytest.mark.parametrize(("typed", "offered"), ASKED, ids=[typed for typed, _ in ASKED])
def test_bash(capsys: pytest.CaptureFixture[str], typed: str, offered: set[str]) -> None:
    words = " ".join(f"'{word}'" for word in typed.split(" "))
    ask = (
        f'COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _daaswarm_completion daaswarm; printf "%s\\n"'
    )
    ask = f'{get_script("bash", capsys)}\n{ask} "${{COMPREPLY[@]}}"'
    done = subprocess.run([need("bash"), "-c", ask], capture_output=True, text=True)
    assert (set(done.stdout.split()), done.stderr) == (offered, "")


@pytest.mark.parametrize(("typed", "offered"), ASKED[:3], ids=[typed for typed, _ in ASKED[:3]])
def test_zsh(capsys: pytest.CaptureFixture[str], typed: str, offered: set[str]) -> None:
    """The script's function with what zsh would give it; ``_describe`` and ``compadd`` show what they are told."""
    shown = "compdef() { }\n_arguments() { printf '%s\\n' \"$@\" }\n" + get_script("zsh", capsys)
    ask = f"{shown}\nwords=({typed}); CURRENT=${{#words}}; _daaswarm_completion"
    done = subprocess.run([need("zsh"), "-f", "-c", ask], capture_output=True, text=True)
    assert all(word in done.stdout for word in offered) and done.stderr == "", done


@pytest.mark.parametrize(("typed", "offered"), ASKED[:3], ids=[typed for typed, _ in ASKED[:3]])
def test_fish(capsys: pytest.CaptureFixture[str], typed: str, offered: set[str]) -> None:
    ask = f"{get_script('fish', capsys)}\ncomplete -C '{typed}'"
    done = subprocess.run([need("fish"), "--no-config", "-c", ask], capture_output=True, text=True)
    assert {line.split("\t")[0] for line in done.stdout.splitlines()} == offered and done.stderr == "", done


@pytest.mark.parametrize("shell", SHELLS)
def test_install(home: Path, capsys: pytest.CaptureFixture[str], shell: str) -> None:
    assert run(["completion", "install", shell, "--json"]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    files = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    assert Path(said["path"]) in files and VARIABLE in Path(said["path"]).read_text()
    assert run(["completion", "install", shell]) == 0
    changed = {path for path, content in files.items() if path.read_bytes().strip() != content.strip()}
    assert changed == set() and said["path"] in capsys.readouterr().out


def test_install_where_nothing_can_be_written(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("HOME", str(home / "file"))
    assert run(["completion", "install", "bash"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "can't be written" in err


def ask(typed: str) -> tuple[list[str], set[str]]:
    """What the program answers bash, and what it imports for it."""
    code = "import sys, atexit, json\natexit.register(lambda: sys.stderr.write(json.dumps(sorted(sys.modules))))\n"
    code += "from daaswarm.cli.app import run\nsys.exit(run([]))"
    words = typed.split(" ")
    asking = {**os.environ, VARIABLE: "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=asking)
    return done.stdout.split(), set(json.loads(done.stderr))


def test_peers_and_layers_come_from_the_disk_and_nothing_heavy_is_imported(home: Path, moe: Path) -> None:
    DataDir(home / "home").load_key()
    database = Database.open(DataDir(home / "home").database_path)
    database.save([PeerRecord(peer_id=PeerId(PEER), addrs=[], first_seen=1.0, last_seen=2.0)], [], [], 3.0)
    database.close()
    from daaswarm.models.sources import find_model

    find_model(str(moe), home / "cache")
    offered, imported = ask(f"daaswarm host-expert {moe} --layers ")
    assert set(offered) == {"0-2", "0-0", "1-2"}
    assert not imported & {"torch", "transformers", "libp2p", "numpy", "prompt_toolkit", "safetensors"}
    (home / "home" / "node.db").write_bytes(b"garbage" * 1000)
    assert ask("daaswarm config get host.mem")[0] == ["host.memory"]


def test_dtypes() -> None:
    assert complete_dtypes("") == ["f32", "bf16", "f16"]
