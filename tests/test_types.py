"""Ranges and amounts of memory, as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daaswarm.errors import ConfigError
from daaswarm.types import format_bytes, format_range, parse_bytes, parse_range


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0", [0]), ("0-3", [0, 1, 2, 3]), ("0-2,7", [0, 1, 2, 7]), (" 5 , 1-2 ", [1, 2, 5]), ("1,1,0-1", [0, 1])],
)
def test_parse_range(text: str, numbers: list[int]) -> None:
    assert parse_range(text, option="--layers") == numbers


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a range"),
        ("a", "is not a range"),
        ("-1", "is not a range"),
        ("1-", "is not a range"),
        ("1-2-3", "is not a range"),
        ("1,,2", "is not a range"),
        ("1.5", "is not a range"),
        ("²", "is not a range"),
        ("5-2", "5 is greater than 2"),
        ("0-99999999999", "99999999999 is out of range"),
        ("0-30", "this model has 30, numbered 0 to 29"),
        ("30", "this model has 30"),
    ],
)
def test_no_range(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as info:
        parse_range(text, option="--layers", limit=30)
    assert info.value.message.startswith("--layers") and info.value.hint


@given(st.sets(st.integers(0, 1000), min_size=1))
def test_format_range_is_the_inverse(numbers: set[int]) -> None:
    assert parse_range(format_range(list(numbers)), option="x") == sorted(numbers)


def test_format_range() -> None:
    assert format_range([3, 0, 1, 2, 7, 7]) == "0-3,7"
    assert format_range([]) == ""


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4_000_000_000),
        ("4 gb", 4_000_000_000),
        ("4GiB", 4 << 30),
        ("1.5k", 1500),
        ("100", 100),
        ("100B", 100),
        ("2TiB", 2 << 40),
        ("0.5Mi", 1 << 19),
    ],
)
def test_parse_bytes(text: str, size: int) -> None:
    assert parse_bytes(text, option="--memory") == size


@pytest.mark.parametrize("text", ["", "much", "-4GB", "0", "nan", "infGB", "1e99", "GB", "4XB", "4 G B", "4GBB"])
def test_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory") as info:
        parse_bytes(text, option="--memory")
    assert info.value.hint


def test_format_bytes() -> None:
    assert [format_bytes(n) for n in (0, 999, 12_600_000, 4e9, 5e12, 5e15)] == [
        "0 B",
        "999 B",
        "12.6 MB",
        "4.0 GB",
        "5.0 TB",
        "5000.0 TB",
    ]
