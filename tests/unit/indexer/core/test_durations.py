from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvatlas_indexer.core.durations import SANE_S, Durations

BOUNDS = (0.001, 0.1, 5.0)


@given(st.lists(st.floats(0, 100)))
def test_counted_as_one_would_by_hand(taken: list[float]) -> None:
    durations = Durations(BOUNDS)
    for seconds in taken:
        durations.add(seconds)
    wanted = [(bound, sum(seconds <= bound for seconds in taken)) for bound in (*BOUNDS, float("inf"))]
    assert durations.cumulative() == wanted
    assert durations.sum_s == sum(taken)


def test_clocks_that_cannot_both_be_right_tell_nothing() -> None:
    durations = Durations(BOUNDS)
    durations.add_between(1000.0, 1000.05)
    durations.add_between(1000.0, 999.0)
    durations.add_between(0.0, SANE_S)
    assert durations.cumulative() == [(0.001, 0), (0.1, 1), (5.0, 1), (float("inf"), 1)]
