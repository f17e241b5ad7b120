"""The schedule of faults: all from the seed, and each scenario the same whichever others are played."""

from __future__ import annotations

import pytest

from kvatlas_loadtest.chaos.faults import PLAYS
from kvatlas_loadtest.chaos.plan import BY_NAME, SCENARIOS, schedule, victim


def test_a_seed_is_a_schedule_and_another_seed_another() -> None:
    first = schedule(1, replay=True, redis=True)
    assert schedule(1, replay=True, redis=True) == first
    assert [fault.scenario for fault in first] == list(SCENARIOS)
    others = schedule(2, replay=True, redis=True)
    assert all(a.pick != b.pick and a.down_s != b.down_s for a, b in zip(first, others, strict=True))


def test_a_scenario_is_played_the_same_way_alone() -> None:
    (alone,) = schedule(7, replay=False, redis=True, only=["lose-frames"])
    assert alone in schedule(7, replay=False, redis=True)


def test_one_indexer_with_the_memory_store_is_spared_what_takes_several() -> None:
    names = {fault.scenario.name for fault in schedule(0, replay=True, redis=False)}
    assert names == {s.name for s in SCENARIOS if not s.shared}
    assert not names & {"flushall", "stop-valkey", "restart-valkey", "cut-network", "scale"}


def test_the_scale_goes_for_what_is_not_the_fault() -> None:
    one, two = (schedule(3, replay=True, redis=True, scale=scale)[0].down_s for scale in (1.0, 0.5))
    assert two == pytest.approx(one / 2)


def test_a_name_that_is_none_is_told_with_those_that_are() -> None:
    with pytest.raises(ValueError, match="no scenario is named kill-everything; there are: rolling-restart"):
        schedule(0, replay=True, redis=True, only=["kill-everything", "flushall"])


def test_every_scenario_can_be_played() -> None:
    assert PLAYS.keys() == BY_NAME.keys()


def test_every_candidate_can_be_the_victim_and_only_candidates_are() -> None:
    names = ["shard-2", "shard-0", "shard-1"]
    hit = {victim(schedule(seed, replay=True, redis=True)[0], names) for seed in range(40)}
    assert hit == set(names)
    assert victim(schedule(0, replay=True, redis=True)[0], ["only"]) == "only"
