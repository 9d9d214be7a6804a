"""``daaswarm model``: good input, bad input, a hub of our own, and Ctrl-C at every stage."""

from __future__ import annotations

import hashlib
import json
import signal
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from daaswarm.cli import model as room
from daaswarm.cli.app import run
from daaswarm.errors import DaaswarmError
from daaswarm.models.fetching import fetch_model
from daaswarm.models.manifest_file import MANIFEST_NAME
from daaswarm.models.sources import find_model, list_models
from daaswarm.store.database import Database
from daaswarm.store.records import ModelRecord
from daaswarm.types import ModelRoot
from tests.e2e.processes import running

BIG = 1 << 24  # rows of 64 x f32: a sparse file of 4 GiB, which takes seconds to hash


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DAASWARM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DAASWARM_HOME", str(tmp_path / "home"))
    return tmp_path / "cache"


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert run([*arguments, "--json"]) == code
    out = capsys.readouterr().out
    return [json.loads(line) for line in out.splitlines()][-1]


def test_a_folder_from_pull_to_remove(moe: Path, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pulled = run_json(capsys, "model", "pull", str(moe))
    root = pulled["model_root"]
    assert pulled["folder"] == str(own / "models" / moe.name) and pulled["bytes"] > 0
    assert not Path(pulled["folder"], "model.safetensors").samefile(moe / "model.safetensors")
    assert run_json(capsys, "model", "pull", str(moe))["model_root"] == root
    (listed,) = run_json(capsys, "model", "list")["models"]
    assert (listed["name"], listed["kind"], listed["root"], listed["dtype"]) == (moe.name, "moe", root, "f32")
    for name in (moe.name, root, root[:10]):
        assert run_json(capsys, "model", "info", name)["root"] == root
        assert find_model(name, own).root == root
    assert run(["model", "remove", moe.name]) == 2  # nobody to ask
    assert "--yes" in capsys.readouterr().err
    run_json(capsys, "model", "remove", moe.name, "--yes")
    assert run_json(capsys, "model", "list")["models"] == [] and moe.is_dir()


def test_linked(moe: Path, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pulled = run_json(capsys, "model", "pull", str(moe), "--link")
    assert Path(pulled["folder"], "model.safetensors").samefile(moe / "model.safetensors")


def test_a_folder_that_is_not_what_its_manifest_says(
    moe: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    altered = Path(shutil.copytree(moe, tmp_path / "altered"))
    find_model(str(altered), own)
    with (altered / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"abcd")
    assert "altered" in run_json(capsys, "model", "pull", str(altered), code=2)["error"]["message"]
    assert list_models(own) == [] and not (own / "models" / "altered").exists()


def test_prepare_says_what_a_gguf_file_was_and_became(
    dense: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from daaswarm.models.trunk import load_reference
    from tests.models.test_gguf import write_gguf

    write_gguf(load_reference(find_model(str(dense), own), "f32"), tmp_path / "m.gguf")
    prepared = run_json(capsys, "model", "prepare", str(tmp_path / "m.gguf"))
    assert prepared["source_types"].keys() <= {"F32", "Q8_0"} and prepared["dtype"] == "f32"
    assert run(["model", "prepare", str(tmp_path / "m.gguf")]) == 0
    assert "all became f32" in capsys.readouterr().err


def test_info(moe: Path, dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "model", "info", str(moe), "--hosts", "2", "--memory", "100kB", "--dtype", "bf16")
    layer = found["layers"][0]
    assert (len(found["layers"]), layer["experts"], found["kind"], found["context"]) == (3, 8, "moe", 256)
    assert layer["expert_bytes"] == {"f32": 4 * 18_432, "bf16": 2 * 18_432, "f16": 2 * 18_432}
    assert found["host_bytes"] == 12 * 2 * 18_432
    assert found["hosts_needed"] == 12  # 24 experts, of which two fit
    assert found["requester_bytes"]["f32"] + found["experts_bytes"]["f32"] == found["bytes"]
    assert run_json(capsys, "model", "info", str(moe), "--memory", "1kB")["hosts_needed"] is None
    assert run_json(capsys, "model", "info", str(dense))["kind"] == "dense"
    assert run(["model", "info", str(dense)]) == 0
    assert "slices each" in capsys.readouterr().out


def test_info_of_what_cannot_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from daaswarm.testing.checkpoints import make_tiny_checkpoint

    folder = make_tiny_checkpoint("gpt2", tmp_path / "gpt2")
    found = run_json(capsys, "model", "info", str(folder))
    assert not found["servable"] and "can't be split" in found["reason"]
    assert run(["model", "info", str(folder)]) == 0
    assert "no: GPT2LMHeadModel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["info", "nothing-here"], 2, "no model nothing-here"),
        (["info", "default"], 2, "not on this machine yet"),
        (["info", ".", "--dtype", "int4"], 2, "--dtype 'int4'"),
        (["info", ".", "--hosts", "0"], 2, "--hosts"),
        (["info", ".", "--memory", "lots"], 2, "--memory 'lots'"),
        (["prepare", "nothing-here"], 2, "no such path"),
        (["prepare"], 2, "Missing argument"),
        (["pull", "/nowhere"], 2, "no such path"),
        (["pull", "hf:../../etc"], 2, "not a repository"),
        (["pull", "hf:a/b/c"], 2, "not a repository"),
        (["pull", "ab" * 32], 2, "no address of the swarm"),
        (["pull", "ab" * 32, "--link"], 2, "--link goes with a folder"),
        (["pull", "ab" * 32, "--bootstrap", "nonsense"], 2, "nonsense"),
        (["pull", ".", "--bootstrap", "/ip4/127.0.0.1/tcp/1"], 2, "--bootstrap goes with"),
        (["remove", "nothing-here", "--yes"], 2, "not in the cache"),
        (["remove", "../../etc", "--yes"], 2, "not in the cache"),
    ],
)
def test_bad_input(
    arguments: list[str], code: int, says: str, own: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(own.parent)
    error = run_json(capsys, "model", *arguments, code=code)["error"]
    assert says in error["message"] and error["hint"]
    assert run(["model", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err


def test_models_in_other_folders_are_listed_and_left_alone(
    moe: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").mkdir()
    record = ModelRecord(folder=str(moe), model_root=ModelRoot("ab" * 32), name="mine", kind="moe", used_at=1.0)
    database = Database.open(tmp_path / "home" / "node.db")
    database.put_model(record)
    database.close()
    (listed,) = run_json(capsys, "model", "list")["models"]
    assert (listed["name"], listed["folder"], listed["in_cache"]) == ("mine", str(moe), False)
    assert run_json(capsys, "model", "info", "mine")["folder"] == str(moe)
    assert "not in the cache" in run_json(capsys, "model", "remove", "mine", "--yes", code=2)["error"]["message"]
    assert (moe / "config.json").is_file()


def test_a_link_in_the_cache_is_removed_and_its_target_stays(
    moe: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    find_model(str(moe), own)
    (own / "models").mkdir(parents=True)
    (own / "models" / "mine").symlink_to(moe)
    removed = run_json(capsys, "model", "remove", "mine", "--yes")
    assert removed["folder"] == str(own / "models" / "mine")
    assert run_json(capsys, "model", "list")["models"] == [] and (moe / "model.safetensors").is_file()


def test_of_one_root_the_finished_model_is_removed_first(
    moe: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pulled = run_json(capsys, "model", "pull", str(moe))
    root = pulled["model_root"]
    partial = own / "models" / f".root-{root}.partial"
    partial.mkdir()
    assert run_json(capsys, "model", "remove", root, "--yes")["folder"] == pulled["folder"]
    assert partial.is_dir()
    assert run_json(capsys, "model", "remove", root, "--yes")["folder"] == str(partial)
    assert run_json(capsys, "model", "list")["models"] == []


def test_an_empty_name_is_nobodys(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "models" / "damaged").mkdir(parents=True)
    assert "not in the cache" in run_json(capsys, "model", "remove", "", "--yes", code=2)["error"]["message"]
    assert (own / "models" / "damaged").is_dir()


def test_what_a_node_serves_stays(
    moe: Path, own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run_json(capsys, "model", "pull", str(moe))["model_root"]

    async def answer(*_: Any) -> dict[str, Any]:
        return {"hosted": [{"root": root}]}

    monkeypatch.setattr(room, "is_node_running", lambda folder: True)
    monkeypatch.setattr(room, "attach", answer)
    assert "serves" in run_json(capsys, "model", "remove", moe.name, "--yes", code=2)["error"]["message"]
    assert find_model(moe.name, own).root == root


# -- a hub --------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as huggingface_hub asks for one repository, ``o/m``."""

    folder: Path
    is_stuck = False

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        names = [p.name for p in self.folder.iterdir() if p.is_file() and p.name != MANIFEST_NAME]
        names.append("evil.py")
        if path.startswith("/api/models/o/m"):
            if "/tree/" in path:
                found: Any = [self.describe(name) for name in names]
            else:
                siblings = [{"rfilename": n, "size": self.describe(n)["size"]} for n in names]
                found = {"id": "o/m", "modelId": "o/m", "sha": "a" * 40, "siblings": siblings, "tags": []}
            self.answer(json.dumps(found).encode(), "application/json")
        elif path.startswith("/o/m/resolve/") and (self.folder / Path(path).name).is_file():
            if self.is_stuck and path.endswith(".safetensors"):
                time.sleep(30)
            self.answer((self.folder / Path(path).name).read_bytes(), "application/octet-stream")
        else:
            self.send_error(404)

    do_HEAD = do_GET  # noqa: N815 - http.server names it

    def describe(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        size = path.stat().st_size if path.is_file() else 1
        return {"type": "file", "path": name, "size": size, "oid": hashlib.sha1(name.encode()).hexdigest()}

    def answer(self, data: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(moe: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("OurHub", (Hub,), {"folder": moe})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_from_a_hub(hub: type[Hub], moe: Path, own: Path) -> None:
    with running("model", "pull", "hf:o/m@main") as pulling:
        code, last = pulling.wait()
    assert code == 0, pulling.errors
    assert last["model_root"] == find_model(str(moe), own).root
    assert not [p for p in Path(last["folder"]).rglob("*") if p.suffix == ".py" or p.name == ".cache"]


def test_a_repository_that_is_not_there(hub: type[Hub], own: Path) -> None:
    with running("model", "pull", "hf:o/other") as pulling:
        code, last = pulling.wait()
    assert code in (1, 2) and last["error"]["hint"] and "Traceback" not in "".join(pulling.errors)
    assert list_models(own) == []


def test_no_hub(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running("model", "pull", "hf:o/m", HF_ENDPOINT="http://127.0.0.1:9") as pulling:
        code, last = pulling.wait()
    assert (code, last["error"]["code"]) == (1, "offline") and "HF_ENDPOINT" in last["error"]["hint"]


# -- Ctrl-C -------------------------------------------------------------------------------------------------------


@pytest.fixture
def big(dense: Path, tmp_path: Path) -> Path:
    """A checkpoint of zeros with an absurd vocabulary, in a sparse file."""
    folder = tmp_path / "big"
    folder.mkdir()
    config = json.loads((dense / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": BIG}))
    with (dense / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    at = 0
    for tensor in header.values():
        if "shape" in tensor:
            if tensor["shape"][0] == config["vocab_size"]:
                tensor["shape"][0] = BIG
            size = 4 * tensor["shape"][0] * (tensor["shape"][1] if len(tensor["shape"]) > 1 else 1)
            tensor["data_offsets"], at = [at, at + size], at + size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return folder


@pytest.mark.parametrize("command", ["pull", "prepare"])
def test_ctrl_c_while_hashing(command: str, big: Path, own: Path) -> None:
    with running("model", command, str(big)) as started:
        while started.wait_for("progress")["what"] != "hashing the checkpoint":
            pass
        started.process.send_signal(signal.SIGINT)
        assert started.wait(10)[0] == 130
    assert not (big / MANIFEST_NAME).exists() and not list(own.rglob("*.safetensors"))


def test_ctrl_c_while_a_hub_sends(hub: type[Hub], own: Path) -> None:
    hub.is_stuck = True
    with running("model", "pull", "hf:o/m") as started:
        while not started.wait_for("progress")["what"].startswith("downloading"):
            pass
        started.process.send_signal(signal.SIGINT)
        assert started.wait(10)[0] == 130
    assert [p for p in (own / "models").iterdir() if p.is_dir()] == []


def test_a_copy_that_is_interrupted_leaves_nothing(moe: Path, own: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "copying" and done:
            raise DaaswarmError("stopped")

    find_model(str(moe), own)
    with pytest.raises(DaaswarmError, match="stopped"):
        fetch_model(str(moe), own, stop)
    assert [p for p in (own / "models").iterdir() if p.is_dir()] == []
