"""Answers that heal nothing, and what is given up where there is too much to remember."""

from __future__ import annotations

from typing import Any

import pytest

from kvatlas_common.fleet import Sync
from kvatlas_common.observations import FirstToken, Outcome
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.effects import ReplayEnd
from kvatlas_indexer.core.healing import HealingLimits
from kvatlas_indexer.core.index import Replay
from kvatlas_indexer.core.naming import Expected
from tests.unit.indexer.core.healing_kit import ENGINE, PROMPT, USED, Shard, doubtful_shard, warm_shard
from tests.unit.indexer.core.published import SIZE

# -- when nothing can be concluded -------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", ["clear", "lose"])
def test_a_clear_or_a_loss_on_the_way_leaves_nothing_to_conclude(between: str) -> None:
    shard = doubtful_shard()
    request = shard.route()
    getattr(shard, between)()
    before = shard.residency.table(ENGINE)
    assert not shard.finish(request, hit=2)
    assert shard.residency.table(ENGINE) == before


def test_a_restart_on_the_way_leaves_nothing_to_conclude() -> None:
    shard = warm_shard()
    request = shard.route()
    shard.seq = 3
    shard.store(2, tokens=[9] * 2 * SIZE)
    assert shard.sync is Sync.INEXACT, "and what was before its message 3 is not known again"
    assert not shard.finish(request, hit=5)
    assert shard.matched() == 0


@pytest.mark.parametrize(
    "said",
    [
        {"comparable": False},
        {"outcome": Outcome.CUT},
        {"outcome": Outcome.CANCELLED},
        {"hit": None},
        {"engine": EngineId("10.0.0.9:8000")},
    ],
)
def test_what_is_not_comparable_heals_nothing(said: dict[str, Any]) -> None:
    shard = doubtful_shard()
    request = shard.route()
    assert not shard.finish(request, **{"hit": 2} | said)
    assert not shard.finish(request, hit=2), "it is over"
    assert shard.copies() == [-1] * 6
    assert shard.healing.awaited == 0


def test_answers_to_one_request_id_used_twice_cannot_be_told_apart() -> None:
    shard = doubtful_shard()
    for _ in range(2):
        shard.route(request_id="same")
    for hit in (2, 6):
        assert not shard.finish("same", hit=hit)
    assert shard.healing.awaited == 0
    shard.route(request_id="same")
    assert shard.finish("same", hit=6)


def test_an_answer_to_one_request_is_not_held_against_a_later_one_of_the_same_id() -> None:
    shard = doubtful_shard()
    shard.route(request_id="same")
    shard.route(request_id="same")
    shard.finish("same", hit=6)
    shard.route(request_id="same")
    assert not shard.finish("same", hit=2)
    assert shard.copies() == [-1] * 6


def test_keys_of_another_profile_than_the_engine_has_by_the_time_of_the_answer_say_nothing() -> None:
    """Its hashes were thought not to be reproducible, until an unsalted prompt came."""
    shard = Shard(joined=5, expected=Expected())
    shard.publisher.form = "bare"
    shard.say(shard.publisher.written(shard.publisher.stored(PROMPT[: 2 * SIZE], salt="s")))
    recomputed = shard.index.fleet().engines[ENGINE].profile
    assert recomputed not in (None, USED.name)
    request = shard.route(predicted=0, profile=str(recomputed))
    shard.say(shard.publisher.written(shard.publisher.stored([9] * SIZE)))
    assert shard.index.fleet().engines[ENGINE].profile != recomputed
    before = shard.residency.table(ENGINE)
    assert not shard.finish(request, hit=5)
    assert shard.residency.table(ENGINE) == before


def test_engines_of_other_shards_are_passed_over() -> None:
    shard = doubtful_shard()
    shard.index.abandon(ENGINE.address)
    shard.route(predicted=6)
    assert shard.healing.awaited == 0


def test_an_engine_that_changed_hands_on_the_way_is_not_healed() -> None:
    shard = doubtful_shard()
    request = shard.route()
    shard.index.abandon(ENGINE.address)
    shard.specify()
    assert not shard.finish(request, hit=6)


def test_an_engine_merely_out_of_reach_stays_as_it_was_and_becomes_exact_again() -> None:
    shard = Shard()
    shard.store()
    shard.index.on_connection(ENGINE, False, shard.now)
    assert shard.sync is Sync.INEXACT
    assert not shard.answer(hit=2)
    shard.index.on_connection(ENGINE, True, shard.now)
    assert shard.sync is Sync.INEXACT
    assert not shard.answer(hit=2)
    shard.say()
    assert (shard.sync, shard.copies()) == (Sync.EXACT, [1] * 6)


def test_an_engine_being_replayed_is_not_healed() -> None:
    shard = Shard(replay=True)
    shard.index.on_replay_end(ENGINE, ReplayEnd.COMPLETE, shard.now)
    shard.store()
    request = shard.route()
    shard.seq += 1
    assert isinstance(shard.say()[0], Replay)
    assert shard.sync is Sync.SYNCING
    assert not shard.answer(hit=2)
    assert not shard.finish(request, hit=2)
    assert shard.copies() == [1] * 6


def test_an_engine_that_is_built_again_by_the_time_of_the_answer_is_not_healed() -> None:
    shard = Shard(replay=True)
    shard.index.on_replay_end(ENGINE, ReplayEnd.COMPLETE, shard.now)
    shard.store()
    shard.lose()
    while shard.sync is Sync.SYNCING:
        shard.index.on_replay_end(ENGINE, ReplayEnd.REFUSED, shard.now)
    assert (shard.sync, shard.copies()) == (Sync.INEXACT, [-1] * 6)
    request = shard.route()
    shard.now += 31.0
    assert isinstance(shard.index.on_tick(shard.now)[0], Replay)
    assert not shard.finish(request, hit=6)
    assert shard.copies() == [-1] * 6


def test_a_doubt_that_ended_on_the_way_takes_nothing_with_it() -> None:
    shard = doubtful_shard()
    request = shard.route()
    shard.now += 590.0
    shard.index.on_tick(shard.now + 20.0)
    shard.store(3)
    assert shard.copies() == [1, 1, 1, 0, 0, 0]
    assert not shard.finish(request, hit=2)
    assert shard.copies() == [1, 1, 1, 0, 0, 0]


def test_a_router_that_predicts_more_than_there_is_does_no_harm() -> None:
    shard = doubtful_shard()
    assert shard.finish(shard.route(predicted=9), hit=6)
    assert shard.copies() == [1] * 6


def test_first_tokens_say_nothing() -> None:
    shard = doubtful_shard()
    assert not shard.healing.observe(FirstToken(shard.route(), ENGINE, "m", 0.1), shard.now)
    assert shard.healing.awaited == 1


# -- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [HealingLimits(awaited_max=2), HealingLimits(keys_max=12)])
def test_the_oldest_request_is_given_up_where_there_are_too_many(limits: HealingLimits) -> None:
    shard = doubtful_shard(limits=limits)
    first, second, third = (shard.route() for _ in range(3))
    assert shard.healing.awaited == 2
    assert not shard.finish(first, hit=2)
    assert shard.finish(second, hit=6)
    assert shard.finish(third, hit=6) is False, "all settled already"


def test_a_request_that_never_ends_is_given_up() -> None:
    shard = doubtful_shard(limits=HealingLimits(awaited_s=60.0))
    old = shard.route()
    shard.now += 61.0
    shard.route()
    assert shard.healing.awaited == 1
    assert not shard.finish(old, hit=2)


def test_a_request_older_than_the_removals_remembered_heals_nothing() -> None:
    shard = doubtful_shard(limits=HealingLimits(removals_max=1))
    old = shard.route()
    shard.remove(4)
    shard.remove(5)
    young = shard.route()
    assert not shard.finish(old, hit=6)
    assert shard.finish(young, hit=4)
    assert shard.copies() == [1, 1, 1, 1, 0, 0]


def test_keys_are_kept_only_where_they_may_be_needed() -> None:
    shard = Shard(limits=HealingLimits(keys_max=1))
    shard.store()
    for _ in range(5):
        shard.route()
    assert shard.healing.awaited == 5
