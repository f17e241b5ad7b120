"""One load of each engine, from all shards that tell."""

from __future__ import annotations

from kvatlas_common.fleet import InFlight, Load
from kvatlas_common.words import EngineId
from kvatlas_router.core.loads import MergedLoads

A, B = EngineId("a:1"), EngineId("b:1")
EARLY, LATE = Load(running=1, scraped_at=1.0), Load(running=2, scraped_at=2.0)


def test_the_latest_scrape_counts_whoever_told_it_first() -> None:
    loads = MergedLoads()
    latest = loads.latest
    loads.told("one", [(A, EARLY), (B, LATE)], snapshot=True)
    loads.told("two", [(A, LATE), (B, EARLY)], snapshot=True)
    assert loads.latest == {A: LATE, B: LATE}
    assert loads.latest is latest


def test_a_shard_that_is_lost_or_takes_back_what_it_said_counts_no_longer() -> None:
    loads = MergedLoads()
    loads.told("one", [(A, EARLY)], snapshot=True)
    loads.told("two", [(A, LATE), (B, LATE)], snapshot=True)
    loads.told("two", [(A, Load())])
    assert loads.latest == {A: EARLY, B: LATE}
    loads.lost("two")
    assert loads.latest == {A: EARLY}
    loads.lost("nobody")
    loads.told("one", [], snapshot=True)
    assert loads.latest == {}


def test_what_others_have_in_flight_is_told_of_an_engine_that_gives_no_figures() -> None:
    loads = MergedLoads()
    busy = Load(others=InFlight(1, 500, 2))
    loads.told("one", [(A, busy)], snapshot=True)
    assert loads.latest == {A: busy}
