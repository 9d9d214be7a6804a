"""Tokens to text: what streams, and what is held back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daaswarm.inference.text_stream import TextStream
from tests.byte_tokenizer import make_tokenizer

TOKENIZER = make_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def stream(ids: list[int], stop: list[str] | None = None, *, end: bool = True) -> tuple[TextStream, list[str]]:
    """All tokens, one by one."""
    pieces: list[str] = []
    made = TextStream(TOKENIZER, stop or [], pieces.append)
    for number in ids:
        made.add(number)
    if end:
        made.end()
    assert made.text == "".join(pieces)
    assert made.token_ids == ids
    return made, pieces


def test_a_character_comes_when_it_is_whole() -> None:
    ids = encode("aé😀b")
    assert len(ids) == 8  # one a byte
    assert stream(ids)[1] == ["a", "é", "😀", "b"]
    assert stream(ids[:5], end=False)[1] == ["a", "é"]  # half of the third is held back ...
    assert stream(ids[:5])[0].text == "aé\ufffd"  # ... and shown as what it is when nothing more comes


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
    made = TextStream(TOKENIZER, ["."], pieces.append)
    for number in encode("a.b.c"):
        made.add(number)
    made.end()
    assert pieces == ["a"] and made.text == "a" and made.stopped


@given(st.lists(st.one_of(st.integers(3, 511), st.sampled_from([0, 2])), max_size=40))
def test_the_pieces_are_the_decoded_whole(ids: list[int]) -> None:
    assert stream(ids)[0].text == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(st.text(max_size=40))
def test_any_text_comes_out_as_it_went_in(text: str) -> None:
    made, pieces = stream(encode(text))
    assert made.text == text and all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)
