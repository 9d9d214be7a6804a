"""The main job, on the model that a newcomer gets: five processes, one answer, the reference's tokens."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from daaswarm.config import get_cache_dir
from daaswarm.models.sources import DEFAULT_MODEL, find_model
from tests.e2e.processes import run_json, running, swarm

pytestmark = pytest.mark.e2e

QUESTION = "Explain what a distributed hash table is."
TOKENS = 24


@functools.cache
def get_reference_text() -> str:
    """transformers' own greedy text for the same weights."""
    import torch

    from daaswarm.models.trunk import load_reference, load_tokenizer

    model = find_model(DEFAULT_MODEL, get_cache_dir())
    reference, tokenizer = load_reference(model, "f32"), load_tokenizer(model)
    assert tokenizer is not None
    messages = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        made = reference.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_five_processes_give_the_reference_text_and_survive_a_kill(tmp_path: Path) -> None:
    expected = get_reference_text()
    halves = [["--layers", "0-14"], ["--layers", "15-29"], ["--layers", "15-29"]]
    with swarm(tmp_path, DEFAULT_MODEL, *halves) as (bootstrap, hosts):
        ask = ["infer", QUESTION, "--temperature", "0", "--max-tokens", str(TOKENS)]
        ask += ["--bootstrap", bootstrap, "--data-dir", str(tmp_path / "ask")]

        whole = run_json(*ask)
        assert whole["text"] == expected
        assert whole["completion_tokens"] == TOKENS and whole["retries"] == 0 and whole["embedded"] is False
        assert whole["requester_parameters"] < 60e6 < 79e6 < whole["remote_parameters"]
        assert whole["calls"] == sum(host["calls"] for host in whole["hosts"])

        with running(*ask) as asking:  # one of the doubled hosts dies in mid-answer
            asking.wait_for("text")
            hosts[2].process.kill()
            code, last = asking.wait()
        assert code == 0 and last["text"] == expected
        assert last["retries"] > 0

        with running(*ask) as asking:  # now the last replica
            asking.wait_for("text")
            hosts[1].process.kill()
            code, last = asking.wait(timeout=15)
        assert code == 3
        assert last["error"]["code"] == "no_peer" and "layers 15-29" in last["error"]["message"]
        assert last["text"] and expected.startswith(last["text"])
        assert [int(layer) for layer in last["missing"]] == list(range(15, 30))

        lost = run_json(*ask, code=3)  # and before generation starts
        assert "layers 15-29" in lost["error"]["message"] and lost["text"] == ""
