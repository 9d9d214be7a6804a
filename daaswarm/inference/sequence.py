"""One answer in the making: its tokens so far, how the next one is chosen, and when it ends."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from daaswarm.errors import ConfigError
from daaswarm.inference.text_stream import TextStream
from daaswarm.inference.use import AuditUse, HostUse
from daaswarm.types import PeerId


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn.

    Attributes:
        temperature: 0 is greedy.
        min_tokens: the answer doesn't end by itself before.
        prompt_lookup: guess at tokens, where that is measured to be faster. The answer is the same.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    prompt_lookup: bool = True


class SampleOnce(LogitsProcessor):
    """Draws each token by the Gumbel-max trick with a generator of its own, so that a seed means the same in every
    thread and batch: the largest of log p + Gumbel noise is a draw from p. The maximum is then just taken.
    """

    def __init__(self, seed: int | None) -> None:
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.rand(scores.shape, generator=self._generator, dtype=torch.float64)
        gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
        return torch.log_softmax(scores.double(), dim=-1) + gumbel.to(scores.device)


@dataclass(eq=False)
class Sequence:
    """Args:

    model: the trunk; its generation config says what ends an answer and what else steers it.
    ids: the prompt's tokens; the answer's are appended.
    stream: turns tokens into text; ``None`` where nobody reads it.
    keep_logits: note the logits of each step, for comparisons.

    Raises:
        ConfigError: the prompt alone fills the model's context.
    """

    model: Any
    model_name: str
    ids: list[int]
    sampling: Sampling
    stream: TextStream | None = None
    keep_logits: bool = False
    logits: list[Tensor] = field(default_factory=list)  # (1, vocabulary) f32 each
    hosts: dict[PeerId, HostUse] = field(default_factory=dict)  # who computed it
    retries: int = 0
    audits: AuditUse = field(default_factory=AuditUse)  # of its calls, those that it shared with others included
    is_cancelled: bool = False
    error: BaseException | None = None
    finish_reason: str = "stop"
    guessed_tokens: int = 0  # by prompt lookup
    right_tokens: int = 0  # of these
    reused_tokens: int = 0  # of the prompt, whose keys and values were there from an earlier answer

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.ids)
        self.room = get_room(self.model, self.prompt_tokens, self.sampling.max_tokens, self.model_name)
        self.started_at = time.perf_counter()
        self.first_token_at: float | None = None
        self.ended_at: float | None = None

    @property
    def token_ids(self) -> list[int]:
        """The answer's tokens."""
        return self.ids[self.prompt_tokens :]

    @property
    def text(self) -> str:
        return self.stream.text if self.stream is not None else ""

    @property
    def seconds(self) -> float:
        """From asking to the end."""
        assert self.ended_at is not None
        return self.ended_at - self.started_at

    @property
    def has_ended(self) -> bool:
        return self.ended_at is not None

    def add(self, token: int) -> None:
        """Append a token of the answer; its text goes out."""
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        self.ids.append(token)
        if self.stream is not None:
            self.stream.add(token)

    def end(self, finish_reason: str = "stop", error: BaseException | None = None) -> None:
        """No more tokens come."""
        if self.stream is not None and error is None:
            self.stream.end()
        self.finish_reason = finish_reason
        self.error = error
        self.ended_at = time.perf_counter()

    def note_use(self, hosts: dict[PeerId, HostUse], retries: int, share: float) -> None:
        """Count what hosts did in a pass of which ``share`` was this answer's."""
        self.retries += retries
        for peer, use in hosts.items():
            self.hosts.setdefault(peer, HostUse()).add(use, share)


class Chooser:
    """Chooses the tokens of a :class:`Sequence` as transformers' ``generate`` would."""

    def __init__(self, sequence: Sequence) -> None:
        model = sequence.model
        config, _ = model._prepare_generation_config(None, **get_generation_options(sequence))
        model._prepare_special_tokens(config, True, device=model.device)
        self._sequence = sequence
        self._processors: LogitsProcessorList = model._get_logits_processor(
            config,
            input_ids_seq_length=sequence.prompt_tokens,
            logits_processor=make_processors(sequence),
            device=model.device,
        )
        ends = config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        self._ends = frozenset(ends)

    def advance(self, logits: Tensor) -> None:
        """Append the next token.

        Args:
            logits: (vocabulary,) of the last token.
        """
        sequence = self._sequence
        scores = logits[None].float()
        if sequence.keep_logits:
            sequence.logits.append(scores)
        if self._processors:
            scores = self._processors(cast(Any, torch.tensor([sequence.ids], device=scores.device)), scores.clone())
        token = int(scores.argmax(dim=-1))
        sequence.add(token)
        if token in self._ends or (sequence.stream is not None and sequence.stream.stopped):
            sequence.end()
        elif len(sequence.ids) - sequence.prompt_tokens >= sequence.room:
            sequence.end("length")


def make_processors(sequence: Sequence) -> LogitsProcessorList:
    """What the asker's sampling does to the logits, in transformers' order."""
    sampling = sequence.sampling
    processors = LogitsProcessorList()
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        top_k = getattr(sequence.model.generation_config, "top_k", None)
        if top_k:
            processors.append(TopKLogitsWarper(top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        processors.append(SampleOnce(sampling.seed))
    return processors


def get_generation_options(sequence: Sequence) -> dict[str, Any]:
    """Arguments of ``generate``: greedy as far as it knows, since :class:`SampleOnce` draws."""
    return {
        "max_new_tokens": sequence.room,
        "min_new_tokens": sequence.sampling.min_tokens or None,
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "pad_token_id": get_pad_token(sequence.model),
    }


def get_context(model: Any) -> int | None:
    """Longest text the model was made for, in tokens; ``None`` if it has no such limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def get_room(model: Any, prompt_tokens: int, max_tokens: int, model_name: str) -> int:
    """How many tokens may be generated.

    Raises:
        ConfigError: the prompt alone fills the context.
    """
    context = get_context(model)
    if context is None:
        return max_tokens
    check_fits(prompt_tokens, context, model_name)
    return min(max_tokens, context - prompt_tokens)


def check_fits(prompt_tokens: int, context: int, model_name: str) -> None:
    """Raises:
    ConfigError: the prompt alone fills the model's context.
    """
    if prompt_tokens >= context:
        raise ConfigError(
            f"the prompt has {prompt_tokens} tokens; {model_name} takes {context} with the answer",
            hint="shorten the prompt",
        )


def get_pad_token(model: Any) -> int:
    """Some token id for padding, which nothing here uses but ``generate`` warns about."""
    config = model.generation_config
    for value in (config.pad_token_id, config.eos_token_id, 0):
        if isinstance(value, list) and value:
            return value[0]
        if isinstance(value, int):
            return value
    return 0
