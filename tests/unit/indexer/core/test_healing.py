"""Healing: what is settled, added and removed, and that exact engines stay as they are."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas_common.blocks.keys import prompt_keys
from kvatlas_common.blocks.profile import HashProfile
from kvatlas_common.fleet import Sync
from kvatlas_common.observations import Routed
from kvatlas_common.words import Medium
from kvatlas_indexer.core.differences import REPEATED, Cause
from kvatlas_indexer.core.engine import Bounds
from kvatlas_indexer.core.healing import Healed
from kvatlas_indexer.core.projection import Projection
from tests.unit.indexer.core.healing_kit import ENGINE, PROMPT, Shard, doubtful_shard, warm_shard
from tests.unit.indexer.core.published import SIZE, UNKNOWABLE, Publisher, profile

WINDOW: dict[str, Any] = {
    "group_idx": 1,
    "kv_cache_spec_kind": "sliding_window",
    "kv_cache_spec_sliding_window": 2 * SIZE,
}
SECOND: dict[str, Any] = {"group_idx": 2, "kv_cache_spec_kind": "full_attention"}
MAMBA: dict[str, Any] = {"group_idx": 1, "kv_cache_spec_kind": "mamba"}
NO_MORE: dict[str, Any] = {}
ON_CPU: dict[str, Any] = {"medium": "CPU"}


# -- a miss ------------------------------------------------------------------------------------------------------------


def test_fewer_hits_than_predicted_remove_the_first_missing_block_and_no_other() -> None:
    shard = doubtful_shard()
    assert shard.answer(hit=2)
    assert shard.copies() == [1, 1, 0, -1, -1, -1]
    assert shard.matched() == 2
    assert shard.healing.healed == {Healed.SETTLED: 2, Healed.REMOVED: 1}


def test_a_block_is_missing_wherever_it_was_predicted_from() -> None:
    shard = Shard()
    shard.store()
    shard.store(**ON_CPU)
    shard.lose()
    shard.answer(hit=1)
    assert (shard.copies(), shard.copies(medium=Medium.CPU)) == ([1, 0, -1, -1, -1, -1], [-1, 0, -1, -1, -1, -1])
    assert shard.matched() == 1


def test_every_copy_of_a_missing_block_was_wrong() -> None:
    shard = Shard()
    shard.store()
    shard.store(3, since=2)
    shard.lose()
    assert shard.copies()[2] == -2
    shard.answer(hit=2)
    assert shard.copies()[2] == 0


def test_what_the_request_itself_has_stored_by_its_end_stays() -> None:
    """The removals of blocks 2 and 3 are lost, so soon after another loss that nothing is put in doubt."""
    shard = warm_shard()
    shard.lose()
    shard.store(4, since=0)
    shard.seq += 1
    shard.say()
    assert shard.copies() == [1, 1, 1, 1, 0, 0]
    request = shard.route()
    shard.store(4, since=2)
    assert shard.copies() == [1, 1, 2, 2, 0, 0]
    assert shard.finish(request, hit=2)
    assert shard.copies() == [1, 1, 1, 2, 0, 0]


def test_a_doubtful_block_the_request_has_stored_is_settled_by_that() -> None:
    shard = doubtful_shard()
    request = shard.route()
    shard.store(4, since=2)
    shard.finish(request, hit=2)
    assert shard.copies() == [1, 1, 1, 1, -1, -1]


def test_a_block_removed_and_stored_again_on_the_way_was_no_mistake() -> None:
    shard = warm_shard()
    request = shard.route()
    shard.remove(2)
    shard.store(3, since=2)
    assert not shard.finish(request, hit=2)
    assert shard.copies() == [1, 1, 1, 0, 0, 0]


def test_two_requests_that_missed_the_same_block_heal_it_once() -> None:
    shard = warm_shard()
    first, second = shard.route(), shard.route()
    shard.store(3, since=2)
    assert shard.finish(first, hit=2)
    assert shard.copies()[2] == 1
    assert not shard.finish(second, hit=2)
    assert shard.copies()[2] == 1


def test_where_the_index_heard_of_the_store_before_it_heard_of_the_request_nothing_is_taken() -> None:
    """The engine was faster than the observation: block 2 was missed, and is there by now."""
    shard = warm_shard()
    shard.store(4, since=2)
    assert not shard.finish(shard.route(predicted=3), hit=2)
    assert shard.copies() == [1, 1, 2, 1, 0, 0]


def test_a_router_that_predicted_no_more_than_was_hit_has_seen_nothing_missing() -> None:
    """By the time the index was told of the request, a neighbour's stores had been applied."""
    shard = warm_shard()
    assert not shard.finish(shard.route(predicted=1), hit=1)
    assert shard.copies() == [1, 1, 1, 0, 0, 0]


# -- a hit -------------------------------------------------------------------------------------------------------------


def test_a_hit_settles_doubt_and_what_is_settled_does_not_age_out() -> None:
    shard = doubtful_shard()
    assert shard.answer(hit=4)
    assert shard.doubtful() == 0
    shard.now += 1000.0
    shard.index.on_tick(shard.now)
    assert shard.copies() == [1, 1, 1, 1, 0, 0]


def test_a_prediction_that_came_true_settles_everything_it_rested_on() -> None:
    shard = doubtful_shard()
    assert shard.answer(hit=6)
    assert shard.copies() == [1] * 6
    assert shard.healing.differences == {}


def test_doubt_is_settled_where_the_engine_would_have_taken_the_block_from() -> None:
    shard = Shard()
    shard.store(3)
    shard.store(6, **ON_CPU)
    shard.lose()
    shard.answer(hit=5)
    assert shard.copies() == [1, 1, 1, 0, 0, 0]
    assert shard.copies(medium=Medium.CPU) == [-1, -1, -1, 1, 1, 0]


def test_hits_nobody_predicted_are_added() -> None:
    shard = warm_shard()
    assert shard.answer(hit=5)
    assert shard.copies() == [1, 1, 1, 1, 1, 0]
    assert shard.healing.healed == {Healed.ADDED: 2}
    assert not shard.answer(hit=5)


def test_one_removal_forgets_what_was_added() -> None:
    """How many copies there are is not known, only that there is one."""
    shard = warm_shard()
    shard.answer(hit=5)
    shard.remove(4)
    assert shard.copies() == [1, 1, 1, 1, 0, 0]


def test_a_store_after_an_addition_is_a_copy_more() -> None:
    shard = warm_shard()
    shard.answer(hit=5)
    shard.store(5, since=4)
    assert shard.copies()[4] == 2
    shard.remove(4)
    assert shard.copies()[4] == 1
    shard.remove(4)
    assert shard.copies()[4] == 0


def test_one_removal_forgets_what_was_settled_however_many_copies_were_known_before() -> None:
    shard = Shard()
    shard.store()
    shard.store(3, since=2)
    shard.lose()
    shard.answer(hit=6)
    assert shard.copies() == [1] * 6
    shard.remove(2)
    assert shard.copies() == [1, 1, 0, 1, 1, 1]


def test_a_block_removed_after_it_was_hit_is_not_added() -> None:
    shard = warm_shard()
    request = shard.route()
    shard.remove(4)
    shard.finish(request, hit=5)
    assert shard.copies() == [1, 1, 1, 1, 0, 0]


def test_nothing_is_added_to_an_engine_whose_groups_are_not_known_yet() -> None:
    shard = Shard(joined=5)
    shard.say()
    assert shard.sync is Sync.INEXACT
    assert not shard.answer(hit=5)
    shard.store(1)
    assert shard.answer(hit=5)


def test_no_more_is_added_than_an_engine_may_hold() -> None:
    shard = warm_shard(bounds=Bounds(blocks_max=3))
    assert not shard.answer(hit=5)


# -- engines of other kinds --------------------------------------------------------------------------------------------


def test_in_hybrids_only_full_attention_groups_are_healed() -> None:
    shard = Shard()
    for group in (NO_MORE, WINDOW, SECOND):
        shard.store(**group)
    shard.lose()
    shard.remove(5, group_idx=2)
    assert shard.answer(hit=4)
    assert shard.copies() == [1, 1, 1, 1, 0, -1]
    assert shard.copies(group=2) == [1, 1, 1, 1, 0, 0]
    assert shard.copies(group=1) == [-1] * 6
    assert shard.matched() == 4


def test_hits_are_added_to_every_full_attention_group() -> None:
    shard = Shard(joined=5)
    for group in (NO_MORE, WINDOW, SECOND):
        shard.store(1, **group)
    shard.answer(hit=3)
    assert [shard.copies(group=group)[:4] for group in range(3)] == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0]]


def test_where_the_kind_of_a_group_is_not_known_a_miss_says_nothing_and_a_hit_does() -> None:
    shard = Shard()
    shard.store()
    shard.store(**MAMBA)
    shard.lose()
    assert shard.answer(hit=2)
    assert shard.copies() == [1, 1, -1, -1, -1, -1]


def test_speculative_decoding_cuts_the_hit_short_of_the_missing_block() -> None:
    shard = doubtful_shard()
    shard.specify(speculative_drop_blocks=1)
    assert shard.matched() == 5
    assert shard.answer(hit=2)
    assert shard.copies() == [1, 1, -1, 0, -1, -1]
    assert shard.matched() == 2


def test_of_speculative_decoding_no_hit_at_all_does_not_tell_what_was_missing() -> None:
    shard = doubtful_shard()
    shard.specify(speculative_drop_blocks=1)
    assert not shard.answer(hit=0)
    assert shard.copies() == [-1] * 6


def test_nothing_is_added_under_recomputed_names() -> None:
    """No removal could be understood to mean what is added."""
    shard = Shard(joined=5)
    shard.publisher = Publisher(profile(seed=UNKNOWABLE))
    shard.store(3)
    view, before = shard.index.fleet().engines[ENGINE], shard.residency.table(ENGINE)
    assert view.profile is not None
    assert len(before) == 3
    keys = prompt_keys(HashProfile.parse(view.profile), [*PROMPT, 0]).tolist()
    assert set(keys[:3]) == {key for _, _, key in before}, "it is recomputed"
    shard.healing.observe(Routed("r", ENGINE, "m", 25, 3 * SIZE, {view.profile: keys}), shard.now)
    assert not shard.finish("r", hit=5)
    assert shard.residency.table(ENGINE) == before

    shard.healing.observe(Routed("r", ENGINE, "m", 25, 3 * SIZE, {view.profile: keys}), shard.now)
    assert shard.finish("r", hit=2)
    assert shard.residency.table(ENGINE) == {at: n for at, n in before.items() if at[2] != keys[2]}


# -- exact engines -----------------------------------------------------------------------------------------------------


def exact_shard() -> Shard:
    shard = Shard()
    shard.store()
    assert shard.sync is Sync.EXACT
    return shard


LIES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.booleans()), max_size=12)


@settings(max_examples=100, deadline=None)
@given(LIES)
def test_an_exact_engine_stays_exact_and_as_it_is_whatever_is_reported(reports: list[tuple[int, int, bool]]) -> None:
    shard = exact_shard()
    truth = [1] * 6
    for block, hit, late in reports:
        request = shard.route()
        if late:
            shard.store(block + 1, since=block)
            truth[block] += 1
        shard.finish(request, hit=hit)
        assert (shard.sync, shard.copies()) == (Sync.EXACT, truth)
    assert shard.healing.healed == {}


def test_differences_of_exact_engines_are_counted_by_cause() -> None:
    shard = exact_shard()
    seen = shard.healing.differences
    shard.answer(hit=6)
    assert seen == {}
    shard.answer(hit=3)
    assert seen == {Cause.UNEXPLAINED: 1}
    shard.answer(hit=5)
    assert seen[Cause.SPECULATIVE] == 1
    shard.now += 10
    first, second = shard.route(), shard.route()
    shard.finish(first, hit=3)
    assert seen[Cause.RACE] == 1
    shard.finish(second, hit=3)
    assert seen[Cause.RACE] == 2
    shard.now += 0.1
    shard.finish(shard.route(), hit=3)
    assert seen[Cause.RACE] == 3, "the last events of the one before may have been under way"
    shard.now += 10
    shard.finish(shard.route(predicted=0), hit=6)
    assert seen[Cause.RACE] == 4, "the index knew by the time it was told"
    shard.now += 10
    shard.store(2, **ON_CPU)
    request = shard.route(tokens=[7] * 3 * SIZE)
    shard.finish(request, hit=2)
    assert seen[Cause.CONNECTOR] == 1
    shard.now += 10
    request = shard.route()
    shard.clear()
    shard.finish(request, hit=0)
    assert seen[Cause.RESET] == 1
    assert sum(seen.values()) == 8


def test_differences_of_inexact_engines_have_that_for_a_cause() -> None:
    shard = doubtful_shard()
    shard.answer(hit=3)
    assert shard.healing.differences == {Cause.INEXACT: 1}


def test_hits_that_never_come_are_named() -> None:
    shard = exact_shard()
    for _ in range(REPEATED - 1):
        shard.answer(hit=0)
    assert shard.findings == []
    shard.answer(hit=0)
    assert shard.findings == ["zero-hits"]
    shard.answer(hit=6)
    shard.answer(hit=0)
    assert shard.findings == ["zero-hits"]


# -- elsewhere ---------------------------------------------------------------------------------------------------------


def test_a_copy_of_the_index_elsewhere_is_told() -> None:
    shard = doubtful_shard()
    numbers = itertools.count(1)
    projection = Projection(shard.residency, partitions=1, new_number=lambda: next(numbers))
    shard.answer(hit=2)
    keys = shard.keys()
    place = shard.residency.places(ENGINE)[0, Medium.GPU]
    (write,) = projection.take(ENGINE)
    told = {
        (slot.number, key): copies for slot in write.slots for key, copies in zip(slot.keys, slot.copies, strict=True)
    }
    live, doubtful = projection.number(place.live), projection.number(place.doubts[0])
    assert told == {
        (live, keys[0]): 1,
        (live, keys[1]): 1,
        (live, keys[2]): 0,
        (doubtful, keys[0]): 0,
        (doubtful, keys[1]): 0,
        (doubtful, keys[2]): 0,
    }
