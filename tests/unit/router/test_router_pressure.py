"""When a new request would only queue at an engine."""

from __future__ import annotations

import pytest

from kvatlas_common.fleet import InFlight, Load
from kvatlas_common.words import EngineId
from kvatlas_router.core.pressure import UNLIMITED, Pressure, PressureRules

A = EngineId("a:1")


def told(waiting: int, unanswered: int = 0, kv_usage: float = 0.0, **rules: float) -> Pressure:
    pressure = Pressure(PressureRules(**rules))  # type: ignore[arg-type]
    pressure.told(A, Load(waiting=waiting, kv_usage=kv_usage, scraped_at=1.0), unanswered, 0.0)
    return pressure


@pytest.mark.parametrize(
    ("waiting", "then", "now", "expected"),
    [
        (0, 0, 0, 32),  # idle
        (0, 0, 40, 0),  # a burst since the scrape
        (10, 12, 12, 22),  # nothing has happened since
        (10, 12, 17, 17),  # five more were sent
        (32, 40, 40, 0),
        (32, 40, 37, 3),  # three were answered since
        (0, 100, 100, 32),  # a hundred that are answered in one piece run, none waits
        (5, 100, 0, 32),
        (500, 0, 0, 0),
    ],
)
def test_what_waits_is_what_was_scraped_and_has_come_and_gone_since(
    waiting: int, then: int, now: int, expected: int
) -> None:
    assert told(waiting, then).places(A, now, 0, 1.0) == expected


def test_a_full_cache_leaves_a_quarter() -> None:
    assert told(5, kv_usage=0.99).places(A, 0, 0, 1.0) == 3
    assert told(5, kv_usage=0.5).places(A, 0, 0, 1.0) == 27
    assert told(0, kv_usage=1.0, waiting_max=1).places(A, 0, 0, 1.0) == 1


def test_unknown_is_not_saturated() -> None:
    assert Pressure().places(A, 999, 999, 0.0) == UNLIMITED
    never_scraped = Pressure()
    never_scraped.told(A, Load(), 0, 0.0)
    assert never_scraped.waiting(A, 999, 0.0) is None
    stale = told(500)
    assert stale.places(A, 0, 0, 5.0) == 0
    assert stale.places(A, 0, 0, 5.1) == UNLIMITED


def test_a_load_told_twice_is_no_fresher_and_a_new_one_counts_from_anew() -> None:
    pressure = told(500)
    pressure.told(A, Load(waiting=500, scraped_at=1.0, others=InFlight(prefilling=7)), 7, 4.0)
    assert pressure.waiting(A, 7, 4.0) == 507
    assert pressure.waiting(A, 7, 5.1) is None
    pressure.told(A, Load(waiting=500, scraped_at=2.0), 7, 5.1)
    assert pressure.waiting(A, 7, 5.1) == 500


def test_requests_in_flight_limit_where_nothing_else_is_known() -> None:
    pressure = Pressure(PressureRules(in_flight_max=3))
    assert [pressure.places(A, 0, n, 0.0) for n in range(5)] == [3, 2, 1, 0, 0]


def test_limits_can_be_off_and_the_lowest_holds() -> None:
    assert told(500, waiting_max=0).places(A, 0, 0, 1.0) == UNLIMITED
    assert told(30, in_flight_max=10).places(A, 0, 5, 1.0) == 2
    assert told(0, in_flight_max=10).places(A, 0, 5, 1.0) == 5


def test_engines_that_left_are_forgotten() -> None:
    pressure = told(500)
    pressure.keep_only(())
    assert pressure.waiting(A, 0, 0.0) is None
