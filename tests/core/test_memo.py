"""What is remembered, for how long."""

from __future__ import annotations

import pytest

from daaswarm.core.memo import memo


def test_results_are_computed_once_until_there_are_too_many() -> None:
    asked: list[str] = []

    @memo(2)
    def measure(text: str) -> int:
        asked.append(text)
        return len(text)

    assert [measure(text) for text in ("a", "bb", "a", "bb")] == [1, 2, 1, 2] and asked == ["a", "bb"]
    assert measure("ccc") == 3 and measure("ccc") == 3  # the others are forgotten
    assert measure("a") == 1 and asked == ["a", "bb", "ccc", "a"]


def test_what_raises_is_asked_again() -> None:
    asked: list[int] = []

    @memo(2)
    def refuse(number: int) -> int:
        asked.append(number)
        raise ValueError

    for _ in range(2):
        with pytest.raises(ValueError):
            refuse(1)
    assert asked == [1, 1]
