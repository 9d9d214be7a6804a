"""Tokens to text and scores to tokens: what streams, what is held back, what is drawn."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from daaswarm.errors import ConfigError, ModelError
from daaswarm.inference.generation import (
    Generated,
    Prompt,
    SampleOnce,
    TextStream,
    check_length,
    encode_prompt,
    generate,
    get_pad_token,
)
from daaswarm.testing.checkpoints import make_config, make_model
from tests.byte_tokenizer import make_tokenizer

TOKENIZER = make_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def stream(ids: list[int], stop: list[str] | None = None, *, end: bool = True) -> tuple[TextStream, list[str]]:
    """All tokens, one by one, after a prompt of two."""
    pieces: list[str] = []
    made = TextStream(TOKENIZER, stop or [], pieces.append, 2)
    made.put(torch.tensor([[7, 8]]))
    for number in ids:
        made.put(torch.tensor([number]))
    if end:
        made.end()
    assert made.text == "".join(pieces)
    assert made.token_ids == ids
    return made, pieces


# -- text ---------------------------------------------------------------------------------------------------------


def test_a_character_comes_when_it_is_whole() -> None:
    ids = encode("aé😀b")
    assert len(ids) == 8  # one a byte
    assert stream(ids)[1] == ["a", "é", "😀", "b"]
    assert stream(ids[:5], end=False)[1] == ["a", "é"]  # half of the third is held back ...
    assert stream(ids[:5])[0].text == "aé\ufffd"  # ... and shown as what it is when nothing more comes


def test_the_prompt_is_not_part_of_the_answer() -> None:
    made = TextStream(TOKENIZER, [], lambda piece: None, 2)
    made.put(torch.tensor([[7, 8]]))
    assert made.token_ids == [] and made.first_token_at is None
    made.put(torch.tensor([50]))
    assert made.token_ids == [50] and made.first_token_at is not None


@pytest.mark.parametrize(
    ("text", "stop", "expected", "stopped"),
    [
        ("one END two", ["END"], "one ", True),
        ("one END", ["END"], "one ", True),
        ("one EN two", ["END"], "one EN two", False),
        ("one EN", ["END"], "one EN", False),
        ("aaab", ["aab"], "a", True),
        ("a\n\nb", ["\n\n"], "a", True),
        ("x y z", ["z", "y"], "x ", True),
        ("stop", ["stop"], "", True),
        ("grün, blau", ["ün"], "gr", True),
        ("abc", [""], "abc", False),
        ("abcabd", ["abd"], "abc", True),
    ],
)
def test_stop_strings(text: str, stop: list[str], expected: str, stopped: bool) -> None:
    made, _ = stream(encode(text), stop)
    assert (made.text, made.stopped) == (expected, stopped)
    for i in range(len(encode(text))):  # nothing that a later token takes back
        assert expected.startswith(stream(encode(text)[:i], stop, end=False)[0].text)


def test_nothing_comes_after_a_stop() -> None:
    pieces: list[str] = []
    made = TextStream(TOKENIZER, ["."], pieces.append, 0)
    for number in encode("a.b.c"):
        made.put(torch.tensor([number]))
    made.end()
    assert pieces == ["a"] and made.text == "a" and made.stopped


@given(st.lists(st.one_of(st.integers(3, 511), st.sampled_from([0, 2])), max_size=40))
def test_the_pieces_are_the_decoded_whole(ids: list[int]) -> None:
    assert stream(ids)[0].text == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(st.text(max_size=40))
def test_any_text_comes_out_as_it_went_in(text: str) -> None:
    made, pieces = stream(encode(text))
    assert made.text == text and all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)


# -- prompts ------------------------------------------------------------------------------------------------------


def make_chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (Prompt("Hi"), "user:Hi\nassistant:"),
        (Prompt("Hi", system="Be kind"), "system:Be kind\nuser:Hi\nassistant:"),
        (Prompt("Hi", raw=True), "Hi"),
    ],
)
def test_the_chat_template(prompt: Prompt, text: str) -> None:
    assert TOKENIZER.decode(encode_prompt(prompt, make_chat_tokenizer(), "m")[0]) == text


def test_without_a_chat_template() -> None:
    assert encode_prompt(Prompt("Hi"), TOKENIZER, "m").shape == (1, 2)
    with pytest.raises(ConfigError, match="m has none"):
        encode_prompt(Prompt("Hi", system="x"), TOKENIZER, "m")
    with pytest.raises(ConfigError, match="--raw leaves it out"):
        encode_prompt(Prompt("Hi", system="x", raw=True), make_chat_tokenizer(), "m")


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_prompt(text: str) -> None:
    with pytest.raises(ConfigError, match="empty"):
        encode_prompt(Prompt(text), TOKENIZER, "m")


def test_a_model_without_a_tokenizer() -> None:
    with pytest.raises(ModelError, match="m has no tokenizer"):
        encode_prompt(Prompt("Hi"), None, "m")


def make_config_only(context: int | None) -> Any:
    text = SimpleNamespace(max_position_embeddings=context) if context else SimpleNamespace()
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))


def test_check_length() -> None:
    assert check_length(make_config_only(100), 40, 50, "m") == 50
    assert check_length(make_config_only(100), 40, 90, "m") == 60
    assert check_length(make_config_only(100), 99, 90, "m") == 1
    assert check_length(make_config_only(None), 10**6, 7, "m") == 7
    with pytest.raises(ConfigError, match="the prompt has 100 tokens; m takes 100") as info:
        check_length(make_config_only(100), 100, 1, "m")
    assert info.value.hint


@pytest.mark.parametrize(
    ("pad", "eos", "expected"), [(5, 2, 5), (None, 2, 2), (None, [7, 8], 7), (None, None, 0), (0, 3, 0)]
)
def test_pad_token(pad: int | None, eos: Any, expected: int) -> None:
    generation_config = SimpleNamespace(pad_token_id=pad, eos_token_id=eos)
    assert get_pad_token(SimpleNamespace(generation_config=generation_config)) == expected


# -- drawing ------------------------------------------------------------------------------------------------------


def test_draws_follow_the_distribution() -> None:
    wanted = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    draws = 20_000
    scores = wanted.log().expand(draws, -1)
    counts = SampleOnce(7)(torch.zeros(draws, 1), scores).argmax(-1).bincount(minlength=5)
    assert counts[4] == 0
    chi2 = ((counts[:4] - draws * wanted[:4]) ** 2 / (draws * wanted[:4])).sum()
    assert chi2 < 16.3  # 3 degrees of freedom, one in a thousand; the seed is fixed


def test_a_seed_means_the_same_in_every_thread() -> None:
    scores = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))

    def draw(seed: int) -> list[int]:
        sampler = SampleOnce(seed)
        return [int(sampler(torch.zeros(1, 1), scores).argmax()) for _ in range(20)]

    alone = draw(3)
    others: list[list[int]] = []
    threads = [threading.Thread(target=lambda: others.append(draw(3))) for _ in range(4)]
    for thread in threads:
        thread.start()
    torch.manual_seed(0)
    for thread in threads:
        thread.join()
    assert others == [alone] * 4
    assert draw(4) != alone


def test_without_a_seed_draws_differ() -> None:
    scores = torch.zeros(1, 10_000)
    drawn = {int(SampleOnce(None)(torch.zeros(1, 1), scores).argmax()) for _ in range(10)}
    assert len(drawn) > 5


# -- a whole answer -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    model = make_model(make_config("llama", num_hidden_layers=1))
    model.generation_config.eos_token_id = None
    return model


def answer(model: Any, text: str = "Hello", *, cancel_after: int | None = None, **changes: Any) -> Generated:
    result = Generated()
    seen: list[str] = []
    prompt = Prompt(text, **{"max_tokens": 20, **changes})
    generate(
        model,
        TOKENIZER,
        encode_prompt(prompt, TOKENIZER, "m"),
        prompt,
        model_name="m",
        on_text=seen.append,
        is_cancelled=lambda: cancel_after is not None and len(seen) >= cancel_after,
        result=result,
    )
    assert result.text == "".join(seen)
    return result


def test_greedy_is_transformers_own(model: Any) -> None:
    result = answer(model)
    ids = torch.tensor([encode("Hello")])
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert result.token_ids == wanted[0, 5:].tolist()
    assert result.text == TOKENIZER.decode(result.token_ids, skip_special_tokens=True)
    assert (result.prompt_tokens, result.finish_reason) == (5, "length")
    assert 0 < result.time_to_first_token_s <= result.seconds


def test_a_seed_repeats_an_answer(model: Any) -> None:
    first = answer(model, temperature=1.5, seed=11)
    assert answer(model, temperature=1.5, seed=11).token_ids == first.token_ids
    assert answer(model, temperature=1.5, seed=12).token_ids != first.token_ids
    assert answer(model, temperature=1.5, top_p=1e-6, seed=12).token_ids == answer(model).token_ids


def test_top_p_draws_from_the_nucleus_only(model: Any) -> None:
    ids = torch.tensor([encode("Hello")])
    with torch.inference_mode():
        probabilities = model(ids).logits[0, -1].softmax(-1).sort(descending=True)
    nucleus = set(probabilities.indices[: int((probabilities.values.cumsum(0) < 0.1).sum()) + 1].tolist())
    drawn = {answer(model, temperature=1.0, top_p=0.1, seed=seed, max_tokens=1).token_ids[0] for seed in range(40)}
    assert drawn <= nucleus and len(drawn) > 1


def test_a_stop_string_ends_the_answer(model: Any) -> None:
    whole = answer(model)
    stop = whole.text[6:9]
    result = answer(model, stop=[stop])
    assert result.text == whole.text[: whole.text.index(stop)]
    assert result.finish_reason == "stop" and len(result.token_ids) < 20


def test_a_cancelled_answer_ends(model: Any) -> None:
    assert len(answer(model, cancel_after=3).token_ids) < 20


def test_the_context_is_a_limit(model: Any) -> None:
    assert len(answer(model, "x" * 250).token_ids) == 6
    with pytest.raises(ConfigError, match="256 tokens"):
        answer(model, "x" * 256)
