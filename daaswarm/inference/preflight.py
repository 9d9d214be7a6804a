"""What is wrong with a prompt that this machine can tell by itself, before any host is started or asked.

Needs no torch unless the prompt comes near the model's limit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from daaswarm.errors import ModelError
from daaswarm.models.checkpoint import read_config
from daaswarm.models.files import has_tokenizer
from daaswarm.models.sources import LocalModel

TEMPLATE_TOKENS = 1_024  # what a chat template may add, a system prompt of the model's own included
TURN_TOKENS = 16  # what it may add to each turn

Turn = dict[str, str]


def check_prompt(
    model: LocalModel, text: str, system: str | None = None, raw: bool = False, history: Sequence[Turn] = ()
) -> None:
    """Refuse what can't be asked. Blocks: reads small files, and counts tokens only where it could be too many.

    A token is a byte of text at least, so that a short prompt needs no counting.

    Raises:
        ModelError: the model has no tokenizer.
        ConfigError: the prompt alone fills the context, or there is no place for a system prompt.
    """
    if not has_tokenizer(model.folder):
        raise ModelError(f"{model.name} has no tokenizer", hint="add tokenizer.json to its folder")
    context = _get_context(model)
    texts = (text, system or "", *(turn["content"] for turn in history))
    most = sum(len(part.encode()) + TURN_TOKENS for part in texts) + TEMPLATE_TOKENS
    if (context is None or most < context) and (system is None or (_has_template(model) and not raw)):
        return
    from daaswarm.inference.prompt import Prompt, encode_prompt
    from daaswarm.inference.sequence import check_fits
    from daaswarm.models.trunk import load_tokenizer

    prompt = Prompt(text, system=system, raw=raw, history=list(history))
    tokens = len(encode_prompt(prompt, load_tokenizer(model), model.name))
    if context is not None:
        check_fits(tokens, context, model.name)


def check_conversation(model: LocalModel) -> None:
    """Refuse a chat with what was not made for one. Blocks: reads small files.

    Raises:
        ModelError: the model has no chat template.
    """
    if not _has_template(model):
        raise ModelError(
            f"{model.name} has no chat template, so it holds no conversations",
            hint='ask it one thing: daaswarm infer "…", with --raw for a text to continue',
        )


def _get_context(model: LocalModel) -> int | None:
    """Longest sequence the model was made for, in tokens; ``None`` where its configuration doesn't say."""
    config = _read_json(read_config(model.folder))
    for part in (config.get("text_config"), config):
        context = part.get("max_position_embeddings") if isinstance(part, dict) else None
        if isinstance(context, int):
            return context
    return None


def _has_template(model: LocalModel) -> bool:
    if (model.folder / "chat_template.jinja").is_file():
        return True
    path = model.folder / "tokenizer_config.json"
    return path.is_file() and bool(_read_json(path.read_bytes()).get("chat_template"))


def _read_json(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}  # whoever loads it says what is wrong
    return value if isinstance(value, dict) else {}
