"""Every command x (good input, each kind of bad input): exit code, one line that says what, one that says what next.

The commands are read from the program, so that a new one is in this table by itself. Bad input is given twice, plain
and with ``--json``: both must refuse it in the same words, the second as JSON lines and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from daaswarm.cli.app import app, run
from daaswarm.cli.completion import SHELLS
from daaswarm.store.data_dir import DataDir
from tests.e2e.processes import running

SOMEONE = "12D3KooWH3uVF6wv47WnArKHk5p6cvgCJEb74UTmxztmQDc298L3"
ADDRESS = f"/ip4/127.0.0.1/tcp/1/p2p/{SOMEONE}"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory, a cache and a home that are not the user's; the current folder is an empty one."""
    for name in list(os.environ):
        if name.startswith("DAASWARM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DAASWARM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DAASWARM_CACHE", str(cache))
    monkeypatch.setenv("DAASWARM_NETWORK_LIBP2P", "false")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


class Said(NamedTuple):
    message: str
    hint: str
    code: str


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run a command line, plain and with --json; what it said."""

    def refuse(command: list[str], rest: list[str], code: int) -> Said:
        capfd.readouterr()
        assert run([*command, *rest]) == code, capfd.readouterr()
        out, err = capfd.readouterr()
        assert out == "" and "Traceback" not in err, (out, err)
        lines = err.splitlines()
        assert [line.partition(": ")[0] for line in lines] == ["error", "hint"], err
        assert run([*command, "--json", *rest]) == code
        out, err = capfd.readouterr()
        assert err == "", err
        error = [json.loads(line) for line in out.splitlines()][-1]["error"]
        assert error["message"] == lines[0].removeprefix("error: ")
        assert error["hint"] == lines[1].removeprefix("hint: ") != ""
        return Said(error["message"], error["hint"], error["code"])

    return refuse


# -- what is wrong with any command -------------------------------------------------------------------------------


class Command(NamedTuple):
    words: list[str]
    parsed: Any

    @property
    def arguments(self) -> list[Any]:
        return [param for param in self.parsed.params if param.param_type_name == "argument"]

    def fill(self) -> list[str]:
        """Something for each argument that it needs."""
        return ["x" for argument in self.arguments if argument.required]


def collect(group: Any, words: list[str]) -> list[Command]:
    found: list[Command] = []
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found += collect(command, [*words, name])
        elif not command.hidden:
            found.append(Command([*words, name], command))
    return found


COMMANDS = collect(typer.main.get_command(app), [])
GROUPS = sorted({tuple(command.words[:-1]) for command in COMMANDS})
# These need no settings, are there to mend them, or ask a node that has read them.
WITHOUT_SETTINGS = {
    "completion show", "completion install", "config path", "logs", "reset", "bench expert", "peers list",
    "peers forgive",
    "expert deploy", "expert remove", "model list", "model remove", "bench dht", "bench sim",
    "bench moe", "bench load", "bench net", "bench byzantine",
    "swarm create", "swarm add", "swarm remove",
}  # fmt: skip
WITHOUT_FOLDER = {
    "completion show", "completion install", "bench expert", "bench parity", "bench dht", "bench sim", "bench moe",
    "bench load", "bench generate", "bench net", "bench byzantine",
}  # fmt: skip


def for_each(wanted: Callable[[Command], bool]) -> Any:
    """The test once for each such command."""
    chosen = [command for command in COMMANDS if wanted(command)]
    return pytest.mark.parametrize("command", chosen, ids=[" ".join(command.words) for command in chosen])


every_command = for_each(lambda command: True)
with_settings = for_each(lambda command: " ".join(command.words) not in WITHOUT_SETTINGS)


@every_command
def test_help_has_an_example(command: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*command.words, "--help"]) == 0
    out, err = capfd.readouterr()
    assert "Example:" in out and f"daaswarm {' '.join(command.words)}" in out and "--json" in out and err == ""


@every_command
def test_an_unknown_option(command: Command, refused: Callable[..., Said]) -> None:
    said = refused(command.words, [*command.fill(), "--bogus"], 2)
    assert "--bogus" in said.message and said.hint == f"see daaswarm {' '.join(command.words)} --help"


@for_each(lambda command: all(argument.nargs != -1 for argument in command.arguments))
def test_an_argument_too_many(command: Command, refused: Callable[..., Said]) -> None:
    said = refused(command.words, ["x"] * len(command.arguments) + ["surplus"], 2)
    assert "surplus" in said.message or "extra argument" in said.message


@for_each(lambda command: bool(command.fill()))
def test_an_argument_too_few(command: Command, refused: Callable[..., Said]) -> None:
    said = refused(command.words, command.fill()[:-1], 2)
    assert "Missing argument" in said.message or "is missing" in said.message


@every_command
def test_an_option_without_its_value(command: Command, refused: Callable[..., Said]) -> None:
    assert "--data-dir" in refused(command.words, [*command.fill(), "--data-dir"], 2).message


@with_settings
def test_settings_that_are_wrong(command: Command, refused: Callable[..., Said], home: Path) -> None:
    home.mkdir()
    (home / "config.toml").write_text("[network]\nlistn = 1\n")
    said = refused(command.words, make_valid(command), 2)
    assert str(home / "config.toml") in said.message and said.hint == "did you mean network.listen?"


@with_settings
def test_settings_that_are_no_settings(command: Command, refused: Callable[..., Said], home: Path) -> None:
    home.mkdir()
    (home / "config.toml").write_bytes(b"\xff\x00 = [")
    assert "is not TOML" in refused(command.words, make_valid(command), 2).message


@for_each(lambda command: " ".join(command.words) not in {*WITHOUT_SETTINGS, "config set"})
def test_a_bad_value_in_the_environment(
    command: Command, refused: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAASWARM_HOST_THREADS", "several")
    assert "DAASWARM_HOST_THREADS" in refused(command.words, make_valid(command), 2).message


@for_each(lambda command: " ".join(command.words) not in WITHOUT_FOLDER)
def test_a_data_directory_that_is_a_file(command: Command, refused: Callable[..., Said], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    said = refused(command.words, [*make_valid(command), "--data-dir", str(tmp_path / "file")], 2)
    assert str(tmp_path / "file") in said.message
    assert (tmp_path / "file").read_text() == "mine"


def make_valid(command: Command) -> list[str]:
    """Arguments that are right, so that what is wrong is something else."""
    return {
        "config get": ["infer.model"],
        "config set": ["infer.max_tokens", "3"],
        "swarm allow": [SOMEONE],
        "swarm disallow": [SOMEONE],
    }.get(" ".join(command.words), command.fill())


@pytest.mark.parametrize("group", GROUPS, ids=" ".join)
def test_an_unknown_command(group: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    for rest in (["frobnicate"], ["frobnicate", "--json"]):
        assert run([*group, *rest]) == 2
        out, err = capfd.readouterr()
        said = json.loads(out)["error"]["message"] if "--json" in rest else err
        assert "frobnicate" in said and "Traceback" not in err


@pytest.mark.parametrize("group", GROUPS, ids=" ".join)
def test_no_command(group: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    """Help, and a code that says that nothing was done."""
    assert run(list(group)) == 2
    out, err = capfd.readouterr()
    assert "Usage: daaswarm" in out + err and "Traceback" not in err


# -- what is wrong with one command -------------------------------------------------------------------------------

# Command, the rest, exit code, what the message says, what the hint says. MOE is a tiny model.
BAD: list[tuple[list[str], list[str], int, str, str]] = [
    (["infer"], [], 2, "the prompt is missing", "daaswarm infer"),
    (["infer"], [""], 2, "the prompt is empty", "daaswarm infer"),
    (["infer"], ["\udcff"], 2, "not UTF-8", "iconv"),
    (["infer"], ["Hi", "--model", "gpt-17"], 2, "gpt-17", ""),
    (["infer"], ["Hi", "--max-tokens", "none"], 2, "--max-tokens", "--help"),
    (["infer"], ["Hi", "--max-tokens", "0"], 2, "--max-tokens", "infer.max_tokens"),
    (["infer"], ["Hi", "--temperature", "-1"], 2, "--temperature", "infer.temperature"),
    (["infer"], ["Hi", "--temperature", "inf"], 2, "--temperature", ""),
    (["infer"], ["Hi", "--top-p", "0"], 2, "--top-p", "infer.top_p"),
    (["infer"], ["Hi", "--seed", "-1"], 2, "--seed -1", "2^63"),
    (["infer"], ["Hi", "--seed", "x"], 2, "--seed", "--help"),
    (["infer"], ["Hi", "--stop", ""], 2, "--stop is empty", "--stop"),
    (["infer"], ["Hi", "--dtype", "int4"], 2, "int4", "f32"),
    (["infer"], ["Hi", "--embedded", "0"], 2, "--embedded", "--help"),
    (["infer"], ["Hi", "--embedded", "65"], 2, "--embedded", "--help"),
    (["infer"], ["Hi", "--raw", "--system", "x"], 2, "--system", "prompt"),
    (["infer"], ["Hi", "--announce", "/ip4/192.0.2.1/tcp/1"], 2, "--announce", "both"),
    (["infer"], ["Hi", "--bootstrap", "nonsense"], 2, "--bootstrap 'nonsense'", "network.bootstrap"),
    (["infer"], ["Hi", "--bootstrap", "/ip4/127.0.0.1/tcp/1"], 2, "names no PeerId", "/p2p/"),
    (["infer"], ["Hi", "--model", "MOE", "--bootstrap", ADDRESS], 2, "Connection refused", "network diagnose"),
    (["infer"], ["Hi", "--model", "MOE", "--listen", "somewhere"], 2, "--listen 'somewhere'", "/ip4/0.0.0.0"),
    (["host-expert"], ["gpt-17"], 2, "gpt-17", ""),
    (["host-expert"], ["MOE", "--layers", "9"], 2, "not in 9", "0-2"),
    (["host-expert"], ["MOE", "--layers", "2-0"], 2, "2 is greater than 0", "0-2"),
    (["host-expert"], ["MOE", "--layers", "all"], 2, "is not a range", "--layers 0-14"),
    (["host-expert"], ["MOE", "--experts", "8"], 2, "this model has 8", "0-7"),
    (["host-expert"], ["MOE", "--slices", "0"], 2, "is split into experts", "--experts"),
    (["host-expert"], ["MOE", "--experts", "0", "--slices", "0"], 2, "exclude each other", "--slices"),
    (["host-expert"], ["MOE", "--dtype", "f64"], 2, "f64", "bf16"),
    (["host-expert"], ["MOE", "--memory", "lots"], 2, "lots", "4GB"),
    (["host-expert"], ["MOE", "--memory", "1"], 2, "not one expert fits", ""),
    (["host-expert"], ["MOE", "--listen", "/ip4/127.0.0.1/udp/1"], 2, "udp", "/ip4/0.0.0.0"),
    (["host-expert"], ["MOE", "--bootstrap", ADDRESS], 2, "Connection refused", "network diagnose"),
    (["join"], ["--listen", "somewhere"], 2, "--listen 'somewhere'", "/ip4/0.0.0.0"),
    (["join"], ["--listen", "/ip4/127.0.0.1/tcp/70000"], 2, "multiaddress: integer not in range", "network.listen"),
    (["join"], ["--listen", "/ip4/192.0.2.1/tcp/0"], 2, "cannot listen", ""),
    (["join"], ["--announce", "me", "--listen", "/ip4/127.0.0.1/tcp/0"], 2, "--announce 'me'", "others can dial"),
    (["join"], ["--bootstrap", ADDRESS], 2, "Connection refused", "network diagnose"),
    (["join"], ["--bootstrap", ""], 2, "is not", ""),
    (["status"], ["--data-dir", "no-such-folder"], 2, "no data directory no-such-folder", "daaswarm init"),
    (["logs"], ["--level", "loud"], 2, "loud", "warning"),
    (["logs"], ["--lines", "-1"], 2, "--lines", "--help"),
    (["logs"], ["--lines", "ten"], 2, "--lines", "--help"),
    (["config", "get"], ["x"], 2, "unknown key 'x'", ""),
    (["config", "get"], ["network.listn"], 2, "network.listn", "network.listen"),
    (["config", "set"], ["network.port", "1"], 2, "unknown key", ""),
    (["config", "set"], ["infer.top_p", "7"], 2, "infer.top_p", "docs/reference/config.md"),
    (["config", "set"], ["host.memory", "lots"], 2, "lots", "4GB"),
    (["config", "set"], ["network.listen", "here"], 2, "here", "/ip4/0.0.0.0"),
    (["config", "set"], ["network.bootstrap", "/ip4/127.0.0.1/tcp/1"], 2, "names no PeerId", "/p2p/"),
    (["expert", "list"], ["--model", "MOE"], 2, "--model goes with --available", "expert list"),
    (["expert", "list"], ["--tag", "code"], 2, "--tag goes with --available", "expert list"),
    (["expert", "list"], ["--available"], 2, "no node runs here", "--bootstrap"),
    (["expert", "deploy"], ["MOE"], 2, "no node runs", "daaswarm join"),
    (["expert", "deploy"], ["MOE", "--layers", "z"], 2, "is not a range", "--layers 0-14"),
    (["expert", "deploy"], ["MOE", "--dtype", "f64"], 2, "f64", "bf16"),
    (["expert", "deploy"], ["MOE", "--memory", "lots"], 2, "lots", "4GB"),
    (["expert", "remove"], ["MOE"], 2, "no node runs", "daaswarm join"),
    (["expert", "remove"], ["MOE", "--layers", "3-1"], 2, "3 is greater than 1", "1-3"),
    (["expert", "verify"], ["MOE"], 2, "no node runs here", "--bootstrap"),
    (["expert", "verify"], ["MOE", "--samples", "0"], 2, "--samples", "--help"),
    (["plan"], ["gpt-17"], 2, "gpt-17 is not a known model", "model list"),
    (["plan"], ["MOE", "--peers", "nowhere.toml"], 2, "--peers nowhere.toml", "[[peers]]"),
    (["plan"], ["MOE", "--dtype", "f64"], 2, "f64", "bf16"),
    (["plan"], ["MOE", "--memory", "lots"], 2, "lots", "4GB"),
    (["model", "info"], ["gpt-17"], 2, "no model gpt-17", "model list"),
    (["model", "info"], ["MOE", "--dtype", "f64"], 2, "f64", "bf16"),
    (["model", "info"], ["MOE", "--hosts", "0"], 2, "--hosts", "--help"),
    (["model", "info"], ["MOE", "--memory", "lots"], 2, "lots", "4GB"),
    (["model", "pull"], ["no-such-model"], 2, "no-such-model", "model list"),
    (["model", "prepare"], ["gpt-17"], 2, "gpt-17", "model list"),
    (["model", "remove"], ["gpt-17"], 2, "gpt-17 is not in the cache", "model list"),
    (["completion", "show"], ["tcsh"], 2, "'tcsh' is no shell", "bash, zsh, fish"),
    (["completion", "install"], ["tcsh"], 2, "'tcsh' is no shell", "bash, zsh, fish"),
    (["bench", "expert"], ["--expert", "magic"], 2, "magic", "nop or ffn"),
    (["bench", "expert"], ["--dim", "0"], 2, "--dim", "--help"),
    (["bench", "expert"], ["--dim", "65536", "--batch", "65536"], 2, "a call takes", "--batch"),
    (["bench", "expert"], ["--expert", "ffn", "--dim", "9000"], 2, "8192", "--dim"),
    (["bench", "load"], ["--callers", "0"], 2, "--callers", "--help"),
    (["bench", "load"], ["--plot", "no-such-folder/load.png"], 2, "no-such-folder", "exists"),
    (["bench", "moe"], ["--how", "magic"], 2, "magic", "kill or stop"),
    (["bench", "moe"], ["--k", "21"], 2, "--k 21 of --experts 20", "--k 20"),
    (["bench", "moe"], ["--replicas", "11"], 2, "--replicas 11 on --hosts 10", "--replicas 10"),
    (["bench", "moe"], ["--experts", "5"], 2, "some hosts would have none", "--hosts 8"),
    (["bench", "moe"], ["--seed", "9" * 20], 2, "--seed", "--help"),
    (["bench", "parity"], ["--dtype", "f64"], 2, "f64", "bf16"),
    (["bench", "parity"], ["--hosts", "0"], 2, "--hosts", "--help"),
    (["bench", "parity"], ["--model", "gpt-17"], 2, "gpt-17", ""),
    (["bench", "sim"], ["--nodes", "1"], 2, "--nodes", "--help"),
    (["bench", "sim"], ["--nodes", "10", "--experts", "11"], 2, "11 experts on 10", "--experts 10"),
    (["bench", "sim"], ["--hostile", "1"], 2, "--hostile", "--help"),
    (["bench", "sim"], ["--nodes", "50001"], 2, "--nodes", "--help"),
    (["bench", "sim"], ["--users", "5000001"], 2, "--users", "--help"),
    (["bench", "sim"], ["--minutes", "inf"], 2, "--minutes", "--help"),
    (["bench", "sim"], ["no-such.toml"], 2, "no-such.toml", "TOML"),
    (["join"], ["--swarm-id", "home@k3x7q2m4a5bcd2ef"], 2, "its key is not here", "swarm add"),
    (["join"], ["--swarm-key", "absent"], 2, "absent", "path"),
    (["infer"], ["Hi", "--swarm-key", ""], 2, "--swarm-key", "file"),
    (["swarm", "create"], ["main"], 2, "main", "another name"),
    (["swarm", "create"], ["a/b"], 2, "a/b", "letters"),
    (["swarm", "add"], ["absent"], 2, "absent", "path"),
    (["swarm", "show"], ["home"], 2, "home", "home@"),
    (["swarm", "show"], ["--key"], 2, "main", "swarm list"),
    (["swarm", "remove"], ["home@k3x7q2m4a5bcd2ef"], 2, "not here", "swarm list"),
    (["swarm", "allow"], ["12D3KooW"], 2, "network.allow", "12D3Koo"),
    (["swarm", "disallow"], [SOMEONE], 2, SOMEONE, "swarm show"),
    (["network", "diagnose"], ["nonsense"], 2, "nonsense", "12D3Koo"),
    (["network", "diagnose"], ["/ip4/1.2.3/tcp/1"], 2, "/ip4/1.2.3/tcp/1", "write it like"),
    (["bench", "dht"], ["--peers", "1"], 2, "--peers", "--help"),
    (["bench", "generate"], ["--verify", "always"], 2, "verify 'always' is not known", "sample"),
    (["bench", "generate"], ["--codec", "zip"], 2, "--codec 'zip' is not known", "int8"),
    (["bench", "byzantine"], ["--strategy", "nice"], 2, "--strategy 'nice' is not known", "colluding"),
    (["bench", "byzantine"], ["--verify", "off"], 2, "checks nothing", "none"),
    (["bench", "net"], ["--body", "many"], 2, "--body", ""),
    (["bench", "net"], ["--body", "9GB"], 2, "--body 9GB", "8MiB"),
    (["infer"], ["Hi", "--verify", "sample=3"], 2, "from above 0 to 1", "sample=0.1"),
    (["model", "prepare"], ["MOE", "--audit", "--dtype", "f64"], 2, "--dtype 'f64' is not known", "f32"),
    (["peers", "forgive"], ["nobody"], 2, "nothing is known of nobody", "peers list"),
    (["bench", "dht"], ["--kill", "1.5"], 2, "--kill", "--help"),
    (["bench", "dht"], ["--peers", "2", "--kill", "0.9"], 2, "at least two have to live", "--kill 0 "),
    (["bench", "dht"], ["--peers", "3", "--kill", "0.6"], 2, "at least two have to live", "--kill 0.33 "),
]  # fmt: skip


@pytest.mark.parametrize(("command", "rest", "code", "message", "hint"), BAD, ids=[" ".join(c + r) for c, r, *_ in BAD])
def test_bad_input(
    refused: Callable[..., Said], moe: Path, command: list[str], rest: list[str], code: int, message: str, hint: str
) -> None:
    said = refused(command, [str(moe) if word == "MOE" else word for word in rest], code)
    assert message in said.message and hint in said.hint


def test_every_command_that_takes_something_is_in_the_table() -> None:
    named = {" ".join(command) for command, *_ in BAD}
    taking = {" ".join(c.words) for c in COMMANDS if len(c.parsed.params) > len(("data_dir", "json", "help"))}
    assert taking - named <= {"init", "reset", "model list"}, "a command takes input, and the table has no bad one"


# -- the disk, the key, a reset without a terminal ----------------------------------------------------------------


@pytest.mark.parametrize("command", [["init"], ["join"], ["status"]], ids=" ".join)
@pytest.mark.parametrize("content", ["", "zz", "00" * 31, "\x00" * 64], ids=["empty", "no hex", "short", "zeros"])
def test_a_damaged_key(refused: Callable[..., Said], home: Path, command: list[str], content: str) -> None:
    folder = DataDir(home)
    folder.load_key()
    folder.key_path.write_text(content)
    assert str(folder.key_path) in refused(command, [], 2).message
    assert folder.key_path.read_text() == content


@pytest.mark.skipif(os.name != "posix", reason="no modes")
@pytest.mark.parametrize("command", [["init"], ["join"], ["status"]], ids=" ".join)
def test_a_key_that_others_can_read(refused: Callable[..., Said], home: Path, command: list[str]) -> None:
    DataDir(home).load_key()
    DataDir(home).key_path.chmod(0o644)
    said = refused(command, [], 2)
    assert "readable by others" in said.message and "chmod 600" in said.hint


def test_a_reset_with_nobody_to_ask(capfd: pytest.CaptureFixture[str], home: Path) -> None:
    DataDir(home).load_key()
    (home / "node.db").write_bytes(b"x")
    assert run(["reset", "--json"]) == 2
    *plan, last = capfd.readouterr().out.splitlines()
    said = json.loads(last)["error"]
    assert "no terminal" in said["message"] and "--yes" in said["hint"] and (home / "node.db").exists() and not plan


# -- good input ---------------------------------------------------------------------------------------------------

# Command line, a field of the result.
GOOD: list[tuple[list[str], str]] = [
    (["init"], "peer_id"),
    (["init", "--yes"], "created"),
    (["status"], "running"),
    (["config", "get"], "network.listen"),
    (["config", "get", "infer.model"], "infer.model"),
    (["config", "set", "infer.max_tokens", "12"], "infer.max_tokens"),
    (["config", "path"], "path"),
    (["logs"], "records"),
    (["peers", "list"], "peers"),
    (["swarm", "create", "home"], "swarm_id"),
    (["swarm", "list"], "swarms"),
    (["swarm", "show"], "private"),
    (["swarm", "allow", SOMEONE], "allow"),
    (["expert", "list"], "hosted"),
    (["model", "list"], "models"),
    (["reset", "--yes"], "removed"),
    (["reset", "--yes", "--all"], "bytes"),
    *((["completion", "show", shell], "script") for shell in SHELLS),
    *((["completion", "install", shell], "path") for shell in SHELLS),
]


@pytest.mark.parametrize(("arguments", "field"), GOOD, ids=[" ".join(arguments) for arguments, _ in GOOD])
def test_good_input(capfd: pytest.CaptureFixture[str], arguments: list[str], field: str) -> None:
    assert run(["init", "--yes"]) == 0
    capfd.readouterr()
    assert run([*arguments, "--json"]) == 0
    out, err = capfd.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert field in lines[-1] and err == ""
    assert run(arguments) == 0
    out, err = capfd.readouterr()
    assert "Traceback" not in err and "\x1b" not in out + err  # no colour where nobody sees it


@pytest.mark.e2e
def test_a_node_that_serves(capfd: pytest.CaptureFixture[str], moe: Path, tmp_path: Path) -> None:
    """What needs a node: first with a part of the model, then with all of it."""
    folder = ["--data-dir", str(tmp_path / "host")]

    def use(*arguments: str, code: int = 0) -> tuple[dict[str, Any], str]:
        """A command with --json and without; the result, and what people see of it."""
        capfd.readouterr()
        assert run([*arguments, *folder, "--json"]) == code, capfd.readouterr()
        out, err = capfd.readouterr()
        assert err == "", err
        result = [json.loads(line) for line in out.splitlines()][-1]
        assert run([*arguments, *folder]) == code
        out, err = capfd.readouterr()
        assert "Traceback" not in err and "\x1b" not in out + err
        return result, out + err

    with running("host-expert", str(moe), "--layers", "0-1", *folder) as hosting:
        hosting.wait_for("ready")
        ask = ["infer", "Hi", "--model", str(moe), "--max-tokens", "2"]
        result, shown = use(*ask, code=3)
        assert result["error"]["code"] == "no_peer" and result["missing"] == {"2": list(range(8))}
        assert re.search("^error: .*no live host for layer 2", shown) and "\nhint: " in shown
        use("expert", "deploy", str(moe), "--layers", "2")
        result, shown = use(*ask)
        assert result["completion_tokens"] == 2 and len(result["hosts"]) == 1
        assert re.fullmatch(re.escape(result["text"]) + r"\n\[2 tokens, .*\]\n", shown)
        assert use("status")[0]["running"] and "running (process" in use("status")[1]
        for command in (["expert", "list"], ["peers", "list"], ["logs"], ["model", "info", str(moe)]):
            use(*command)
        assert use("join", code=2)[0]["error"]["code"] == "bad_input"  # the folder is in use
        assert hosting.stop(signal.SIGINT) == 130
