"""Guesses at the next tokens: where they come from, when they are worth it, and that the answer stays the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from daaswarm.inference.drafting import FEW, MOST, NGRAMS, RETRY_TOKENS, Drafts, Lookup, PassTimes
from tests.inference.test_batching import finish, get_reference, make, make_batch, start


def find_slowly(ids: list[int], most: int) -> list[int]:
    for n in NGRAMS:
        for place in range(len(ids) - 1, n - 1, -1):
            if len(ids) > n and ids[place - n : place] == ids[-n:]:
                follows = ids[place:]
                return (follows * most)[:most]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=10), st.integers(1, 9))
def test_what_followed_the_last_tokens_where_they_stood_last(ids: list[int], more: list[int], most: int) -> None:
    text = list(ids)
    lookup = Lookup(text)
    assert lookup.propose(most) == find_slowly(text, most)
    for token in more:
        text.append(token)
        assert lookup.propose(most) == find_slowly(text, most)


def test_nothing_where_a_text_is_new() -> None:
    assert Lookup(list(range(50))).propose(5) == []
    assert Lookup([]).propose(5) == []


def test_wrong_guesses_end_where_they_cost_something_and_are_tried_again() -> None:
    text = [1, 2, 3] * 4
    drafts = Drafts(text)
    tries = 0
    while drafts.propose(100, 1.2):
        drafts.note(0)
        tries += 1
    assert 0 < tries < 15
    assert not drafts.propose(100, 1.2)
    text += [1, 2, 3] * (RETRY_TOKENS // 3 + 1)
    assert len(drafts.propose(100, 1.2)) == FEW
    drafts.note(FEW)
    drafts.note(FEW)
    assert len(drafts.propose(100, 1.2)) == MOST


def test_the_answers_end_is_not_guessed_beyond() -> None:
    drafts = Drafts([1, 2, 3] * 9)
    assert drafts.propose(1, 1.0) == [] and len(drafts.propose(3, 1.0)) == 2


def test_costs_are_measured() -> None:
    times = PassTimes()
    assert times.cost == 1
    times.note(0.1, drafted=False)
    assert times.cost == 1
    times.note(0.15, drafted=True)
    assert times.cost == pytest.approx(1.5)
    for _ in range(50):
        times.note(0.3, drafted=True)
    assert times.cost == pytest.approx(3, rel=0.01)


def make_repeating(seed: int) -> list[int]:
    piece = torch.randint(3, 300, (11,), generator=torch.Generator().manual_seed(seed)).tolist()
    return piece * 3


def make_answers(model: Any, prompts: list[list[int]], **sampling: Any) -> list[Any]:
    batch = make_batch(model)
    answers = [start(batch, model, ids, **sampling) for ids in prompts]
    finish(batch)
    return answers


def test_answers_are_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make("llama", num_hidden_layers=2)
    monkeypatch.setattr(PassTimes, "cost", property(lambda self: 0.0))  # always worth it
    prompts = [make_repeating(seed) for seed in range(3)]
    plain = make_answers(model, prompts, max_tokens=40, prompt_lookup=False)
    guessed = make_answers(model, prompts, max_tokens=40)
    assert [s.token_ids for s in guessed] == [s.token_ids for s in plain]
    assert sum(s.right_tokens for s in guessed) > 0 and not any(s.guessed_tokens for s in plain)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_right_guesses_save_passes_and_wrong_ones_leave_no_trace(
    monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    model: Any = make("llama", num_hidden_layers=2)
    ids = make_repeating(1)
    sampling: dict[str, Any] = {"temperature": temperature, "seed": 7}
    (plain,) = make_answers(model, [ids], max_tokens=24, prompt_lookup=False, **sampling)
    want = plain.token_ids
    told = [*want[:9], want[9] + 1, *want[10:]]  # the answer to come, but for one token
    monkeypatch.setattr(
        Drafts, "propose", lambda self, room, cost: told[len(self._ids) - len(ids) :][: min(MOST, room - 1)]
    )
    passes: list[int] = []
    hook = model.register_forward_pre_hook(lambda *args: passes.append(1))
    batch = make_batch(model)
    sequence = start(batch, model, ids, max_tokens=24, **sampling)
    finish(batch)
    hook.remove()
    assert sequence.token_ids == want and sequence.finish_reason == "length"
    assert len(passes) <= 6 and sequence.right_tokens == 24 - len(passes)
    monkeypatch.setattr(Drafts, "propose", lambda self, room, cost: [])
    again = start(batch, model, ids + want, max_tokens=4)  # goes on with the keys and values that are left
    finish(batch)
    assert again.reused_tokens > len(ids) and again.token_ids == get_reference(model, ids + want, 4)
