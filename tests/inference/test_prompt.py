"""What is asked, as tokens."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from daaswarm.errors import ConfigError, ModelError
from daaswarm.inference.prompt import Prompt, encode_prompt
from tests.byte_tokenizer import make_tokenizer

TOKENIZER = make_tokenizer()


def make_chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (Prompt("Hi"), "user:Hi\nassistant:"),
        (Prompt("Hi", system="Be kind"), "system:Be kind\nuser:Hi\nassistant:"),
        (Prompt("Hi", raw=True), "Hi"),
        (
            Prompt("c", history=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
            "user:a\nassistant:b\nuser:c\nassistant:",
        ),
    ],
)
def test_the_chat_template(prompt: Prompt, text: str) -> None:
    assert TOKENIZER.decode(encode_prompt(prompt, make_chat_tokenizer(), "m")) == text


def test_without_a_chat_template() -> None:
    assert encode_prompt(Prompt("Hi"), TOKENIZER, "m") == TOKENIZER("Hi")["input_ids"]
    with pytest.raises(ConfigError, match="m has none"):
        encode_prompt(Prompt("Hi", system="x"), TOKENIZER, "m")
    with pytest.raises(ConfigError, match="a conversation needs a chat template"):
        encode_prompt(Prompt("Hi", history=[{"role": "user", "content": "a"}]), TOKENIZER, "m")
    with pytest.raises(ConfigError, match="--raw leaves it out"):
        encode_prompt(Prompt("Hi", system="x", raw=True), make_chat_tokenizer(), "m")


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_prompt(text: str) -> None:
    with pytest.raises(ConfigError, match="empty"):
        encode_prompt(Prompt(text), TOKENIZER, "m")


def test_a_model_without_a_tokenizer() -> None:
    with pytest.raises(ModelError, match="m has no tokenizer"):
        encode_prompt(Prompt("Hi"), None, "m")
