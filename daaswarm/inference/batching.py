"""Several answers of one model at a time, a token each per forward pass (continuous batching).

Answers join when they come and leave when they end; nobody waits for the longest. A pass costs little more with ten
rows than with one, on this side and at the hosts, since both read each weight once. Life of an answer: it waits, its
prompt goes through the model (*prefill*), then it takes part in each *decode* pass until it ends.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

from daaswarm.errors import Busy
from daaswarm.inference.batch_cache import BatchCache
from daaswarm.inference.drafting import MOST, Drafts, PassTimes
from daaswarm.inference.plan import HostPlan
from daaswarm.inference.rope import has_changing_ropes
from daaswarm.inference.sequence import Chooser, Sequence
from daaswarm.inference.swarm_experts import Stopped, SwarmExperts
from daaswarm.inference.threads import ThreadChoice

ROWS = 16  # answers in one pass; more wait
WAITING = 64  # answers that may wait for a place
RETRY_AFTER_S = 5.0  # told to who finds no place even to wait
PREFILL_TOKENS = 256  # of prompts in one pass, and between two tokens of the answers under way ...
PREFILL_PASSES = 3  # ... in so many passes at most: over the network a pass of few tokens takes its time too
CACHE_BYTES = 1024 * 1024 * 1024  # of keys and values; who doesn't fit waits. One answer may always run
SPARE_TOKENS = 256  # that the rows can grow by before one that comes would have to leave again
KEPT_BYTES = 256 * 1024 * 1024  # keys and values of ended answers, for the next turns of their conversations
KEPT_TOKENS_MIN = 16  # a shorter common beginning isn't worth a copy


def can_batch(model: Any) -> bool:
    """Whether rows of different lengths can share this model's passes.

    They can where attention over all earlier tokens is the only thing that a token keeps: no sliding window, no
    recurrent state, no rotary frequencies that depend on the longest text.
    """
    config = model.config.get_text_config()
    if not has_plain_inputs(model) or has_changing_ropes(model):
        return False
    if not {"position_ids", "past_key_values", "logits_to_keep"} <= set(inspect.signature(model.forward).parameters):
        return False
    if config._attn_implementation != "sdpa":
        return False
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def has_plain_inputs(model: Any) -> bool:
    """Whether a pass takes tokens, places and a cache, and nothing that the model works out from them itself."""
    return type(model).prepare_inputs_for_generation is vars(GenerationMixin)["prepare_inputs_for_generation"]


@dataclass
class Place:
    """An answer in the batch.

    Attributes:
        number: those that came later have larger ones.
        was_sent_back: it had begun, and left its row to older answers.
        pieces: of its prompt that were read, counted from those of who had fewest when it came.
        drafts: guesses at its next tokens; ``None`` where they are switched off.
    """

    sequence: Sequence
    chooser: Chooser
    on_end: Callable[[], None]
    number: int
    was_sent_back: bool = False
    pieces: int = 0
    drafts: Drafts | None = None

    def draft(self, cost: float) -> list[int]:
        """Guesses at what follows its next token."""
        if self.drafts is None:
            return []
        return self.drafts.propose(self.sequence.room - len(self.sequence.token_ids), cost)


class Batch:
    """The answers of one trunk. :meth:`work` runs in a thread while there are any; the rest may be called from others.

    Args:
        model: the trunk. Its experts are :meth:`compute` in the thread that runs :meth:`work`.
        experts: asks the hosts.
    """

    def __init__(self, model: Any, experts: SwarmExperts) -> None:
        self._model = model
        self._device = model.device
        self._experts = experts
        self._plan: HostPlan | None = None  # newer than the experts'
        self._real: Tensor | None = None  # which rows of the pass are no padding; None: all
        self._threads: ThreadChoice | None = None
        self._times = PassTimes()
        self._waited_s = 0.0  # for hosts, in this pass
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._waiting: deque[Place] = deque()
        self._is_working = False
        self._passing: list[Sequence] = []  # the answers in the pass that is under way
        self._rows: list[Place] = []  # in the order of the cache's rows: first those that decode
        self._decoding = 0
        self._cache = BatchCache(len(DynamicCache(config=model.config.get_text_config()).layers), CACHE_BYTES)
        self._kept: OrderedDict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = OrderedDict()
        self._kept_bytes = 0
        self._must_forget = False

    def submit(self, sequence: Sequence, plan: HostPlan, on_end: Callable[[], None]) -> bool:
        """Have an answer made. ``True`` if the caller must now run :meth:`work` in a thread.

        Args:
            plan: the hosts as they are known now; the others' next passes use them too.
            on_end: called in that thread when the sequence has ended.

        Raises:
            Busy: too many wait already.
        """
        drafts = Drafts(sequence.ids) if sequence.sampling.prompt_lookup else None
        place = Place(sequence, Chooser(sequence), on_end, next(self._numbers), drafts=drafts)
        with self._lock:
            if len(self._waiting) >= WAITING:
                raise Busy(f"{len(self._waiting)} answers wait for their turn here", retry_after_s=RETRY_AFTER_S)
            self._waiting.append(place)
            self._plan = plan
            must_work, self._is_working = not self._is_working, True
        return must_work

    def cancel(self, sequence: Sequence) -> None:
        """Nobody waits for it any more. Calls under way end at once unless another answer needs them."""
        with self._lock:
            sequence.is_cancelled = True
            left = [place for place in self._waiting if place.sequence is sequence]
            for place in left:  # its place to wait is free at once
                self._waiting.remove(place)
            self._stop_if_unwanted()
        for place in left:
            place.sequence.end("cancelled", Stopped())
            place.on_end()

    def cancel_all(self) -> None:
        """The node is leaving."""
        with self._lock:
            for place in (*self._waiting, *self._rows):
                place.sequence.is_cancelled = True
            self._stop_if_unwanted()

    def _stop_if_unwanted(self) -> None:
        if self._passing and all(sequence.is_cancelled for sequence in self._passing):
            self._experts.cancel()

    def forget(self) -> None:
        """Keep nothing of ended answers."""
        with self._lock:
            self._must_forget = True

    def work(self) -> None:
        """Run passes until no answer is left."""
        try:
            with torch.inference_mode():
                read = passes = 0  # of prompts, since the answers under way had their turn
                while self._admit():
                    tokens = self._prefill()
                    read, passes = read + tokens, passes + 1
                    has_more = tokens and (self._waiting or self._decoding < len(self._rows))
                    if has_more and read < PREFILL_TOKENS and passes < PREFILL_PASSES:
                        continue  # who came during the pass first: a first token is waited for, the others are read
                    self._decode()
                    read = passes = 0
        except BaseException as error:  # a bug: nobody shall wait for ever
            self.end_all(error)
            raise

    def end_all(self, error: BaseException) -> None:
        """End whoever is left: :meth:`work` will not run, or not go on."""
        with self._lock:
            places = [*self._rows, *self._waiting]
            self._reset()
            self._waiting.clear()
        for place in places:
            place.sequence.end("error", error)
            place.on_end()

    def compute(self, layer: int, rows: Tensor, index: Tensor | None, weights: Tensor | None) -> Tensor:
        """``ExpertsFn`` of the trunk; padding isn't sent to hosts, and stays zero."""
        started = time.monotonic()
        real = self._real
        if real is None:
            out = self._experts(layer, rows, index, weights)
        else:
            out = torch.zeros_like(rows)
            out[real] = self._experts(
                layer, rows[real], None if index is None else index[real], None if weights is None else weights[real]
            )
        self._waited_s += time.monotonic() - started
        return out

    # -- coming and going ---------------------------------------------------------------------------------------

    def _admit(self) -> bool:
        self._drop_ended()
        with self._lock:
            cancelled = [place for place in self._waiting if place.sequence.is_cancelled]
            for place in cancelled:
                self._waiting.remove(place)
        for place in cancelled:
            place.sequence.end("cancelled", Stopped())
            place.on_end()
        with self._lock:
            while self._waiting and len(self._rows) < ROWS:
                longest = max(len(place.sequence.ids) for place in (self._waiting[0], *self._rows))
                if not self._cache.fits(len(self._rows) + 1, longest + SPARE_TOKENS):
                    break  # nobody goes before it, else it might wait for ever
                place = self._waiting.popleft()
                # Behind who has had fewest turns: those that come never hold up those that are here for ever.
                place.pieces = min((other.pieces for other in self._rows[self._decoding :]), default=0)
                self._rows.append(place)
            if not self._rows:
                self._reset()
                return False
            plan, self._plan = self._plan, None
            must_forget, self._must_forget = self._must_forget, False
        if must_forget:
            self._kept.clear()
            self._kept_bytes = 0
        if plan is not None:
            self._experts.use_plan(plan)
        while len(self._cache.lengths) < len(self._rows):
            row = self._cache.add()
            self._reuse(row, self._rows[row])
        return True

    def _reset(self) -> None:
        """Nothing to do for now: the memory goes back. Under the lock."""
        self._is_working = False
        self._rows = []
        self._decoding = 0
        self._cache.free()

    def _drop_ended(self) -> None:
        rows = len(self._rows)
        for row in reversed(range(rows)):
            place = self._rows[row]
            sequence = place.sequence
            if sequence.is_cancelled and not sequence.has_ended:
                sequence.end("cancelled", Stopped())
            if not sequence.has_ended:
                continue
            self._remove(row)
            place.on_end()
        if len(self._rows) < rows:
            self._cache.trim()

    def _send_back(self) -> None:
        """Should the rows have grown too large, the youngest answers wait once more, and others end in their memory."""
        longest = max((len(place.sequence.ids) for place in self._rows), default=0)
        while not self._cache.fits(len(self._rows), longest):
            row = max(range(len(self._rows)), key=lambda row: self._rows[row].number)
            place = self._rows[row]
            place.was_sent_back = True
            with self._lock:  # first: it can be cancelled any time
                self._waiting.appendleft(place)
            self._remove(row)

    def _remove(self, row: int) -> None:
        self._keep(row, self._rows[row].sequence)
        if row < self._decoding:
            self._decoding -= 1
            self._move(self._decoding, row)
            row = self._decoding
        self._move(len(self._rows) - 1, row)
        del self._rows[-1]
        self._cache.drop_last()

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self._rows[target] = self._rows[source]
            self._cache.move(source, target)

    def _keep(self, row: int, sequence: Sequence) -> None:
        """Keep a row's keys and values for the conversation's next turn."""
        length = self._cache.lengths[row]
        if length < KEPT_TOKENS_MIN:
            return
        size = length * self._cache.token_bytes
        key = tuple(sequence.ids[:length])
        if size > KEPT_BYTES or key in self._kept:
            return
        self._kept[key] = self._cache.copy_out(row)
        self._kept_bytes += size
        while self._kept_bytes > KEPT_BYTES:
            _, old = self._kept.popitem(last=False)
            self._kept_bytes -= sum(keys.nbytes + values.nbytes for keys, values in old)

    def _reuse(self, row: int, place: Place) -> None:
        """Begin a row with the longest beginning that an earlier answer, or one under way, shares with it."""
        sequence = place.sequence
        most = sequence.ids[:-1]  # the last token has to be seen, for its logits
        key = max(self._kept, key=lambda key: get_common(key, most), default=())
        count = get_common(key, most)
        for other in range(row):
            there = get_common(self._rows[other].sequence.ids[: self._cache.lengths[other]], most)
            if there > max(count, KEPT_TOKENS_MIN - 1):
                self._cache.move(other, row, there)
                key, count = (), there
        if count < KEPT_TOKENS_MIN:
            return
        if key:
            self._cache.copy_in(row, self._kept[key], count)
            self._kept.move_to_end(key)
        if not place.was_sent_back:
            sequence.reused_tokens = count

    # -- passes -------------------------------------------------------------------------------------------------

    def _prefill(self) -> int:
        """Take the next prompts, or the next piece of a long one, through the model; returns how many tokens. Long
        ones take turns.
        """
        waiting = range(self._decoding, len(self._rows))
        first = min(waiting, key=lambda row: self._rows[row].pieces, default=0)
        if waiting and self._rows[first].pieces < self._rows[self._decoding].pieces:
            self._rows[first], self._rows[self._decoding] = self._rows[self._decoding], self._rows[first]
            self._cache.swap(first, self._decoding)
        counts: list[int] = []
        for row in range(self._decoding, len(self._rows)):
            left = len(self._rows[row].sequence.ids) - self._cache.lengths[row]
            if counts and (len(counts) + 1) * max(*counts, left) > PREFILL_TOKENS:
                break
            counts.append(min(left, PREFILL_TOKENS))
        if not counts:
            return 0
        first = self._decoding
        ready = self._pass(first, counts)
        for i, logits in enumerate(ready):
            place = self._rows[first + i]
            if logits is not None and self._cache.lengths[first + i] == len(place.sequence.ids):
                self._advance(place, logits[-1])
                self._decoding += 1
        if self._decoding == first and first < len(self._rows):
            self._rows[first].pieces += 1
        return sum(counts)

    def _decode(self) -> None:
        """One more token for each answer whose prompt is through."""
        self._drop_ended()
        self._send_back()
        if not self._decoding:
            return
        rows = self._rows[: self._decoding]
        longest = max(len(place.sequence.ids) for place in rows)
        if self._cache.fits(len(self._rows), longest + MOST):
            guesses = [place.draft(self._times.cost) for place in rows]
        else:  # the memory is for what is known
            guesses = [[] for _ in rows]
        started = time.monotonic()
        ready = self._pass(0, [1 + len(guess) for guess in guesses], guesses)
        self._times.note(time.monotonic() - started, drafted=any(guesses))
        for row, (place, guess, logits) in enumerate(zip(rows, guesses, ready, strict=True)):
            if logits is not None:
                self._accept(row, place, guess, logits)

    def _accept(self, row: int, place: Place, guess: list[int], logits: Tensor) -> None:
        """Choose token by token, as if each had a pass of its own, for as long as the guess was right.

        Args:
            logits: (1 + guessed, vocabulary).
        """
        sequence, right = place.sequence, 0
        before = len(sequence.ids)
        for number, scores in enumerate(logits):
            self._advance(place, scores)
            if sequence.has_ended or number == len(guess) or sequence.ids[-1] != guess[number]:
                break
            right += 1
        if place.drafts is not None and guess:
            place.drafts.note(right)
            sequence.guessed_tokens += len(guess)
            sequence.right_tokens += right
            self._cache.cut(row, before + right)

    def _advance(self, place: Place, logits: Tensor) -> None:
        try:
            place.chooser.advance(logits)
        except Exception as error:  # noqa: BLE001 - a token that the tokenizer can't write costs its own answer only
            place.sequence.end("error", error)

    def _pass(self, first: int, counts: list[int], guesses: list[list[int]] | None = None) -> list[Tensor | None]:
        """The logits (1 + guessed, vocabulary) after each row's last tokens; ``None`` for an answer that has failed.

        Args:
            guesses: tokens behind each row's own, which ``counts`` counts too.
        """
        guesses = guesses or [[]] * len(counts)
        try:
            logits = self._forward(first, counts, guesses)
            self._cache.commit()
            return [each[len(each) - 1 - len(guess) :] for each, guess in zip(logits, guesses, strict=True)]
        except Stopped:
            return [None] * len(counts)
        except Exception as error:  # noqa: BLE001 - its asker gets it
            if len(counts) > 1:  # it concerns only those who fail by themselves, like those whose expert is missing
                return [self._pass(first + i, [count], guesses[i : i + 1])[0] for i, count in enumerate(counts)]
            self._rows[first].sequence.end("error", error)
        return [None] * len(counts)

    def _forward(self, first: int, counts: list[int], guesses: list[list[int]]) -> Tensor:
        """(rows, 1 + most guessed, vocabulary). Its tokens are not committed."""
        sequences = [place.sequence for place in self._rows[first : first + len(counts)]]
        mask = self._cache.select(first, counts)
        width = self._cache.width
        ids = torch.zeros((len(counts), width), dtype=torch.long)
        for i, (sequence, start, count) in enumerate(zip(sequences, self._cache.starts, counts, strict=True)):
            tokens = sequence.ids[start : start + count]
            ids[i, width - count :] = torch.tensor(tokens + guesses[i] if guesses[i] else tokens)
        with self._lock:
            if all(sequence.is_cancelled for sequence in sequences):
                raise Stopped
            self._passing = sequences
        try:
            real = torch.arange(width) >= width - torch.tensor(counts)[:, None]
            self._real = None if real.all() else real.reshape(-1).nonzero()[:, 0]
            with self._take_threads(sum(counts)):
                device = self._device
                out = self._model(
                    input_ids=ids.to(device),
                    attention_mask=None if mask is None else mask.to(device),
                    position_ids=self._cache.positions.to(device),
                    past_key_values=self._cache,
                    use_cache=True,
                    logits_to_keep=1 + max(map(len, guesses)),
                )
        finally:
            with self._lock:
                self._passing = []
                self._experts.stop.clear()
            hosts, retries = self._experts.take_use()
            audits = self._experts.take_audits()
            for sequence, count in zip(sequences, counts, strict=True):
                sequence.note_use(hosts, retries, count / sum(counts))
                sequence.audits.add(audits)
        return out.logits

    @contextlib.contextmanager
    def _take_threads(self, rows: int) -> Iterator[None]:
        """Run a pass with as many of torch's threads as it gains from."""
        choice = self._threads = self._threads or ThreadChoice(torch.get_num_threads())
        threads = choice.choose(rows)
        torch.set_num_threads(threads)
        self._waited_s, started = 0.0, time.monotonic()
        try:
            yield
        finally:
            torch.set_num_threads(choice.most)
        choice.note(rows, threads, time.monotonic() - started - self._waited_s)


def get_common(a: Iterable[int], b: Iterable[int]) -> int:
    """How many items two sequences have in common at their beginning."""
    count = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        count += 1
    return count
