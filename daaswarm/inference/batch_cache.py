"""Keys and values of several answers side by side, so that one forward pass advances them all.

transformers' dynamic cache joins tensors at every token and keeps all rows at one length. Here each row has its own
length, tokens are written in place, and a pass sees a run of neighbouring rows as a view: nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

FIRST_TOKENS = 256  # of room in each row at first; it doubles, so that a row is copied a few times, not once a token
SPARE = 4  # times the room needed: more goes back when answers leave


class RaggedLayer(DynamicLayer):
    """One layer's keys and values: tensors of (rows, heads, room, head width)."""

    def __init__(self, cache: BatchCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros, since what a row hasn't written yet is multiplied by zero attention, which NaN would survive.
        shape = (self._cache.rows, key_states.shape[1], self._cache.room)
        self.keys = key_states.new_zeros((*shape, key_states.shape[3]))
        self.values = value_states.new_zeros((*shape, value_states.shape[3]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the selected rows' new tokens; returns these rows up to the end of the longest."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self._cache
        assert self.keys is not None and self.values is not None
        keys, values = self.keys[cache.window], self.values[cache.window]
        for row, (start, count) in enumerate(zip(cache.starts, cache.counts, strict=True)):
            keys[row, :, start : start + count] = key_states[row, :, -count:]
            values[row, :, start : start + count] = value_states[row, :, -count:]
        return keys[:, :, : cache.longest], values[:, :, : cache.longest]

    def get_seq_length(self) -> int:
        return self._cache.longest - self._cache.width

    def resize(self, rows: int, room: int) -> None:
        """May fail for want of memory, and be asked again then: what is of that size already stays."""
        for name in ("keys", "values"):
            old: Tensor | None = getattr(self, name)
            if old is None or (old.shape[0], old.shape[2]) == (rows, room):
                continue
            new = old.new_zeros((rows, old.shape[1], room, old.shape[3]))
            r, t = min(rows, old.shape[0]), min(room, old.shape[2])
            new[:r, :, :t] = old[:r, :, :t]
            setattr(self, name, new)

    @property
    def token_bytes(self) -> int:
        """Of a token's keys and values; 0 before the first pass."""
        tensors = (self.keys, self.values) if self.is_initialized else ()
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in tensors if t is not None)


class BatchCache(Cache):
    """Args:

    layers: attention layers of the model.
    max_bytes: of keys and values, which :meth:`fits` goes by; known after the first pass.

    A pass is announced with :meth:`select`, and what it wrote is kept with :meth:`commit`; without that the next pass
    overwrites it, so a pass that failed can be done again.
    """

    def __init__(self, layers: int, max_bytes: int) -> None:
        self.rows = 1
        self.room = FIRST_TOKENS
        self._max_bytes = max_bytes
        self.token_bytes = 0  # of a token's keys and values in all layers; 0 before the first pass
        self.lengths: list[int] = []  # tokens of each row in use
        self._written: list[int] = []  # of each row, by passes that failed too
        self.window = slice(0, 0)  # rows of the pass
        self.starts: list[int] = []
        self.counts: list[int] = []
        self.width = 0  # tokens that the pass brings, at most
        self.longest = 0
        self.positions = torch.zeros((0, 0), dtype=torch.long)  # (rows, width): places in their texts; 0 for padding
        self._ragged = [RaggedLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self._ragged))

    def fits(self, rows: int, tokens: int) -> bool:
        """Whether so many rows of at most so many tokens may be held: one always may, others once their size is
        known. Rows are as long as the longest.
        """
        if rows <= 1:
            return True
        return self.token_bytes > 0 and rows * max(tokens, FIRST_TOKENS) * self.token_bytes <= self._max_bytes

    def add(self) -> int:
        """A new, empty row behind the others."""
        if len(self.lengths) == self.rows:
            self._grow(self.rows + 1, 0)
        self.lengths.append(0)
        self._written.append(0)
        return len(self.lengths) - 1

    def select(self, first: int, counts: list[int]) -> Tensor | None:
        """The next pass brings ``counts[i]`` tokens, aligned to the right, for row ``first + i``.

        Returns:
            (rows, 1, width, longest) bool, true where a token may look; ``None`` where plain causal attention is it.
        """
        self.window = slice(first, first + len(counts))
        self.starts, self.counts = self.lengths[self.window], counts
        self.width = max(counts)
        self.longest = max(s + c for s, c in zip(self.starts, counts, strict=True))
        if self.longest > self.room:
            self._grow(len(self.lengths), self.longest)
        for i, (start, count) in enumerate(zip(self.starts, counts, strict=True), first):
            self._written[i] = max(self._written[i], start + count)
        ends = torch.tensor([s + c for s, c in zip(self.starts, counts, strict=True)])
        # Padding is before the start.
        self.positions = (ends[:, None] - self.width + torch.arange(self.width)).clamp(min=0)
        is_even = len(set(self.starts)) == 1 and len(set(counts)) == 1
        if is_even and (self.width == 1 or self.starts[0] == 0):
            return None
        return (torch.arange(self.longest) <= self.positions[..., None])[:, None]

    def commit(self) -> None:
        """Keep what the pass wrote."""
        for i, count in enumerate(self.counts):
            self.lengths[self.window.start + i] += count
        self.token_bytes = self.token_bytes or sum(layer.token_bytes for layer in self._ragged)

    def cut(self, row: int, tokens: int) -> None:
        """Forget what a row has behind its first ``tokens``."""
        if tokens < self.lengths[row]:
            self.lengths[row] = tokens
            self._wipe(row, tokens)

    def move(self, source: int, target: int, tokens: int | None = None) -> None:
        """Put one row, or its first ``tokens``, where another was."""
        length = self.lengths[target] = self.lengths[source] if tokens is None else tokens
        for layer in self._ragged:
            if layer.is_initialized:
                assert layer.keys is not None and layer.values is not None
                layer.keys[target, :, :length] = layer.keys[source, :, :length]
                layer.values[target, :, :length] = layer.values[source, :, :length]
        self._wipe(target, length)

    def swap(self, a: int, b: int) -> None:
        """Have two rows change places."""
        both, other = [a, b], [b, a]
        end = max(self._written[a], self._written[b])
        for layer in self._ragged:
            if layer.is_initialized:
                assert layer.keys is not None and layer.values is not None
                layer.keys[both, :, :end] = layer.keys[other, :, :end]
                layer.values[both, :, :end] = layer.values[other, :, :end]
        for numbers in (self.lengths, self._written):
            numbers[a], numbers[b] = numbers[b], numbers[a]

    def drop_last(self) -> None:
        self._wipe(len(self.lengths) - 1, 0)
        del self.lengths[-1], self._written[-1]

    def trim(self) -> None:
        """Give back what the rows that left had needed, if it is most of the memory."""
        rows, room = max(len(self.lengths), 1), max(FIRST_TOKENS, *self._written, 0)
        if SPARE * rows * room <= self.rows * self.room:
            self._resize(rows, room)

    def _wipe(self, row: int, length: int) -> None:
        """Forget what lies behind a row's end: a NaN there would survive attention of zero."""
        for layer in self._ragged:
            if layer.is_initialized:
                assert layer.keys is not None and layer.values is not None
                layer.keys[row, :, length : self._written[row]] = 0
                layer.values[row, :, length : self._written[row]] = 0
        self._written[row] = length

    def copy_out(self, row: int) -> list[tuple[Tensor, Tensor]]:
        """A row's keys and values, each (heads, tokens, head width), by layer; none before the first pass."""
        length = self.lengths[row]
        return [
            (layer.keys[row, :, :length].clone(), layer.values[row, :, :length].clone())
            for layer in self._ragged
            if layer.is_initialized and layer.keys is not None and layer.values is not None
        ]

    def copy_in(self, row: int, kept: list[tuple[Tensor, Tensor]], tokens: int) -> None:
        """Begin a row with the first ``tokens`` of what :meth:`copy_out` gave."""
        if tokens > self.room:
            self._grow(len(self.lengths), tokens)
        for layer, (keys, values) in zip(self._ragged, kept, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None], values[None])
            assert layer.keys is not None and layer.values is not None
            layer.keys[row, :, :tokens] = keys[:, :tokens]
            layer.values[row, :, :tokens] = values[:, :tokens]
        self.lengths[row] = self._written[row] = tokens

    def free(self) -> None:
        """Drop all rows and give the memory back now. Cache and layers refer to each other, and the garbage collector,
        which counts objects and not bytes, lets such a circle lie for hundreds of answers.
        """
        self.lengths, self._written = [], []
        self.rows, self.room = 1, FIRST_TOKENS
        for layer in self._ragged:
            layer.keys = layer.values = None
            layer.is_initialized = False

    def _grow(self, rows: int, tokens: int) -> None:
        """Make room for at least so much, and twice what there is, or as many tokens as may be held. Rows that aren't
        needed go where there is too little for both.
        """
        tokens = max(FIRST_TOKENS, tokens, *self._written, 0)
        more_rows = 2 * self.rows if rows > self.rows else self.rows
        more_tokens = max(tokens, 2 * self.room) if tokens > self.room else self.room
        if not self.fits(more_rows, more_tokens):
            most = self._max_bytes // (rows * self.token_bytes) if self.token_bytes else tokens
            more_rows, more_tokens = rows, max(tokens, min(more_tokens, most))
        self._resize(more_rows, more_tokens)

    def _resize(self, rows: int, room: int) -> None:
        # Should a layer find no memory, those that did are larger than they have to be, which does no harm.
        self.rows, self.room = min(self.rows, rows), min(self.room, room)
        for layer in self._ragged:
            layer.resize(rows, room)
        self.rows, self.room = rows, room
