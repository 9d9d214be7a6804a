"""The number of threads is that which was fastest on the passes tried."""

from __future__ import annotations

import pytest

from daaswarm.inference.threads import FEW_ROWS, TRIES, ThreadChoice


@pytest.mark.parametrize(("most", "tried"), [(1, {1}), (2, {1, 2}), (6, {1, 2, 4, 6}), (8, {1, 2, 4, 8})])
def test_powers_of_two_and_all_are_tried(most: int, tried: set[int]) -> None:
    choice = ThreadChoice(most)
    seen = set()
    for _ in range(TRIES * len(tried)):
        threads = choice.choose(1)
        seen.add(threads)
        choice.note(1, threads, 0.01 * threads)
    assert seen == tried
    assert choice.choose(1) == 1
    assert choice.choose(FEW_ROWS + 1) == most


def test_the_fastest_stays_whatever_one_pass_took() -> None:
    choice = ThreadChoice(4)
    times = {1: [3.0, 0.1, 3.0], 2: [1.0, 9.0, 1.0], 4: [2.0, 2.0, 2.0]}
    while any(times.values()):
        threads = choice.choose(FEW_ROWS)
        choice.note(FEW_ROWS, threads, times[threads].pop())
    assert choice.choose(1) == 2
    choice.note(1, 2, 100.0)
    assert choice.choose(1) == 2


def test_passes_of_many_rows_say_nothing_about_those_of_few() -> None:
    choice = ThreadChoice(2)
    for _ in range(10 * TRIES):
        choice.note(FEW_ROWS + 1, choice.choose(FEW_ROWS + 1), 0.0)
    assert choice.choose(1) == 1  # still trying
