"""The share of an engine that joins, comes back, or is one of many that start together."""

from __future__ import annotations

import pytest

from kvatlas_common.words import EngineId
from kvatlas_router.core.slow_start import SHARE_MIN, SlowStart

A, B, C = EngineId("a:1"), EngineId("b:1"), EngineId("c:1")
RAMP_S = 20.0


def at_work() -> SlowStart:
    """A and B have been up for long at 100."""
    slow = SlowStart(RAMP_S)
    assert slow.see({A, B}, 0.0) == (A, B)
    return slow


@pytest.mark.parametrize(
    ("after_s", "share"), [(0.0, SHARE_MIN), (1.0, SHARE_MIN), (5.0, 0.25), (10.0, 0.5), (20.0, 1.0), (1000.0, 1.0)]
)
def test_an_engine_that_joins_others_at_work_gets_its_share_bit_by_bit(after_s: float, share: float) -> None:
    slow = at_work()
    assert slow.see({A, B, C}, 100.0) == (C,)
    assert slow.share(C, 100.0 + after_s) == pytest.approx(share)
    assert slow.share(A, 100.0 + after_s) == 1.0


def test_where_all_are_new_nobody_starts_slowly() -> None:
    slow = SlowStart(RAMP_S)
    slow.see({A}, 0.0)
    slow.see({A, B}, 3.0)
    slow.see({A, B, C}, RAMP_S - 0.1)
    assert [slow.share(e, RAMP_S) for e in (A, B, C)] == [1.0, 1.0, 1.0]


def test_an_engine_that_went_and_came_is_new() -> None:
    slow = at_work()
    slow.see({A}, 100.0)
    assert slow.see({A, B}, 101.0) == (B,)
    assert slow.share(B, 101.0) == SHARE_MIN


def test_the_only_engine_does_not_start_slowly_when_it_comes_again() -> None:
    slow = SlowStart(RAMP_S)
    slow.see({A}, 0.0)
    slow.see((), 100.0)
    slow.see({A}, 101.0)
    assert slow.share(A, 101.0) == 1.0


def test_one_that_comes_back_from_an_ejection_starts_slowly_if_others_work() -> None:
    slow = at_work()
    slow.begin(A, 50.0)
    assert slow.share(A, 60.0) == 0.5
    slow.see({A}, 70.0)
    slow.begin(A, 80.0)
    assert slow.share(A, 90.0) == 1.0


def test_it_can_be_off() -> None:
    slow = SlowStart(0)
    slow.see({A}, 0.0)
    slow.see({A, B}, 100.0)
    slow.begin(A, 100.0)
    assert (slow.share(A, 100.0), slow.share(B, 100.0)) == (1.0, 1.0)


def test_the_unknown_has_its_whole_share() -> None:
    assert SlowStart(RAMP_S).share(A, 0.0) == 1.0
