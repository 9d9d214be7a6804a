"""Turns an answer's tokens into text as they come, without ever sending what the next token may still change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class TextStream:
    """Holds back an unfinished UTF-8 character, and what may be the beginning of a stop string.

    Args:
        stop: the answer ends before any of these.
        on_text: called with each new piece of text.
    """

    def __init__(self, tokenizer: Any, stop: list[str], on_text: Callable[[str], None]) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.stopped = False  # a stop string was written
        self._tokenizer = tokenizer
        self._stop = [s for s in stop if s]
        self._on_text = on_text
        self._pending = ""  # decoded, not yet passed on
        self._context_at = 0  # tokens from here give the next ones their context
        self._decoded_at = 0  # tokens before here are decoded

    def add(self, token: int) -> None:
        self.token_ids.append(token)
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
