"""Scores to tokens: what is drawn, and how much room there is."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from daaswarm.errors import ConfigError
from daaswarm.inference.sequence import SampleOnce, get_pad_token, get_room


def make_config_only(context: int | None) -> Any:
    text = SimpleNamespace(max_position_embeddings=context) if context else SimpleNamespace()
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))


def test_get_room() -> None:
    assert get_room(make_config_only(100), 40, 50, "m") == 50
    assert get_room(make_config_only(100), 40, 90, "m") == 60
    assert get_room(make_config_only(100), 99, 90, "m") == 1
    assert get_room(make_config_only(None), 10**6, 7, "m") == 7
    with pytest.raises(ConfigError, match="the prompt has 100 tokens; m takes 100") as info:
        get_room(make_config_only(100), 100, 1, "m")
    assert info.value.hint


@pytest.mark.parametrize(
    ("pad", "eos", "expected"), [(5, 2, 5), (None, 2, 2), (None, [7, 8], 7), (None, None, 0), (0, 3, 0)]
)
def test_pad_token(pad: int | None, eos: Any, expected: int) -> None:
    generation_config = SimpleNamespace(pad_token_id=pad, eos_token_id=eos)
    assert get_pad_token(SimpleNamespace(generation_config=generation_config)) == expected


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
