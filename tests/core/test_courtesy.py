"""When a host steps back, and how fast it sends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daaswarm.core.clock_watch import GAP_S, JUMP_S, ClockJump, ClockWatch, Gap
from daaswarm.core.courtesy import (
    DAY_MIN,
    PAUSE_AFTER_S,
    RESUME_AFTER_S,
    RESUME_SHARE,
    SILENT_S,
    Courtesy,
    CpuSample,
    LoadGate,
    compute_others_share,
    get_quiet_min,
)
from daaswarm.core.pacing import BURST_S, KEPT_SHARE, TokenBucket
from daaswarm.errors import ConfigError
from daaswarm.types import parse_quiet_hours

MINUTES = st.integers(0, DAY_MIN - 1)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("08:00-18:00", (480, 1080)),
        ("8:00-18:00", (480, 1080)),
        (" 22:30 - 06:00 ", (1350, 360)),
        ("20:00-24:00", (1200, 0)),
    ],
)
def test_quiet_hours_are_read(text: str, minutes: tuple[int, int]) -> None:
    assert parse_quiet_hours(text, option="--quiet-hours") == minutes


@pytest.mark.parametrize(
    "text", ["", "8-18", "08:00", "08:00-18:00-20:00", "25:00-26:00", "08:60-09:00", "08:0-09:00", "24:01-08:00", "a-b"]
)
def test_what_is_no_time_of_the_day(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a time of the day") as info:
        parse_quiet_hours(text, option="--quiet-hours")
    assert "08:00-18:00" in info.value.hint


def test_quiet_hours_that_never_end_are_refused() -> None:
    for text in ("08:00-08:00", "00:00-24:00"):
        with pytest.raises(ConfigError, match="begins when it ends"):
            parse_quiet_hours(text, option="--quiet-hours")


@given(hours=st.lists(st.tuples(MINUTES, MINUTES).filter(lambda w: w[0] != w[1]), max_size=4), minute=MINUTES)
def test_quiet_until_no_window_holds(hours: list[tuple[int, int]], minute: int) -> None:
    def is_quiet(at: int) -> bool:
        return any((at - begin) % DAY_MIN < (end - begin) % DAY_MIN for begin, end in hours)

    rest = get_quiet_min(hours, minute)
    assert 0 <= rest <= DAY_MIN
    assert all(is_quiet((minute + i) % DAY_MIN) for i in range(rest))
    assert rest == DAY_MIN or not is_quiet((minute + rest) % DAY_MIN)


def test_a_pause_says_until_when() -> None:
    courtesy = Courtesy([(22 * 60, 0), (0, 6 * 60)])
    assert courtesy.is_needed
    assert courtesy.decide(12 * 3600, 1e9, 1.0, 0.0) is None
    pause = courtesy.decide(23 * 3600 + 30, 1e9, 0.0, 0.0)
    assert pause is not None and pause.reason == "quiet hours until 06:00"
    assert pause.retry_after_s == 7 * 3600 - 30 and pause.until == 1e9 + 7 * 3600 - 30


def test_a_pause_for_load_names_the_limit() -> None:
    courtesy = Courtesy(busy_limit=0.5)
    pauses = [courtesy.decide(0.0, 1e9, 0.9, second) for second in (0.0, 2.0, 4.0)]
    assert pauses[:2] == [None, None]
    assert pauses[2] is not None and "50%" in pauses[2].reason and pauses[2].retry_after_s > 0
    assert not Courtesy().is_needed


def test_the_gate_waits_and_has_a_gap() -> None:
    gate = LoadGate(0.5)
    now = 0.0

    def hold(share: float, seconds: float) -> bool:
        nonlocal now
        end = now + seconds
        while now < end:
            now += 1
            gate.note(share, now)
        return gate.is_busy

    assert not hold(0.6, PAUSE_AFTER_S)  # the first measurement starts the clock
    assert hold(0.6, 1)
    assert hold(0.49, 10 * RESUME_AFTER_S)  # between the two limits nothing changes
    assert hold(RESUME_SHARE * 0.5, RESUME_AFTER_S)
    assert hold(0.45, 1)  # once above: waited for anew
    assert hold(0.1, RESUME_AFTER_S)
    assert not hold(0.1, 1)
    assert hold(0.6, 2 * PAUSE_AFTER_S)
    now += SILENT_S + 1  # the laptop slept: what was before says nothing
    assert not hold(0.6, 1)


@given(st.lists(st.tuples(st.floats(0.1, 5.0), st.floats(0.0, 1.0)), max_size=60))
def test_the_gate_changes_only_after_a_while_on_one_side(steps: list[tuple[float, float]]) -> None:
    gate, now, changed_at = LoadGate(0.5), 0.0, 0.0
    for step, share in steps:
        now += step
        before = gate.is_busy
        if gate.note(share, now) != before:
            assert share > 0.5 if gate.is_busy else share <= RESUME_SHARE * 0.5
            assert now - changed_at >= (PAUSE_AFTER_S if gate.is_busy else RESUME_AFTER_S)
            changed_at = now


def test_own_time_is_not_others() -> None:
    before = CpuSample(10.0, 100.0, 40.0)
    assert compute_others_share(before, CpuSample(12.0, 104.0, 43.0), 2) == 0.25
    assert compute_others_share(before, CpuSample(12.0, 104.0, 44.0), 2) == 0.0
    assert compute_others_share(before, CpuSample(12.0, 104.0, 10.0), 2) == 1.0  # a child ended unseen
    assert compute_others_share(before, CpuSample(12.0, 100.0, 45.0), 2) == 0.0
    assert compute_others_share(before, before, 2) == 0.0


@given(
    rate=st.integers(1, 10**9),
    takes=st.lists(st.tuples(st.floats(0, 10), st.integers(0, 10**9)), min_size=1, max_size=50),
)
def test_no_more_is_sent_than_the_rate_allows(rate: int, takes: list[tuple[float, int]]) -> None:
    bucket, now, sent = TokenBucket(rate), 0.0, 0
    for pause, size in takes:
        now += pause
        expected = bucket.get_wait_s(size, now)
        assert bucket.take(size, now) == expected
        sent += size
        allowed = rate * (now + expected + BURST_S)
        assert sent <= allowed * (1 + 1e-9) + 1e-3
        now += expected


@given(
    rate=st.integers(1, 10**9),
    takes=st.lists(st.tuples(st.floats(0, 10), st.integers(0, 10**9)), min_size=1, max_size=50),
)
def test_what_can_wait_leaves_half_a_burst(rate: int, takes: list[tuple[float, int]]) -> None:
    bucket, now = TokenBucket(rate), 0.0
    for pause, size in takes:
        now += pause
        wait_s = bucket.get_spare_wait_s(size, now)
        taken = bucket.take_spare(size, now)
        assert 0 <= taken <= size and (wait_s > 0 or taken >= size - 1)
        assert bucket.get_wait_s(KEPT_SHARE * rate * BURST_S, now) * rate <= 1e-3


def test_what_is_not_sent_is_given_back() -> None:
    bucket = TokenBucket(100)
    assert bucket.take(100, 0.0) == 0
    assert bucket.take(50, 0.0) == 0.5
    bucket.give_back(50)
    assert bucket.take(50, 0.5) == 0
    bucket.give_back(10**6)
    assert bucket.get_wait_s(200, 0.5) == 1.0  # never more than a burst


@pytest.mark.parametrize(
    ("wall", "monotonic", "found"),
    [
        (2.0, 2.0, []),
        (2.0 + JUMP_S, 2.0, []),
        (3600.0, 2.0, [ClockJump(3598.0), Gap(3600.0)]),  # set forward, or suspended where monotonic clocks stop
        (-3600.0, 2.0, [ClockJump(-3602.0)]),
        (3600.0, 3600.0, [Gap(3600.0)]),  # suspended where they don't, or stopped by a signal
        (GAP_S, GAP_S, []),
    ],
)
def test_clocks(wall: float, monotonic: float, found: list[object]) -> None:
    watch = ClockWatch()
    assert watch.look(1e9, 500.0) == []
    assert watch.look(1e9 + wall, 500.0 + monotonic) == found
    assert watch.look(1e9 + wall + 5, 500.0 + monotonic + 5) == []
