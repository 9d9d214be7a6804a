"""From a prompt to a streamed text: tokens in, the trunk's own ``generate``, characters out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer

from daaswarm.errors import ConfigError, ModelError


@dataclass(frozen=True)
class Prompt:
    """What is asked, and how the answer shall be drawn."""

    text: str
    system: str | None = None
    raw: bool = False  # continue the text as it stands, without the chat template
    max_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)


@dataclass
class Generated:
    """An answer and its measurements."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    time_to_first_token_s: float = 0.0
    seconds: float = 0.0
    finish_reason: str = "stop"


def encode_prompt(prompt: Prompt, tokenizer: Any, model_name: str) -> torch.Tensor:
    """(1, tokens) int64.

    Raises:
        ModelError: the model has no tokenizer.
        ConfigError: nothing to ask, or a system prompt where there is no chat template.
    """
    if tokenizer is None:
        raise ModelError(f"{model_name} has no tokenizer", hint="add tokenizer.json to its folder")
    if not prompt.text.strip():
        raise ConfigError("the prompt is empty", hint='write it like: daaswarm infer "What is a hash table?"')
    if prompt.raw or not tokenizer.chat_template:
        if prompt.system is not None:
            raise ConfigError(
                "--system needs a chat template"
                + ("; --raw leaves it out" if prompt.raw else f", {model_name} has none"),
                hint="put the instruction into the prompt",
            )
        ids = tokenizer(prompt.text, return_tensors="pt")["input_ids"]
    else:
        messages = [{"role": "system", "content": prompt.system}] if prompt.system is not None else []
        messages.append({"role": "user", "content": prompt.text})
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    if ids.shape[1] == 0:
        raise ConfigError("the prompt has no tokens", hint="write some words")
    return ids


def get_context(model: Any) -> int | None:
    """Longest sequence the model was made for, in tokens; ``None`` if it has no such limit."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


class SampleOnce(LogitsProcessor):
    """Draws each token by the Gumbel-max trick with a generator of its own, so that a seed means the same in every
    thread: the largest of log p + Gumbel noise is a draw from p. ``generate`` then just takes the maximum.
    """

    def __init__(self, seed: int | None) -> None:
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = torch.rand(scores.shape, generator=self._generator, dtype=torch.float64)
        gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
        return torch.log_softmax(scores.double(), dim=-1) + gumbel.to(scores.device)


class TextStream(BaseStreamer):
    """Turns token ids into text as they come. Holds back what may still change: an unfinished UTF-8 character, or the
    beginning of a stop string.
    """

    def __init__(self, tokenizer: Any, stop: list[str], on_text: Callable[[str], None], prompt_tokens: int) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.first_token_at: float | None = None
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = [s for s in stop if s]
        self._on_text = on_text
        self._prompt_left = prompt_tokens
        self._pending = ""  # decoded, not yet passed on
        self._context_at = 0  # tokens from here give the next ones their context
        self._decoded_at = 0  # tokens before here are decoded

    def put(self, value: torch.Tensor) -> None:
        ids = value.reshape(-1).tolist()
        if self._prompt_left:  # ``generate`` shows the prompt first
            self._prompt_left -= len(ids)
            return
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        self.token_ids += ids
        self._advance(final=False)

    def end(self) -> None:
        self._advance(final=True)

    def _decode(self, first: int, last: int) -> str:
        return self._tokenizer.decode(self.token_ids[first:last], skip_special_tokens=True)

    def _advance(self, *, final: bool) -> None:
        """Decode the new tokens behind a little context, since many tokenizers write the first token of a text
        differently; the difference to the context alone is the new text (vLLM's and TGI's method).
        """
        if self.stopped:
            return
        count = len(self.token_ids)
        before = self._decode(self._context_at, self._decoded_at)
        after = self._decode(self._context_at, count)
        if final or (len(after) > len(before) and not after.endswith("\ufffd")):
            self._context_at, self._decoded_at = self._decoded_at, count
            self._pending += after[len(before) :]
        at, stop = min(((self._pending.find(s), s) for s in self._stop if s in self._pending), default=(-1, ""))
        if stop:
            self._pending = self._pending[:at]
            self.stopped = True
        held = 0
        if not (final or self.stopped):
            held = max((n for s in self._stop for n in range(1, len(s)) if self._pending.endswith(s[:n])), default=0)
        ready = self._pending[: len(self._pending) - held]
        if ready:
            self.text += ready
            self._pending = self._pending[len(ready) :]
            self._on_text(ready)


class StopWhen(StoppingCriteria):
    """Ends ``generate`` when a stop string was written or the asker went away."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._is_over(), dtype=torch.bool, device=input_ids.device)


def check_length(model: Any, prompt_tokens: int, max_tokens: int, model_name: str) -> int:
    """How many tokens may be generated.

    Raises:
        ConfigError: the prompt alone fills the context.
    """
    context = get_context(model)
    if context is None:
        return max_tokens
    if prompt_tokens >= context:
        raise ConfigError(
            f"the prompt has {prompt_tokens} tokens; {model_name} takes {context} with the answer",
            hint="shorten the prompt",
        )
    return min(max_tokens, context - prompt_tokens)


def generate(
    model: Any,
    tokenizer: Any,
    ids: torch.Tensor,
    prompt: Prompt,
    *,
    model_name: str,
    on_text: Callable[[str], None],
    is_cancelled: Callable[[], bool],
    result: Generated,
) -> None:
    """Run the model in this thread. ``result`` fills as it goes, so that what was written survives an error.

    Args:
        ids: (1, tokens) the encoded prompt.
        on_text: called with each new piece of text.

    Raises:
        ConfigError: the prompt is longer than the context.
        Whatever the experts raise (``NoPeerCouldServe``, ``Stopped``).
    """
    prompt_tokens = ids.shape[1]
    room = check_length(model, prompt_tokens, prompt.max_tokens, model_name)
    stream = TextStream(tokenizer, prompt.stop, on_text, prompt_tokens)
    processors = LogitsProcessorList()
    if prompt.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(prompt.temperature)))
        top_k = getattr(model.generation_config, "top_k", None)
        if top_k:
            processors.append(TopKLogitsWarper(top_k))
        if prompt.top_p < 1:
            processors.append(TopPLogitsWarper(prompt.top_p))
        processors.append(SampleOnce(prompt.seed))
    started = time.perf_counter()
    result.prompt_tokens = prompt_tokens
    try:
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([StopWhen(lambda: stream.stopped or is_cancelled())]),
                streamer=stream,
                pad_token_id=get_pad_token(model),
            )
    finally:
        now = time.perf_counter()
        result.text = stream.text
        result.token_ids = stream.token_ids
        result.seconds = now - started
        result.time_to_first_token_s = (stream.first_token_at or now) - started
        result.finish_reason = "length" if len(stream.token_ids) >= room and not stream.stopped else "stop"


def get_pad_token(model: Any) -> int:
    """Some token id for padding, which a batch of one never uses but ``generate`` warns about."""
    config = model.generation_config
    for value in (config.pad_token_id, config.eos_token_id, 0):
        if isinstance(value, list) and value:
            return value[0]
        if isinstance(value, int):
            return value
    return 0
