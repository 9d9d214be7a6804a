"""The examples do what they say."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from daaswarm.testing.checkpoints import VOCABULARY, make_tiny_checkpoint

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``examples/ask.py``, in an environment of its own."""
    for name in list(os.environ):
        if name.startswith("DAASWARM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("DAASWARM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DAASWARM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DAASWARM_HOST_THREADS", "1")
    monkeypatch.setenv("DAASWARM_INFER_THREADS", "1")
    spec = importlib.util.spec_from_file_location("ask_example", EXAMPLES / "ask.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def add_tokenizer(folder: Path) -> None:
    """A word for each token of the vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3}
    words |= {f"word{i}": i for i in range(len(words), VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)


@pytest.mark.e2e
def test_ask_prints_text_and_hosts(ask: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_tiny_checkpoint("olmoe", tmp_path / "model")
    add_tokenizer(folder)
    options = ["--model", str(folder), "--embedded", "1", "--max-tokens", "4", "--temperature", "0"]
    pieces: list[str] = []
    answer = ask.ask("hello hello", *options, on_text=pieces.append)
    assert "".join(pieces) == answer["text"] != ""
    assert answer["embedded"] is True and answer["completion_tokens"] <= 4
    assert [host["calls"] for host in answer["hosts"]] == [answer["calls"]]


def test_ask_passes_on_what_went_wrong(ask: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask.main(["hello", "--model", "no-such-model"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "bad_model: no-such-model" in err and "hint:" in err
    with pytest.raises(ask.AskError) as caught:
        ask.ask("hello", "--temperature", "-1")
    assert caught.value.code == "bad_input" and caught.value.exit_code == 2 and caught.value.text == ""


def test_ask_explains_itself(ask: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask.main([]) == 0
    assert sys.executable and "examples/ask.py" in capsys.readouterr().out
