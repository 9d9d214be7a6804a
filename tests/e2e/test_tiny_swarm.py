"""A small swarm as its users start it, on a tiny mixture of experts: ranges, attaching, placement, signals."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from daaswarm.models.sources import find_model
from tests.e2e.processes import Running, run, run_json, running, swarm

pytestmark = pytest.mark.e2e

TOKENS = 12
SOMEONE = "12D3KooWH3uVF6wv47WnArKHk5p6cvgCJEb74UTmxztmQDc298L3"


class Tiny(NamedTuple):
    """A running swarm: ``join``'s folder and address, and two hosts with half of each layer's experts."""

    model: str
    joined: str
    bootstrap: str
    hosts: list[Running]


@pytest.fixture(scope="module", autouse=True)
def own_cache(cache: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAASWARM_CACHE", str(cache))
        yield


@pytest.fixture(scope="module")
def tiny(moe: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    find_model(str(moe), cache)  # its manifest, so that no two processes make it at once
    folder = tmp_path_factory.mktemp("swarm")
    with swarm(folder, str(moe), ["--experts", "0-3"], ["--experts", "4-7"]) as (bootstrap, hosts):
        yield Tiny(str(moe), str(folder / "join"), bootstrap, hosts)


@functools.cache
def get_reference_text(folder: Path, prompt: str, tokens: int = TOKENS) -> str:
    """transformers' own greedy text for the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.byte_tokenizer import make_tokenizer

    tokenizer = make_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def ask(model: str, prompt: str, *options: str, **kwargs: Any) -> dict[str, Any]:
    return run_json(
        "infer", prompt, "--model", model, "--temperature", "0", "--max-tokens", str(TOKENS), *options, **kwargs
    )


def test_two_hosts_with_half_of_each_layer(tiny: Tiny, moe: Path, tmp_path: Path) -> None:
    answer = ask(tiny.model, "Hello", "--bootstrap", tiny.bootstrap, "--data-dir", str(tmp_path))
    assert answer["text"] == get_reference_text(moe, "Hello")
    assert (answer["prompt_tokens"], answer["completion_tokens"], answer["retries"]) == (5, TOKENS, 0)
    assert len(answer["hosts"]) == 2 and not answer["embedded"]
    for host in answer["hosts"]:
        assert host["calls"] > 0 and host["rows"] > 0 and host["bytes_sent"] > host["bytes_received"] > 0
    assert answer["model"] == moe.name and len(answer["model_root"]) == 64

    stdin = ask(tiny.model, "-", "--bootstrap", tiny.bootstrap, "--data-dir", str(tmp_path), input="Hello")
    assert stdin["text"] == answer["text"]


def test_answers_in_a_codec_on_a_running_node(tiny: Tiny) -> None:
    prompt = "A prompt that is long enough to be kept"
    plain, again, coded = (
        ask(tiny.model, prompt, "--codec", codec, "--data-dir", tiny.joined) for codec in ("none", "none", "int8")
    )
    assert again["reused_tokens"] > 0 and coded["reused_tokens"] == 0  # its keys and values came of other sums
    assert (plain["codec"], coded["codec"]) == ("none", "int8")
    assert len(coded["hosts"]) == 2
    for host in coded["hosts"]:
        assert host["coded_calls"] == host["calls"] > 0
    assert all(host["coded_calls"] == 0 for host in plain["hosts"])
    assert sum(h["bytes_received"] for h in coded["hosts"]) < 0.4 * sum(h["bytes_received"] for h in plain["hosts"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--codec", "zstd"), "--codec: infer.codec = 'zstd' is not valid"),
        (("--device", "gpu"), "--device: infer.device = 'gpu' is not valid"),
        (("--device", "cuda:99"), "infer.device = 'cuda:99': "),
    ],
)
def test_codecs_and_devices_that_are_not_there(
    tiny: Tiny, tmp_path: Path, options: tuple[str, str], message: str
) -> None:
    done = run(
        "infer", "Hi", *options, "--model", tiny.model, "--bootstrap", tiny.bootstrap, "--data-dir", str(tmp_path)
    )
    assert done.returncode == 2 and message in done.stderr


def test_two_answers_at_the_same_time_on_a_running_node(tiny: Tiny, moe: Path) -> None:
    prompts = ["One", "Two"]
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda prompt: ask(tiny.model, prompt, "--data-dir", tiny.joined), prompts))
    assert [answer["text"] for answer in answers] == [get_reference_text(moe, prompt) for prompt in prompts]
    assert not any(answer["embedded"] for answer in answers)


def test_hosting_on_a_running_node(tiny: Tiny, moe: Path) -> None:
    size = find_model(tiny.model, moe).expert_bytes(0, "f32")
    with running("host-expert", tiny.model, "--layers", "0", "--data-dir", tiny.joined) as host:
        ready = host.wait_for("ready")
        assert tiny.bootstrap.endswith(ready["peer_id"])
        assert ready["held"] == {"0": list(range(8))}
        assert ready["bytes_read"] == ready["bytes_held"] == 8 * size

        status = run_json("status", "--data-dir", tiny.joined)
        assert status["running"] and status["peer_id"] == ready["peer_id"] and status["tasks"] > 10
        assert [(m["root"], m["held"]) for m in status["hosted"]] == [(ready["model_root"], ready["held"])]
        assert len(status["known_peers"]) >= 2

        twice = run_json("host-expert", tiny.model, "--data-dir", tiny.joined, "--layers", "0-1", code=2)
        assert "layers 0, already" in twice["error"]["message"]

        answer = ask(tiny.model, "Hello", "--data-dir", tiny.joined)  # with its own experts among the hosts'
        assert answer["text"] == get_reference_text(moe, "Hello")
        assert host.stop(signal.SIGTERM) == 0
    assert run_json("status", "--data-dir", tiny.joined)["hosted"] == []
    assert ask(tiny.model, "Hello", "--data-dir", tiny.joined)["retries"] == 0  # nobody believes its old advert


def test_what_a_running_swarm_refuses(tiny: Tiny, tmp_path: Path) -> None:
    again = run_json("join", "--data-dir", tiny.joined, code=2)
    assert "a node already runs" in again["error"]["message"]
    for option in ("--listen", "--announce"):
        for command in (["infer", "Hi", "--model", tiny.model], ["host-expert", tiny.model]):
            given = [*command, "--listen", "/ip4/127.0.0.1/tcp/0"][: len(command) + 2 * (option == "--announce")]
            said = run_json(*given, option, "/ip4/127.0.0.1/tcp/0", "--data-dir", tiny.joined, code=2)
            assert "has no meaning here: a node runs on" in said["error"]["message"]
    wrong = tiny.bootstrap.rpartition("/")[0] + "/" + SOMEONE
    said = run_json("join", "--bootstrap", wrong, "--data-dir", str(tmp_path), code=2)
    assert SOMEONE in said["error"]["message"] and tiny.bootstrap.rpartition("/")[2] in said["error"]["message"]
    long = ask(tiny.model, "x" * 300, "--data-dir", tiny.joined, code=2)
    assert "the prompt has 300 tokens" in long["error"]["message"]
    plain = run("infer", "x", "--model", "nothing", "--data-dir", tiny.joined)
    assert plain.returncode == 2 and plain.stdout == "" and plain.stderr.startswith("error: nothing is not a known")


def test_memory_alone_covers_the_model(tiny: Tiny, dense: Path, cache: Path, tmp_path: Path) -> None:
    model = find_model(str(dense), cache)
    whole = sum(n * model.expert_bytes(layer, "f32") for layer, n in model.layers.items())
    held: dict[str, set[int]] = {}
    options = [str(dense), "--memory", str(whole // 2), "--bootstrap", tiny.bootstrap]
    with running("host-expert", *options, "--data-dir", str(tmp_path / "a")) as first:
        readies = [first.wait_for("ready")]
        with running("host-expert", *options, "--data-dir", str(tmp_path / "b")) as second:
            readies.append(second.wait_for("ready"))
            for ready in readies:
                assert ready["bytes_read"] == ready["bytes_held"] == whole // 2
                for layer, slices in ready["held"].items():
                    assert not held.setdefault(layer, set()) & set(slices)
                    held[layer] |= set(slices)
            assert {int(layer): len(slices) for layer, slices in held.items()} == model.layers
            answer = ask(str(dense), "Hello", "--data-dir", tiny.joined)
            assert answer["text"] == get_reference_text(dense, "Hello")
            assert second.stop(signal.SIGINT) == 130
        lost = ask(str(dense), "Hello", "--data-dir", tiny.joined, code=3)
        assert {int(n): experts for n, experts in lost["missing"].items()} == {
            int(n): experts for n, experts in readies[1]["held"].items()
        }


def test_without_a_bootstrap_hosts_are_started_here(moe: Path, cache: Path, tmp_path: Path) -> None:
    find_model(str(moe), cache)
    done = run(
        *["infer", "Hello", "--model", str(moe), "--temperature", "0", "--max-tokens", str(TOKENS), "--json"],
        DAASWARM_HOME=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert any("--embedded 3" in line["text"] for line in lines if line.get("event") == "message")
    assert "".join(line["text"] for line in lines if line.get("event") == "text") == lines[-1]["text"]
    assert lines[-1]["text"] == get_reference_text(moe, "Hello")
    assert lines[-1]["embedded"] is True and len(lines[-1]["hosts"]) == 3


def test_interrupting_an_answer_leaves_no_process(moe: Path, cache: Path, tmp_path: Path) -> None:
    find_model(str(moe), cache)
    options = ["--model", str(moe), "--max-tokens", "200", "--embedded", "1"]
    with running("infer", "Hello", *options, "--data-dir", str(tmp_path)) as asking:
        asking.wait_for("embedded")
        children = psutil.Process(asking.process.pid).children(recursive=True)
        assert children
        assert asking.stop(signal.SIGINT) == 130
        gone, alive = psutil.wait_procs(children, timeout=10)
        assert len(gone) == len(children) and not alive
        assert asking.wait()[1]["error"]["code"] == "interrupted"
    assert not [line for line in asking.errors if "Traceback" in line]


def test_a_node_leaves_on_sigterm(tmp_path: Path) -> None:
    with running("join", "--data-dir", str(tmp_path)) as joined:
        joined.wait_for("ready")
        assert joined.stop(signal.SIGTERM) == 0
    assert not (tmp_path / "control.sock").exists()
    assert joined.errors == []
