"""What a user gets wrong: exit code 2, one line that says what, one that says what next, and never a traceback."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file, save_file

from daaswarm.cli.app import run
from daaswarm.models.sources import find_model
from daaswarm.store.data_dir import DataDir
from daaswarm.testing.checkpoints import make_tiny_checkpoint

SOMEONE = "12D3KooWH3uVF6wv47WnArKHk5p6cvgCJEb74UTmxztmQDc298L3"


class Said(NamedTuple):
    message: str
    hint: str
    code: str


@pytest.fixture(autouse=True)
def home(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory and a cache that are not the user's; the current folder is an empty one."""
    monkeypatch.setenv("DAASWARM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DAASWARM_CACHE", str(cache))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run a command line, plain and with --json; both must refuse it in the same words."""

    def refuse(*arguments: str, code: int = 2) -> Said:
        capfd.readouterr()
        assert run(list(arguments)) == code
        out, err = capfd.readouterr()
        assert out == "" and "Traceback" not in err
        error, *hint = err.splitlines()
        assert error.startswith("error: ") and len(hint) <= 1 and all(line.startswith("hint: ") for line in hint), err
        assert run([*arguments, "--json"]) == code
        out, err = capfd.readouterr()
        assert err == "" and "Traceback" not in out
        said = json.loads(out.splitlines()[-1])["error"]
        assert said["message"] == error.removeprefix("error: ")
        assert said["hint"] == (hint[0].removeprefix("hint: ") if hint else "")
        return Said(said["message"], said["hint"], said["code"])

    return refuse


@pytest.fixture
def copy(moe: Path, dense: Path, cache: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny checkpoint that was used before, so that its manifest is there."""

    def make(original: Path = moe) -> Path:
        find_model(str(original), cache)
        return Path(shutil.copytree(original, tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"))

    return make


# -- models -------------------------------------------------------------------------------------------------------

BOTH = [["host-expert"], ["infer", "Hi", "--model"]]


@pytest.mark.parametrize("command", [*BOTH, ["model", "pull"], ["plan"]])
def test_a_path_in_the_home_of_nobody(refused: Callable[..., Said], command: list[str]) -> None:
    assert "~nobody-at-all/model is not a known model" in refused(*command, "~nobody-at-all/model").message


@pytest.mark.parametrize("command", BOTH)
def test_an_unknown_model(refused: Callable[..., Said], command: list[str]) -> None:
    said = refused(*command, "gpt-17")
    assert "gpt-17 is not a known model" in said.message and said.hint and said.code == "bad_model"


@pytest.mark.parametrize("command", BOTH)
def test_a_folder_that_is_no_checkpoint(refused: Callable[..., Said], command: list[str], tmp_path: Path) -> None:
    said = refused(*command, str(tmp_path))
    assert f"{tmp_path} is not a checkpoint" in said.message
    (tmp_path / "notes.txt").write_text("x")
    assert "neither a folder nor a .gguf file" in refused(*command, str(tmp_path / "notes.txt")).message
    (tmp_path / "bad.gguf").write_text("not a GGUF file")
    assert "bad.gguf is not a GGUF file" in refused(*command, str(tmp_path / "bad.gguf")).message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_a_checkpoint_is_missing(refused: Callable[..., Said], copy: Callable[..., Path], name: str) -> None:
    folder = copy()
    (folder / name).unlink()
    assert str(folder) in refused("host-expert", str(folder)).message


def test_a_truncated_checkpoint(refused: Callable[..., Said], copy: Callable[..., Path]) -> None:
    folder = copy()
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) - 1000])
    said = refused("host-expert", str(folder))
    assert "tensor model." in said.message or "tensor lm_head" in said.message
    weights.write_bytes(whole[:100])
    refused("host-expert", str(folder))
    weights.write_bytes(b"")
    refused("host-expert", str(folder))


def test_an_altered_tensor_is_named(refused: Callable[..., Said], copy: Callable[..., Path]) -> None:
    folder = copy()
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "layers.1." in name and "experts" in name)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = refused("host-expert", str(folder), "--layers", "1")
    assert name in said.message and said.code == "bad_model"


def test_an_architecture_that_can_not_be_split(refused: Callable[..., Said], tmp_path: Path) -> None:
    folder = make_tiny_checkpoint("gpt2", tmp_path / "gpt2")
    assert "GPT2LMHeadModel can't be split" in refused("host-expert", str(folder)).message


def test_a_configuration_that_nobody_knows(refused: Callable[..., Said], copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "daaswarm.manifest").unlink(missing_ok=True)
    for path in folder.glob("*manifest*"):
        path.unlink()
    (folder / "config.json").write_text('{"model_type": "brand_new"}')
    assert "brand_new" in refused("host-expert", str(folder)).message
    (folder / "config.json").write_text("{")
    assert "config.json" in refused("host-expert", str(folder)).message


def test_a_quantised_checkpoint(refused: Callable[..., Said], copy: Callable[..., Path]) -> None:
    folder = copy()
    for path in folder.glob("*manifest*"):
        path.unlink()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "quantised (fp8)" in refused("host-expert", str(folder)).message


# -- ranges and numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layers", "0-3"], "has experts in layers 0 to 2, not in 3"),
        (["--layers", "99"], "not in 99"),
        (["--layers", "2-0"], "2 is greater than 0"),
        (["--layers", "all"], "is not a range"),
        (["--layers", ""], "is not a range"),
        (["--experts", "8"], "this model has 8, numbered 0 to 7"),
        (["--layers", "0", "--experts", "0-9"], "this model has 8"),
        (["--experts", ""], "is not a range"),
        (["--slices", "0"], "is split into experts"),
        (["--experts", "0", "--slices", "0"], "exclude each other"),
        (["--dtype", "f64"], "--dtype 'f64'"),
        (["--memory", "lots"], "--memory 'lots' is not an amount of memory"),
        (["--memory", "0"], "--memory '0'"),
        (["--memory", "1"], "not one expert fits"),
        (["--memory", "-5GB"], "--memory '-5GB'"),
        (["--memory", "1kB", "--layers", "0"], "the limit is 1.0 kB"),
    ],
)
def test_host_expert_options(refused: Callable[..., Said], moe: Path, options: list[str], said: str) -> None:
    assert said in refused("host-expert", str(moe), *options).message


def test_slices_and_experts_of_a_dense_model(refused: Callable[..., Said], dense: Path) -> None:
    assert "is split into slices" in refused("host-expert", str(dense), "--experts", "0").message
    assert "--slices 0-99" in refused("host-expert", str(dense), "--slices", "0-99").message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-tokens", "0"], "--max-tokens"),
        (["--max-tokens", "many"], "max-tokens"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--top-p", "1.5"], "--top-p"),
        (["--seed", "-1"], "--seed -1"),
        (["--seed", str(2**63)], "--seed"),
        (["--dtype", "int4"], "--dtype 'int4'"),
        (["--embedded", "0"], "embedded"),
        (["--stop", "\udcff"], "--stop is not UTF-8"),
        (["--stop", "end", "--stop", ""], "--stop is empty"),
        (["--raw", "--system", "Be brief"], "--system needs a chat template"),
        (["--announce", "/ip4/192.0.2.1/tcp/1"], "--announce has no meaning without --listen"),
        (["--system", "\udcff"], "--system is not UTF-8"),
        (["--bootstrap", "nonsense"], "nonsense"),
        (["--bootstrap", ""], "is not"),
        (["--bootstrap", "/ip4/127.0.0.1/tcp/1"], "names no PeerId"),
        (["--bootstrap", "/ip4/127.0.0.1/tcp/99999/p2p/" + SOMEONE], "99999"),
        (["--bootstrap", "/ip4/127.0.0.1/tcp/1/p2p/12D3Koo"], "12D3Koo"),
        (["--bootstrap", "/ip4/127.0.0.1/tcp/1/p2p/" + SOMEONE], "Connection refused"),
        (["--listen", "somewhere"], "somewhere"),
        (["--listen", "/ip4/127.0.0.1/udp/1"], "/udp/1"),
        (["--listen", "/ip4/192.0.2.1/tcp/0"], "cannot listen"),
        (["--listen", "/ip4/127.0.0.1/tcp/0", "--announce", "me"], "me"),
    ],
)
def test_infer_options(refused: Callable[..., Said], moe: Path, options: list[str], said: str) -> None:
    assert said in refused("infer", "Hi", "--model", str(moe), *options).message


@pytest.mark.parametrize("command", [["join"], ["host-expert", "MOE"], ["infer", "Hi", "--model", "MOE"]])
def test_the_hint_is_about_the_option_that_is_wrong(
    refused: Callable[..., Said], moe: Path, command: list[str]
) -> None:
    command = [str(moe) if word == "MOE" else word for word in command]
    said = refused(*command, "--listen", "somewhere")
    assert said.message.startswith("--listen 'somewhere'") and "/ip4/0.0.0.0/tcp/4001" in said.hint
    assert "p2p" not in said.hint
    said = refused(*command, "--listen", "/ip4/127.0.0.1/tcp/0", "--announce", "me")
    assert said.message.startswith("--announce 'me'") and "others can dial" in said.hint


UNREACHABLE = ["--bootstrap", f"/ip4/127.0.0.1/tcp/1/p2p/{SOMEONE}"]


def test_what_is_wrong_here_is_said_before_anybody_is_asked(
    refused: Callable[..., Said], moe: Path, tmp_path: Path
) -> None:
    """Each is refused for its own reason, not for the address at which nobody is."""
    assert "not in 9" in refused("host-expert", str(moe), "--layers", "9", *UNREACHABLE).message
    assert "not one expert fits" in refused("host-expert", str(moe), "--memory", "1", *UNREACHABLE).message
    assert "gpt-17" in refused("host-expert", "gpt-17", *UNREACHABLE).message
    assert "gpt-17" in refused("infer", "Hi", "--model", "gpt-17", *UNREACHABLE).message
    long = "x" * 3000
    for options in (UNREACHABLE, ["--embedded", "1"]):
        assert "the prompt has" in refused("infer", long, "--model", str(moe), *options).message


def test_a_folder_that_is_not_there(refused: Callable[..., Said], tmp_path: Path) -> None:
    said = refused("status", "--data-dir", str(tmp_path / "no where"))
    assert f"there is no data directory {tmp_path / 'no where'}" in said.message
    assert f"daaswarm init --data-dir '{tmp_path / 'no where'}'" in said.hint


@pytest.mark.parametrize("prompt", ["", "  \n ", "\udcff"])
def test_no_prompt(refused: Callable[..., Said], moe: Path, prompt: str) -> None:
    assert "the prompt is" in refused("infer", prompt, "--model", str(moe)).message


def test_no_prompt_on_standard_input(refused: Callable[..., Said], moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "the prompt is empty" in refused("infer", "-", "--model", str(moe)).message
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8"))
    assert run(["infer", "-", "--model", str(moe)]) == 2


# -- addresses ----------------------------------------------------------------------------------------------------


@contextmanager
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("command", [["join"], ["infer", "Hi", "--model", "MOE"], ["host-expert", "MOE"]])
def test_a_port_in_use(refused: Callable[..., Said], moe: Path, command: list[str]) -> None:
    command = [str(moe) if word == "MOE" else word for word in command]
    with listening() as port:
        said = refused(*command, "--listen", f"/ip4/127.0.0.1/tcp/{port}")
    assert f"/ip4/127.0.0.1/tcp/{port}" in said.message and "Address already in use" in said.message
    assert "another program has this port" in said.hint


def test_every_bootstrap_address_is_explained(refused: Callable[..., Said]) -> None:
    with listening() as free:
        pass
    addresses = [f"/ip4/127.0.0.1/tcp/{port}/p2p/{SOMEONE}" for port in (free, 1)]
    said = refused("join", "--bootstrap", addresses[0], "--bootstrap", addresses[1])
    assert all(address in said.message for address in addresses)


# -- settings, key, lock ------------------------------------------------------------------------------------------

COMMANDS = [["init"], ["join"], ["status"], ["infer", "Hi"], ["host-expert", "x"], ["config", "get"]]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_key_in_the_file(refused: Callable[..., Said], home: Path, command: list[str]) -> None:
    home.mkdir()
    (home / "config.toml").write_text("[network]\nlistn = 1\n")
    said = refused(*command)
    assert str(home / "config.toml") in said.message and "network.listn" in said.message
    assert said.hint == "did you mean network.listen?"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_value_in_the_environment(
    refused: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("DAASWARM_HOST_THREADS", "several")
    said = refused(*command)
    assert "DAASWARM_HOST_THREADS" in said.message and "host.threads" in said.message


def test_config_set(refused: Callable[..., Said], home: Path) -> None:
    assert "unknown key 'network.port'" in refused("config", "set", "network.port", "1").message
    assert "infer.top_p" in refused("config", "set", "infer.top_p", "7").message
    assert "unknown key 'x'" in refused("config", "get", "x").message
    assert "4001" in refused("config", "set", "network.listen", "here").hint
    assert "names no PeerId" in refused("config", "set", "network.bootstrap", "/ip4/127.0.0.1/tcp/1").message
    assert not (home / "config.toml").exists()


@pytest.mark.parametrize("command", [["init"], ["join"], ["status"], ["infer", "Hi"], ["host-expert", "MOE"]])
def test_a_damaged_key_is_kept(refused: Callable[..., Said], home: Path, moe: Path, command: list[str]) -> None:
    folder = DataDir(home)
    folder.load_key()
    command = [str(moe) if word == "MOE" else word for word in command]
    folder.key_path.chmod(0o644)
    assert "readable by others" in refused(*command).message
    folder.key_path.chmod(0o600)
    folder.key_path.write_text("not a key")
    assert "holds no Ed25519 key" in refused(*command).message
    assert folder.key_path.read_text() == "not a key"


@pytest.mark.parametrize("command", [["join"], ["host-expert", "MOE"]])
def test_another_node_holds_the_folder(refused: Callable[..., Said], home: Path, moe: Path, command: list[str]) -> None:
    with DataDir(home).lock():
        said = refused(*[str(moe) if word == "MOE" else word for word in command])
    assert f"a node already runs on {home}" in said.message and "--data-dir" in said.hint


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_a_file(refused: Callable[..., Said], home: Path, command: list[str]) -> None:
    home.write_text("")
    assert str(home) in refused(*command).message


# -- words that the parser doesn't know ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["jion"], "jion"),
        (["join", "--lsten", "x"], "--lsten"),
        (["join", "extra"], "extra"),
        (["infer"], "the prompt is missing"),
        (["infer", "Hi", "--model", "x", "--seed", "one"], "--seed"),
        (["host-expert"], "'model'"),
        (["config", "set", "host.dtype"], "'value'"),
        (["config", "frobnicate"], "frobnicate"),
        (["bench", "parity", "--hosts", "0"], "hosts"),
        (["bench", "parity", "--dtype", "f8"], "f8"),
        (["bench", "expert", "--expert", "magic"], "magic"),
        (["bench", "expert", "--callers", "x"], "callers"),
        (["bench", "expert", "--dim", "65536", "--batch", "65536"], "--dim 65536 --batch 65536: a call takes 17.2 GB"),
        (["bench", "expert", "--expert", "ffn", "--dim", "65536"], "8192 is the limit"),
    ],
)
def test_usage(refused: Callable[..., Said], arguments: list[str], said: str) -> None:
    assert said in refused(*arguments).message


def test_control_characters_and_markup_of_others_are_shown_not_obeyed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run(["host-expert", "[red]x[/red]\x1b[2J\n:smile:"]) == 2
    err: Any = capfd.readouterr().err
    assert "[red]x[/red]\\x1b[2J :smile:" in err and len(err.splitlines()) == 2
