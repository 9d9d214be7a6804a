"""Answers side by side and answers alone: both are what transformers' own ``generate`` gives."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch

from daaswarm.errors import Busy, ConfigError, NoPeerCouldServe, TooLarge
from daaswarm.inference import batch_cache, batching
from daaswarm.inference.alone import KeptCache, generate_alone
from daaswarm.inference.batch_cache import FIRST_TOKENS, BatchCache, RaggedLayer
from daaswarm.inference.batching import KEPT_TOKENS_MIN, Batch, can_batch, get_common
from daaswarm.inference.sequence import Sampling, Sequence
from daaswarm.inference.swarm_experts import Stopped
from daaswarm.inference.text_stream import TextStream
from daaswarm.inference.threads import TRIES
from daaswarm.inference.use import AuditUse
from daaswarm.testing.checkpoints import make_config, make_model
from tests.byte_tokenizer import make_tokenizer

TOKENIZER = make_tokenizer()
TOKENS = 12


class OwnExperts:
    """The model keeps its experts in these tests: nobody is asked."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.plans: list[Any] = []

    def cancel(self) -> None:
        self.stop.set()

    def use_plan(self, plan: Any) -> None:
        self.plans.append(plan)

    def take_audits(self) -> AuditUse:
        return AuditUse()

    def take_use(self) -> tuple[dict[Any, Any], int]:
        return {}, 0


def make(architecture: str, **changes: Any) -> Any:
    model = make_model(make_config(architecture, **changes))
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return make("llama", num_hidden_layers=2)


def make_ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def get_reference(model: Any, ids: list[int], tokens: int = TOKENS) -> list[int]:
    prompt = torch.tensor([ids])
    with torch.inference_mode():
        made = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
    return made[0, len(ids) :].tolist()


def make_batch(model: Any) -> Batch:
    return Batch(model, OwnExperts())  # type: ignore[arg-type]


def start(batch: Batch, model: Any, ids: list[int], **sampling: Any) -> Sequence:
    sequence = Sequence(model, "m", list(ids), Sampling(**{"max_tokens": TOKENS, **sampling}))
    batch.submit(sequence, None, lambda: None)  # type: ignore[arg-type]
    return sequence


def finish(batch: Batch) -> None:
    batch.work()
    assert not batch._rows and not batch._waiting and batch._cache.lengths == []


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("llama", True),
        ("olmoe", True),
        ("deepseek_v3", True),
        ("gpt_oss", False),
        ("lfm2_moe", False),
        ("minimax", False),
        ("granitemoehybrid", False),
    ],
)
def test_who_can_share_passes(architecture: str, expected: bool) -> None:
    model = make(architecture)
    assert can_batch(model) is expected
    lengths = [5, 40, 17, 2]
    wanted = [get_reference(model, make_ids(length)) for length in lengths]
    if expected:
        batch = make_batch(model)
        made = [start(batch, model, make_ids(length)) for length in lengths]
        finish(batch)
    else:
        made = [Sequence(model, "m", make_ids(length), Sampling(max_tokens=TOKENS)) for length in lengths]
        kept = KeptCache(model)
        for sequence in made:
            generate_alone(sequence, kept)
    assert [sequence.token_ids for sequence in made] == wanted
    assert all(s.error is None and s.finish_reason == "length" for s in made)


def test_changing_ropes_do_not_share_passes() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    assert not can_batch(make("llama", rope_parameters=rope))


def test_answers_join_and_leave(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "ROWS", 3)
    monkeypatch.setattr(batching, "PREFILL_TOKENS", 16)  # so that prompts go through in pieces
    lengths = [3, 50, 9, 16, 17, 1, 33, 8]
    tokens = [1, 12, 5, 2, 9, 12, 1, 3]
    batch = make_batch(model)
    made = [
        start(batch, model, make_ids(length, length), max_tokens=count)
        for length, count in zip(lengths, tokens, strict=True)
    ]
    finish(batch)
    for sequence, length, count in zip(made, lengths, tokens, strict=True):
        assert sequence.token_ids == get_reference(model, make_ids(length, length), count)


def test_texts_longer_than_the_first_room(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daaswarm.inference.batch_cache.FIRST_TOKENS", 4)
    batch = make_batch(model)
    batch._cache = BatchCache(2, batching.CACHE_BYTES)
    made = [start(batch, model, make_ids(length), max_tokens=20) for length in (3, 30)]
    finish(batch)
    assert [s.token_ids for s in made] == [get_reference(model, make_ids(length), 20) for length in (3, 30)]
    assert FIRST_TOKENS > 4


def test_the_next_turn_begins_where_the_last_one_ended(model: Any) -> None:
    batch = make_batch(model)
    first = start(batch, model, make_ids(30))
    finish(batch)
    again = first.ids + make_ids(7, 5)
    other = first.ids[:20] + make_ids(12, 9)
    stranger = make_ids(40, 3)
    made = [start(batch, model, ids) for ids in (again, other, stranger, make_ids(30))]
    finish(batch)
    assert [s.reused_tokens for s in made] == [30 + TOKENS - 1, 20, 0, 29]
    for sequence, ids in zip(made, (again, other, stranger, make_ids(30)), strict=True):
        assert sequence.token_ids == get_reference(model, ids)
    batch.forget()
    forgotten = start(batch, model, again)
    finish(batch)
    assert forgotten.reused_tokens == 0 and forgotten.token_ids == get_reference(model, again)


def test_an_answer_begins_with_what_one_under_way_has(model: Any) -> None:
    batch = make_batch(model)
    prompt = make_ids(40)
    made: list[Sequence] = []

    class Stream(TextStream):
        def add(self, token: int) -> None:
            super().add(token)
            if len(self.token_ids) == 2:
                made.append(start(batch, model, [*prompt[:25], *make_ids(9, 4)]))

    first = Sequence(model, "m", list(prompt), Sampling(max_tokens=TOKENS), Stream(TOKENIZER, [], lambda piece: None))
    batch.submit(first, None, lambda: None)  # type: ignore[arg-type]
    finish(batch)
    assert first.token_ids == get_reference(model, prompt)
    assert made[0].reused_tokens == 25
    assert made[0].token_ids == get_reference(model, [*prompt[:25], *make_ids(9, 4)])


def test_numbers_that_are_none_stay_with_their_answer(model: Any) -> None:
    """One answer's keys become NaN, as they may in f16; who gets its place, and who shares its passes, is not hurt."""
    batch = make_batch(model)
    update = batch_cache.RaggedLayer.update

    def spoil(self: Any, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = update(self, key_states, value_states, *args, **kwargs)
        first = batch._rows[0].sequence
        if first.model_name == "spoiled" and self._cache.window.start == 0:
            keys[0], values[0] = float("nan"), float("nan")
        return keys, values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_cache.RaggedLayer, "update", spoil)
        spoiled = Sequence(model, "spoiled", make_ids(60), Sampling(max_tokens=3))
        batch.submit(spoiled, None, lambda: None)  # type: ignore[arg-type]
        other = start(batch, model, make_ids(9, 1), max_tokens=20)
        add = other.add

        def add_and_ask(token: int) -> None:
            add(token)
            if len(other.token_ids) == 6:  # the spoiled one has ended: its place is free
                late.append(start(batch, model, make_ids(70, 2)))  # longer: the other one looks behind its end

        late: list[Sequence] = []
        other.add = add_and_ask  # type: ignore[method-assign]
        finish(batch)
    assert other.token_ids == get_reference(model, make_ids(9, 1), 20)
    assert late[0].token_ids == get_reference(model, make_ids(70, 2))


def test_what_is_kept_is_bounded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(model)
    start(batch, model, make_ids(60))
    finish(batch)
    size = batch._kept_bytes
    monkeypatch.setattr(batching, "KEPT_BYTES", 3 * size)
    for seed in range(1, 8):
        start(batch, model, make_ids(60, seed))
        finish(batch)
    assert len(batch._kept) == 3 and batch._kept_bytes == 3 * size


def test_the_memory_of_ended_answers_goes_back_without_the_garbage_collector(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    initialize = RaggedLayer.lazy_initialization

    def remember(layer: RaggedLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
        initialize(layer, keys, values)
        assert layer.keys is not None and layer.values is not None
        made.extend((weakref.ref(layer.keys), weakref.ref(layer.values)))

    monkeypatch.setattr(RaggedLayer, "lazy_initialization", remember)
    batch = make_batch(model)
    gc.collect()
    gc.disable()
    try:
        start(batch, model, make_ids(20))
        finish(batch)
        assert made and all(tensor() is None for tensor in made)
    finally:
        gc.enable()


@pytest.mark.parametrize("architecture", ["llama", "lfm2_moe", "gpt_oss"])
def test_the_next_turn_alone(architecture: str) -> None:
    model = make(architecture)
    kept = KeptCache(model)
    first = Sequence(model, "m", make_ids(30), Sampling(max_tokens=TOKENS))
    generate_alone(first, kept)
    again = Sequence(model, "m", first.ids + make_ids(7, 5), Sampling(max_tokens=TOKENS))
    wanted = get_reference(model, again.ids)
    generate_alone(again, kept)
    assert again.token_ids == wanted
    assert again.reused_tokens in (0, 30 + TOKENS - 1)
    if architecture == "llama":
        assert again.reused_tokens > KEPT_TOKENS_MIN


def test_a_cancelled_answer_leaves_the_others(model: Any) -> None:
    batch = make_batch(model)
    wanted = get_reference(model, make_ids(9), 20)
    seen: list[str] = []
    stream = TextStream(TOKENIZER, [], seen.append)
    leaving = Sequence(model, "m", make_ids(5), Sampling(max_tokens=100), stream)
    add = stream.add

    def add_and_leave(token: int) -> None:
        add(token)
        if len(stream.token_ids) == 3:
            batch.cancel(leaving)

    stream.add = add_and_leave  # type: ignore[method-assign]
    batch.submit(leaving, None, lambda: None)  # type: ignore[arg-type]
    staying = start(batch, model, make_ids(9), max_tokens=20)
    finish(batch)
    assert staying.token_ids == wanted and staying.error is None
    assert len(leaving.token_ids) == 3 and isinstance(leaving.error, Stopped)


def test_an_error_costs_the_answers_that_need_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(model)
    wanted = get_reference(model, make_ids(9))
    forward = batch._model.forward

    def fail_for_the_first(**kwargs: Any) -> Any:
        if (kwargs["input_ids"] == 510).any():
            raise NoPeerCouldServe("nobody has its expert")
        return forward(**kwargs)

    unlucky_ids = [*make_ids(5), 510]
    monkeypatch.setattr(model, "forward", fail_for_the_first)
    unlucky, lucky = start(batch, model, unlucky_ids), start(batch, model, make_ids(9))
    finish(batch)
    assert isinstance(unlucky.error, NoPeerCouldServe) and unlucky.token_ids == []
    assert lucky.error is None and lucky.token_ids == wanted


def test_any_error_costs_the_answers_that_fail_alone_too(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(model)
    forward = batch._model.forward

    def fail_for_long_ones(**kwargs: Any) -> Any:
        if (kwargs["position_ids"] > 30).any():
            raise TooLarge("rows over a limit")
        return forward(**kwargs)

    monkeypatch.setattr(model, "forward", fail_for_long_ones)
    long, short = start(batch, model, make_ids(25), max_tokens=20), start(batch, model, make_ids(5))
    finish(batch)
    assert isinstance(long.error, TooLarge) and len(long.token_ids) == 7
    monkeypatch.undo()
    assert short.error is None and short.token_ids == get_reference(model, make_ids(5))


def test_long_prompts_take_turns(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "PREFILL_TOKENS", 16)
    batch = make_batch(model)
    lengths = [100, 5, 80, 7]
    start(batch, model, make_ids(3), max_tokens=1)  # the cache's size is known then
    batch.work()
    made = [start(batch, model, make_ids(length, length)) for length in lengths]
    finish(batch)
    for sequence, length in zip(made, lengths, strict=True):
        assert sequence.token_ids == get_reference(model, make_ids(length, length))
    ends = [s.ended_at for s in made]
    assert max(ends[1], ends[3]) < min(ends[0], ends[2])  # type: ignore[type-var]
    assert max(s.first_token_at or 0 for s in (made[1], made[3])) < (made[2].first_token_at or 0)


def test_each_long_prompt_has_its_turn(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "PREFILL_TOKENS", 16)
    batch = make_batch(model)
    start(batch, model, make_ids(3), max_tokens=1)
    batch.work()
    read: list[int] = []
    run = batch._pass

    def note(first: int, counts: list[int], *rest: Any) -> Any:
        if not rest:  # prompts: there are no guesses
            read.extend(batch._rows[first + i].number for i in range(len(counts)))
        return run(first, counts, *rest)

    monkeypatch.setattr(batch, "_pass", note)
    lengths = [150, 8, 151, 152]
    made = [start(batch, model, make_ids(length, length)) for length in lengths]
    finish(batch)
    assert sorted(read[:4]) == [1, 2, 3, 4]
    long = [number for number in read if number != 2][:24]
    for turn in range(3, len(long) + 1, 3):  # never more than a turn apart
        counts = [long[:turn].count(number) for number in (1, 3, 4)]
        assert max(counts) - min(counts) <= 1
    for sequence, length in zip(made, lengths, strict=True):
        assert sequence.token_ids == get_reference(model, make_ids(length, length))


def test_small_prompts_do_not_hold_answers_up(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(model)
    passes: list[bool] = []  # whether it was decoding
    run = batch._pass
    left = iter(range(30))

    def note(first: int, counts: list[int], *rest: Any) -> Any:
        passes.append(first == 0 and batch._decoding > 0)
        if next(left, None) is not None:  # one comes during each pass
            start(batch, model, make_ids(6, len(passes)), max_tokens=1)
        return run(first, counts, *rest)

    monkeypatch.setattr(batch, "_pass", note)
    start(batch, model, make_ids(9), max_tokens=20)
    finish(batch)
    pauses = "".join("d" if decoding else "p" for decoding in passes).split("d")
    assert max(map(len, pauses)) <= batching.PREFILL_PASSES


class TestMemory:
    """Keys and values of all rows stay within a bound."""

    @pytest.fixture
    def sizes(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """What the cache held after each pass (bytes)."""
        monkeypatch.setattr(batch_cache, "FIRST_TOKENS", 16)
        monkeypatch.setattr(batching, "SPARE_TOKENS", 8)
        sizes: list[int] = []
        commit = BatchCache.commit

        def note(cache: BatchCache) -> None:
            commit(cache)
            sizes.append(sum(t.nbytes for layer in cache._ragged for t in (layer.keys, layer.values)))  # type: ignore[union-attr]

        monkeypatch.setattr(BatchCache, "commit", note)
        return sizes

    @pytest.mark.parametrize("tokens", [1, 100, 200, 400])
    def test_answers_that_grow_too_large_wait(
        self, model: Any, sizes: list[int], tokens: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        heads, width = model.config.num_key_value_heads, model.config.head_dim
        limit = tokens * 2 * 2 * heads * width * 4  # two layers, keys and values, four bytes a number
        monkeypatch.setattr(batching, "CACHE_BYTES", limit)
        batch = make_batch(model)
        lengths = [3, 20, 9, 40, 12, 5]
        made = [start(batch, model, make_ids(length, length), max_tokens=40) for length in lengths]
        finish(batch)
        for sequence, length in zip(made, lengths, strict=True):
            assert sequence.error is None
            assert sequence.token_ids == get_reference(model, make_ids(length, length), 40)
            assert sequence.reused_tokens == 0
        alone = 2 * (max(lengths) + 40) * limit // tokens  # one answer may always run, with room to grow
        assert max(sizes) <= max(limit, alone)

    def test_near_the_bound_rows_are_not_copied_for_each_token(
        self, model: Any, sizes: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        heads, width = model.config.num_key_value_heads, model.config.head_dim
        monkeypatch.setattr(batching, "CACHE_BYTES", 4 * 120 * 2 * 2 * heads * width * 4)  # four rows of 120 tokens
        batch = make_batch(model)
        for seed in range(4):
            start(batch, model, make_ids(5, seed), max_tokens=100)
        finish(batch)
        assert len({size for size in sizes if size}) < 10

    def test_a_cancel_while_an_answer_is_sent_back(
        self, model: Any, sizes: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        heads, width = model.config.num_key_value_heads, model.config.head_dim
        monkeypatch.setattr(batching, "CACHE_BYTES", 3 * 40 * 2 * 2 * heads * width * 4)
        batch = make_batch(model)
        remove, sent = batch._remove, []

        def cancel_too(row: int) -> None:
            place = batch._rows[row]
            if place.was_sent_back and not sent:
                sent.append(place.sequence)
                batch.cancel(place.sequence)
            remove(row)

        monkeypatch.setattr(batch, "_remove", cancel_too)
        made = [start(batch, model, make_ids(9, seed), max_tokens=60) for seed in range(3)]
        finish(batch)
        assert len(sent) == 1 and isinstance(sent[0].error, Stopped)
        assert [s.error for s in made if s is not sent[0]] == [None, None]

    def test_the_room_of_a_long_answer_goes_back_when_it_ends(self, model: Any, sizes: list[int]) -> None:
        batch = make_batch(model)
        long = start(batch, model, make_ids(200), max_tokens=2)
        short = start(batch, model, make_ids(5), max_tokens=30)
        finish(batch)
        assert long.error is None and short.token_ids == get_reference(model, make_ids(5), 30)
        assert sizes[-1] * 5 < max(sizes)

    def test_a_layer_without_memory_changes_nothing(
        self, model: Any, sizes: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batch = make_batch(model)
        resize = RaggedLayer.resize
        calls: list[RaggedLayer] = []

        def fail_for_the_second_layer_once(layer: RaggedLayer, rows: int, room: int) -> None:
            if room > 100:
                calls.append(layer)
                if len(calls) == 2:
                    raise MemoryError
            resize(layer, rows, room)

        monkeypatch.setattr(RaggedLayer, "resize", fail_for_the_second_layer_once)
        made = [start(batch, model, make_ids(length), max_tokens=60) for length in (9, 80)]
        finish(batch)
        assert len(calls) >= 4
        for sequence, length in zip(made, (9, 80), strict=True):
            assert sequence.error is None and sequence.token_ids == get_reference(model, make_ids(length), 60)


def test_a_large_cache_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    for limit, reused in ((batching.KEPT_BYTES, 30 + TOKENS - 1), (1000, 0)):
        monkeypatch.setattr("daaswarm.inference.alone.KEPT_BYTES", limit)
        kept = KeptCache(model)
        first = Sequence(model, "m", make_ids(30), Sampling(max_tokens=TOKENS))
        generate_alone(first, kept)
        again = Sequence(model, "m", [*first.ids, 5], Sampling(max_tokens=TOKENS))
        generate_alone(again, kept)
        assert again.reused_tokens == reused


def test_a_bug_leaves_nobody_waiting(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(model)
    ended: list[int] = []
    sequence = Sequence(model, "m", make_ids(5), Sampling())
    batch.submit(sequence, None, lambda: ended.append(1))  # type: ignore[arg-type]

    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(batch, "_prefill", fail)
    with pytest.raises(ZeroDivisionError):
        batch.work()
    assert ended == [1] and isinstance(sequence.error, ZeroDivisionError)
    monkeypatch.undo()
    fine = start(batch, model, make_ids(5))
    finish(batch)
    assert fine.error is None


def test_too_many_are_told_to_come_later(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "WAITING", 2)
    batch = make_batch(model)
    made = [start(batch, model, make_ids(5)) for _ in range(2)]
    with pytest.raises(Busy) as info:
        start(batch, model, make_ids(5))
    assert info.value.retry_after_s > 0
    finish(batch)
    assert all(s.has_ended for s in made)


def test_who_leaves_the_queue_makes_room(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "WAITING", 2)
    batch = make_batch(model)
    made = [start(batch, model, make_ids(5)) for _ in range(2)]
    batch.cancel(made[0])
    assert isinstance(made[0].error, Stopped)
    other = start(batch, model, make_ids(5))
    finish(batch)
    assert made[0].token_ids == [] and other.error is None and made[1].error is None


def test_threads_are_tried_on_short_passes_and_given_back(model: Any) -> None:
    before = torch.get_num_threads()
    taken: list[tuple[int, int]] = []  # tokens of a pass, threads
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: taken.append((kwargs["input_ids"].numel(), torch.get_num_threads())),
        with_kwargs=True,
    )
    try:
        torch.set_num_threads(2)
        batch = make_batch(model)
        start(batch, model, make_ids(9), prompt_lookup=False)
        finish(batch)
        assert torch.get_num_threads() == 2
    finally:
        hook.remove()
        torch.set_num_threads(before)
    assert taken[0] == (9, 2)
    assert [threads for _, threads in taken[1 : 2 * TRIES + 1]] == [1, 2] * TRIES
    assert len({threads for _, threads in taken[2 * TRIES + 1 :]}) == 1


def test_padding_is_not_sent_to_hosts(model: Any) -> None:
    batch = make_batch(model)
    seen: list[int] = []

    def experts(layer: int, rows: torch.Tensor, index: Any, weights: Any) -> torch.Tensor:
        seen.append(len(rows))
        return rows * 2

    batch._experts = experts  # type: ignore[assignment]
    rows = torch.randn(6, 4)
    batch._real = torch.tensor([0, 2, 5])
    out = batch.compute(0, rows, None, None)
    assert seen == [3] and torch.equal(out[[0, 2, 5]], rows[[0, 2, 5]] * 2) and not out[[1, 3, 4]].any()
    batch._real = None
    assert torch.equal(batch.compute(0, rows, None, None), rows * 2)


@pytest.mark.parametrize(
    ("a", "b", "expected"), [((), [], 0), ((1, 2), [1, 2, 3], 2), ((1, 2), [1, 3], 1), ((4,), [5], 0)]
)
def test_get_common(a: tuple[int, ...], b: list[int], expected: int) -> None:
    assert get_common(a, b) == expected


# -- one answer ---------------------------------------------------------------------------------------------------


def answer(model: Any, text: str = "Hello", *, stop: list[str] | None = None, **sampling: Any) -> Sequence:
    batch = make_batch(model)
    seen: list[str] = []
    stream = TextStream(TOKENIZER, stop or [], seen.append)
    ids = TOKENIZER(text)["input_ids"]
    sequence = Sequence(model, "m", ids, Sampling(**{"max_tokens": 20, **sampling}), stream)
    batch.submit(sequence, None, lambda: None)  # type: ignore[arg-type]
    finish(batch)
    assert sequence.text == "".join(seen)
    return sequence


def test_text_and_figures(model: Any) -> None:
    made = answer(model)
    assert made.token_ids == get_reference(model, TOKENIZER("Hello")["input_ids"], 20)
    assert made.text == TOKENIZER.decode(made.token_ids, skip_special_tokens=True)
    assert (made.prompt_tokens, made.finish_reason) == (5, "length")
    assert made.first_token_at is not None and 0 < made.first_token_at - made.started_at <= made.seconds


def test_a_seed_repeats_an_answer(model: Any) -> None:
    first = answer(model, temperature=1.5, seed=11)
    assert answer(model, temperature=1.5, seed=11).token_ids == first.token_ids
    assert answer(model, temperature=1.5, seed=12).token_ids != first.token_ids
    assert answer(model, temperature=1.5, top_p=1e-6, seed=12).token_ids == answer(model).token_ids


def test_top_p_draws_from_the_nucleus_only(model: Any) -> None:
    ids = torch.tensor([TOKENIZER("Hello")["input_ids"]])
    with torch.inference_mode():
        probabilities = model(ids).logits[0, -1].softmax(-1).sort(descending=True)
    nucleus = set(probabilities.indices[: int((probabilities.values.cumsum(0) < 0.1).sum()) + 1].tolist())
    drawn = {answer(model, temperature=1.0, top_p=0.1, seed=seed, max_tokens=1).token_ids[0] for seed in range(40)}
    assert drawn <= nucleus and len(drawn) > 1


def test_a_stop_string_ends_the_answer(model: Any) -> None:
    whole = answer(model)
    stop = whole.text[6:9]
    made = answer(model, stop=[stop])
    assert made.text == whole.text[: whole.text.index(stop)]
    assert made.finish_reason == "stop" and len(made.token_ids) < 20


def test_the_end_token_ends_the_answer(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    third = answer(model).token_ids[2]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [third, 511])
    made = answer(model)
    assert made.token_ids.index(third) == len(made.token_ids) - 1 <= 2 and made.finish_reason == "stop"
    assert len(answer(model, min_tokens=9).token_ids) >= 9


def test_what_the_generation_config_asks_for_is_done(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 5.0)
    made = answer(model)
    monkeypatch.undo()
    prompt = torch.tensor([TOKENIZER("Hello")["input_ids"]])
    with torch.inference_mode():
        wanted = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, repetition_penalty=5.0
        )
    assert made.token_ids == wanted[0, 5:].tolist() != answer(model).token_ids


def test_the_context_is_a_limit(model: Any) -> None:
    assert len(answer(model, "x" * 250).token_ids) == 6
    with pytest.raises(ConfigError, match="256 tokens"):
        answer(model, "x" * 256)
