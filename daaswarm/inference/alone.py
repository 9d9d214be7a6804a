"""Answers of models whose rows can't share passes: transformers' own ``generate``, one answer in a thread of its own.

Sliding windows, recurrent states and models with inputs of their own are in good hands there; see
:func:`daaswarm.inference.batching.can_batch` for who goes where.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.streamers import BaseStreamer

from daaswarm.inference.batching import KEPT_BYTES, KEPT_TOKENS_MIN, get_common, has_plain_inputs
from daaswarm.inference.rope import has_changing_ropes
from daaswarm.inference.sequence import Sequence, get_generation_options, make_processors


class KeptCache:
    """The keys, values and states of the answer before, for the next turn of its conversation. Thread-safe."""

    def __init__(self, model: Any) -> None:
        # A model that prepares its inputs itself may keep more than its cache says; and where a token's place is
        # encoded by the text's length, the keys of a shorter text are others.
        self._is_possible = has_plain_inputs(model) and not has_changing_ropes(model)
        self._lock = threading.Lock()
        self._kept: tuple[list[int], Cache] | None = None

    def take(self, ids: list[int]) -> tuple[Cache | None, int]:
        """A cache that begins like ``ids``, and how many tokens it holds; ``None``: the model is to make its own."""
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is not None:
            seen, cache = kept
            common = min(get_common(seen, ids), len(ids) - 1)
            # Windows and recurrent states can't go back to an earlier token.
            can_crop = all(type(layer) is DynamicLayer for layer in cache.layers)
            if common >= KEPT_TOKENS_MIN and (common == len(seen) or can_crop):
                if common < len(seen):
                    cache.crop(common - len(seen))
                return cache, common
        return None, 0

    def clear(self) -> None:
        with self._lock:
            self._kept = None

    def put(self, ids: list[int], cache: Any) -> None:
        """Keep a cache that holds all of ``ids``, unless it is large; one of the model's own kind may keep more than
        can be seen.
        """
        if self._is_possible and type(cache) is DynamicCache and get_bytes(cache) <= KEPT_BYTES:
            with self._lock:
                self._kept = ids, cache


def get_bytes(cache: Cache) -> int:
    """What a cache's layers hold: keys and values, or states."""
    tensors = (value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor))
    return sum(tensor.nbytes for tensor in tensors)


class _Streamer(BaseStreamer):
    """Hands new tokens to the sequence."""

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence
        self._shows_prompt = True

    def put(self, value: Tensor) -> None:
        if self._shows_prompt:  # ``generate`` shows the prompt first
            self._shows_prompt = False
            return
        for token in value.reshape(-1).tolist():
            self._sequence.add(token)

    def end(self) -> None:
        """:func:`generate_alone` ends the sequence."""


class _StopWhen(StoppingCriteria):
    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._is_over(), dtype=torch.bool, device=input_ids.device)


def generate_alone(sequence: Sequence, kept: KeptCache) -> None:
    """Run a sequence to its end in this thread.

    Raises:
        Whatever the experts raise (``NoPeerCouldServe``, ``Stopped``); what was written stays in the sequence.
    """
    model, stream = sequence.model, sequence.stream
    prompt = torch.tensor([sequence.ids], device=model.device)
    cache, sequence.reused_tokens = kept.take(sequence.ids)
    reuse = {"past_key_values": cache} if cache is not None else {}
    is_over = _StopWhen(lambda: sequence.is_cancelled or (stream is not None and stream.stopped))
    with torch.inference_mode():
        made = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            logits_processor=make_processors(sequence),
            stopping_criteria=StoppingCriteriaList([is_over]),
            streamer=_Streamer(sequence),
            return_dict_in_generate=True,
            output_logits=sequence.keep_logits,
            **reuse,
            **get_generation_options(sequence),
        )
    if sequence.keep_logits:
        sequence.logits += [step.float() for step in made.logits]
    kept.put(sequence.ids[:-1], made.past_key_values)
    is_full = len(sequence.token_ids) >= sequence.room and not (stream is not None and stream.stopped)
    sequence.end("length" if is_full else "stop")
