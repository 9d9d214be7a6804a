"""The fuzz targets, for a moment each; ``make fuzz`` runs them for minutes, guided by coverage."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.source import Source
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_does_what_must_never_happen(name: str) -> None:
    target, seeds = TARGETS[name]
    for seed in seeds:
        target(seed)
    near = st.builds(
        lambda parts, changes: Source(changes).damage(b"".join(parts)),
        st.lists(st.sampled_from(seeds), min_size=1, max_size=4),
        st.binary(max_size=40),
    )

    @settings(max_examples=150, deadline=None)
    @given(near | st.binary(max_size=1500))
    def check(data: bytes) -> None:
        target(data)

    check()
