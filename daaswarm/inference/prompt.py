"""What is asked, and the tokens it becomes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from daaswarm.errors import ConfigError, ModelError
from daaswarm.inference.sequence import Sampling


@dataclass(frozen=True)
class Prompt:
    """A question, and how the answer shall be drawn.

    Attributes:
        history: earlier turns, ``{"role": "user" | "assistant", "content": text}`` each.
        raw: continue the text as it stands, without the chat template.
        stop: the answer ends before any of these.
    """

    text: str
    system: str | None = None
    history: list[dict[str, str]] = field(default_factory=list)
    raw: bool = False
    stop: list[str] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)


def encode_prompt(prompt: Prompt, tokenizer: Any, model_name: str) -> list[int]:
    """The prompt's tokens.

    Raises:
        ModelError: the model has no tokenizer.
        ConfigError: nothing to ask, or a conversation where there is no chat template.
    """
    if tokenizer is None:
        raise ModelError(f"{model_name} has no tokenizer", hint="add tokenizer.json to its folder")
    if not prompt.text.strip():
        raise ConfigError("the prompt is empty", hint='write it like: daaswarm infer "What is a hash table?"')
    if prompt.raw or not tokenizer.chat_template:
        if prompt.system is not None or prompt.history:
            what = "--system" if prompt.system is not None else "a conversation"
            raise ConfigError(
                f"{what} needs a chat template"
                + ("; --raw leaves it out" if prompt.raw else f", {model_name} has none"),
                hint="put everything into the prompt",
            )
        ids = tokenizer(prompt.text)["input_ids"]
    else:
        messages = [{"role": "system", "content": prompt.system}] if prompt.system is not None else []
        messages += [*prompt.history, {"role": "user", "content": prompt.text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    if not ids:
        raise ConfigError("the prompt has no tokens", hint="write some words")
    return list(ids)
