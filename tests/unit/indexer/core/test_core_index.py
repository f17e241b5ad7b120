"""The index as a whole: who is known, who is believed, what a lookup answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from kvatlas_common.blocks.keys import prompt_keys
from kvatlas_common.blocks.profile import HashProfile
from kvatlas_common.engines.probe import EngineFacts
from kvatlas_common.fleet import EngineView, Health, Sync
from kvatlas_common.matching import EngineMatch, Holder
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core import index as index_module
from kvatlas_indexer.core.contracts import UnknownModel
from kvatlas_indexer.core.effects import ReplayEnd
from kvatlas_indexer.core.engine import Bounds
from kvatlas_indexer.core.index import Replay, Rules, StopReplay
from kvatlas_indexer.core.known import Known
from kvatlas_indexer.core.naming import Expected
from kvatlas_indexer.core.plans import ModelPlan
from tests.unit.indexer.core.published import SIZE, UNKNOWABLE, Publisher, profile
from tests.unit.indexer.core.world import E1, E2, LATER, OLD, PROMPT, World, spec, two_engines

# -- unknown is not empty ----------------------------------------------------------------------------------------------


def test_an_engine_never_heard_of_is_unknown_one_that_holds_nothing_is_not() -> None:
    world = two_engines()
    world.store(E1, LATER, PROMPT[:SIZE])
    assert world.matched(tokens=[9] * SIZE) == {}
    assert world.unknown(LATER) == [str(E2)]
    world.store(E2, LATER, [9] * SIZE)
    assert world.matched() == {str(E1): 1}
    assert world.unknown(LATER) == []


def test_an_idle_engine_that_says_it_published_nothing_is_empty_not_unknown() -> None:
    world = World(Rules(Expected(LATER.algorithm, LATER.seed, SIZE)))
    (asked,) = world.wants(spec(E1, replay=True))
    assert asked == Replay(E1, "tcp://e:5600", 0, 0.0)
    assert world.unknown(LATER) == [str(E1)]
    world.index.on_replay_end(E1, ReplayEnd.COMPLETE, world.now)
    assert (world.sync(E1), world.unknown(LATER), world.matched()) == (Sync.EXACT, [], {})


def test_a_restart_makes_an_engine_unknown_until_it_is_heard_again() -> None:
    world = two_engines()
    world.facts(E1, process_start_s=1.0)
    world.store(E1, LATER)
    world.now += 100
    world.facts(E1, process_start_s=world.now)
    assert str(E1) in world.unknown(LATER)
    assert world.matched() == {}


def test_a_model_nobody_serves_is_an_error() -> None:
    world = two_engines()
    with pytest.raises(UnknownModel):
        world.index.match("other", {})
    with pytest.raises(UnknownModel):
        world.index.holders("other", 1)
    world.facts(E1, Health.DOWN)
    world.facts(E2, Health.DOWN)
    assert world.index.match("m", {}).matches == ()  # served, by engines that are down


def test_while_its_models_are_not_known_an_engine_may_serve_any_and_plans_stay_bounded() -> None:
    world = World()
    world.wants(spec(E1))
    world.store(E1, LATER)
    for number in range(600):
        assert world.matched(model=f"model-{number}") == {str(E1): 5}


# -- matches -----------------------------------------------------------------------------------------------------------


def test_a_match_says_how_many_where_and_how_sure() -> None:
    world = two_engines()
    world.store(E1, LATER)
    world.store(E2, LATER, PROMPT[: 2 * SIZE], seq=7)
    keys = prompt_keys(LATER, [*PROMPT, 0]).tolist()
    found = {match.engine: match for match in world.index.match("m", {LATER.name: keys}).matches}
    assert found[E1] == EngineMatch(E1, 5, {Medium.GPU: 5}, exact=True, expected=5)
    assert found[E2] == EngineMatch(E2, 2, {Medium.GPU: 2}, exact=False, expected=2)
    only = world.index.match("m", {LATER.name: keys}, [E2])
    assert [m.engine for m in only.matches] == [E2]
    assert world.index.holders("m", keys[0]) == (Holder(E1, 0, Medium.GPU, 1), Holder(E2, 0, Medium.GPU, 1))


def test_each_engine_is_matched_by_its_own_profile() -> None:
    world = two_engines()
    world.store(E1, OLD)
    world.store(E2, LATER)
    assert world.matched(OLD) == {str(E1): 5}
    assert world.matched(LATER) == {str(E2): 5}
    assert world.unknown(OLD) == [str(E2)]  # it was not asked in its own words
    both = {p.name: prompt_keys(p, [*PROMPT, 0]).tolist() for p in (OLD, LATER)}
    answer = world.index.match("m", both)
    assert {m.engine: m.blocks for m in answer.matches} == {E1: 5, E2: 5}
    assert answer.unknown == ()


def test_an_engine_is_upgraded_from_0_10_to_0_32_in_place() -> None:
    world = two_engines()
    old = Publisher(OLD, "bare")
    world.say(E1, old.written(old.stored(PROMPT)))
    assert world.matched(OLD) == {str(E1): 5}
    assert world.index.fleet().engines[E1].profile == OLD.name
    world.now += 60
    world.store(E1, LATER, PROMPT[: 3 * SIZE], seq=0)
    assert world.index.fleet().engines[E1].profile == LATER.name
    assert world.matched(LATER) == {str(E1): 3}
    assert world.matched(OLD) == {}
    assert "restart" in world.codes()


def test_an_engine_whose_hashes_cannot_be_reproduced_is_matched_by_ours() -> None:
    world = two_engines()
    world.store(E1, profile(seed=UNKNOWABLE))
    named = world.index.fleet().engines[E1].profile
    assert named is not None
    assert world.matched(HashProfile.parse(named)) == {str(E1): 5}
    assert "hashes-not-reproducible" in world.codes()


def test_until_a_root_is_seen_the_configured_profile_is_assumed_with_the_engines_block_size() -> None:
    world = World(Rules(Expected(LATER.algorithm, LATER.seed, 16)))
    world.wants(spec(E1))
    world.store(E1, LATER, since=1, seq=5)
    view = world.index.fleet().engines[E1]
    assert (view.profile, view.profile_verified, view.block_size) == (LATER.name, False, SIZE)


def test_a_change_of_what_does_not_matter_to_matching_plans_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    world = two_engines()
    world.store(E1, LATER)
    world.matched()
    planned: list[int] = []
    plan = ModelPlan.of

    def noting_plan(engines: Iterable[tuple[Known, EngineView]]) -> ModelPlan:
        planned.append(1)
        return plan(engines)

    monkeypatch.setattr(ModelPlan, "of", noting_plan)
    world.facts(E1, root="/models/m")
    assert world.index.fleet_is_stale
    assert world.matched() == {str(E1): 5}
    assert world.index.fleet().engines[E1].root == "/models/m"
    assert planned == []
    world.facts(E1, Health.DOWN)
    assert world.matched() == {}
    assert planned == [1]


# -- who has lost what it held -----------------------------------------------------------------------------------------


def test_restarts_and_clears_are_told_and_going_or_being_told_again_is_not() -> None:
    world = two_engines()
    world.store(E1, LATER)
    world.facts(E2, process_start_s=100.0)
    world.facts(E2, process_start_s=100.0)
    assert world.emptied == []
    world.say(E1, ["AllBlocksCleared"])
    assert world.emptied == [E1]
    world.store(E1, LATER, seq=0)  # it begins again
    assert world.emptied == [E1, E1]
    world.facts(E2, process_start_s=200.0)  # it publishes nothing: only its process tells
    assert world.emptied == [E1, E1, E2]
    world.index.abandon(E1.address)
    world.wants()
    assert world.emptied == [E1, E1, E2]


# -- leases ------------------------------------------------------------------------------------------------------------


def test_a_silent_engine_nobody_can_probe_attracts_nothing_after_its_lease() -> None:
    world = World()
    world.store(E1, LATER, peer="10.0.0.1")
    world.passes(14)
    assert world.matched() == {str(E1): 5}
    world.passes(2)
    assert world.index.fleet().engines[E1].health is Health.DOWN
    assert world.matched() == {}
    world.say(E1, peer="10.0.0.1")
    assert world.matched() == {str(E1): 5}, "it was merely silent"
    world.passes(16)
    world.passes(601)
    assert world.index.fleet().engines == {}
    assert len(world.index.residency.table(E1)) == 0


def test_an_engine_that_answers_probes_needs_not_speak() -> None:
    world = two_engines()
    world.store(E1, LATER)
    for _ in range(10):
        world.passes(600)
    assert world.matched() == {str(E1): 5}


def test_an_engine_that_is_down_attracts_nothing_even_if_it_publishes() -> None:
    world = two_engines()
    world.store(E1, LATER)
    world.facts(E1, Health.DOWN)
    world.say(E1)
    assert world.matched() == {}


def test_an_engine_that_is_back_is_asked_what_it_published_meanwhile() -> None:
    world = World()
    world.wants(spec(E1, replay=True))
    world.index.on_replay_end(E1, ReplayEnd.COMPLETE, world.now)
    world.store(E1, LATER)
    world.facts(E1, Health.DOWN)
    assert world.facts(E1) == [Replay(E1, "tcp://e:5600", 0, 0.0)]
    assert world.facts(E1) == []


def test_a_dead_engine_that_is_still_wanted_is_kept_by_name_only() -> None:
    world = World()
    world.wants(spec(E1, replay=True, ranks=1))
    world.index.on_replay_end(E1, ReplayEnd.COMPLETE, world.now)
    world.store(E1, LATER)
    world.facts(E1, Health.DOWN)
    world.passes(601)
    world.passes(601)
    assert world.index.fleet().engines[E1].health is Health.DOWN
    assert world.index.residency.table(E1) == {}
    assert world.facts(E1) == [Replay(E1, "tcp://e:5600", 0, 0.0)]
    assert world.unknown(LATER) == [str(E1)]


def test_a_rank_that_is_no_longer_wanted_does_not_haunt_the_fleet() -> None:
    world = World()
    world.wants(spec(E1, ranks=2))
    world.wants(spec(E1, ranks=1))
    assert len(world.index.fleet().engines) == 2  # it may still speak
    world.facts(E1, Health.DOWN)
    world.passes(1)
    world.passes(601)
    assert list(world.index.fleet().engines) == [E1]


# -- discovery ---------------------------------------------------------------------------------------------------------


def test_an_engine_no_longer_wanted_is_forgotten_and_its_replay_stopped() -> None:
    world = World()
    world.wants(spec(E1, replay=True))
    world.store(E1, LATER)
    assert world.wants() == [StopReplay(E1)]
    assert world.index.fleet().engines == {}
    assert world.index.residency.table(E1) == {}
    assert world.index.on_replayed(E1, 0, b"", world.now) == []
    assert world.index.on_replay_end(E1, ReplayEnd.COMPLETE, world.now) == []


def test_unless_it_speaks_for_itself() -> None:
    world = World()
    world.wants(spec(E1, dialled=False))
    world.store(E1, LATER, peer="10.0.0.1")
    world.wants()
    assert world.matched() == {str(E1): 5}
    world.passes(3600)
    world.passes(3600)
    assert world.index.fleet().engines == {}


def test_a_replay_endpoint_learned_later_is_asked() -> None:
    world = World()
    world.store(E1, LATER, seq=3, peer="10.0.0.1")
    assert world.sync(E1) is Sync.INEXACT
    assert world.wants(spec(E1, replay=True, dialled=False)) == [Replay(E1, "tcp://e:5600", 0, 0.0)]
    assert world.wants(spec(E1, replay=True, dialled=False)) == []


def test_settings_of_an_engine_may_change_while_it_runs() -> None:
    world = two_engines()
    world.store(E1, LATER)
    assert world.matched() == {str(E1): 5}
    world.wants(spec(E1, speculative_drop_blocks=1), spec(E2))
    assert world.matched() == {str(E1): 4}
    world.wants(spec(E1, reannounces=True), spec(E2))
    assert world.matched() == {str(E1): 5}
    assert world.sync(E1) is Sync.INEXACT


def test_ranks_are_engines_of_their_own() -> None:
    world = World()
    rank1 = EngineId(E1.address, 1)
    asked = world.wants(spec(E1, replay=True, ranks=2))
    assert asked == [Replay(E1, "tcp://e:5600", 0, 0.0), Replay(rank1, "tcp://e:5601", 0, 0.0)]
    for engine in (E1, rank1):
        world.index.on_replay_end(engine, ReplayEnd.COMPLETE, world.now)
    world.facts(E1)
    world.store(E1, LATER, PROMPT[:SIZE], rank=0)
    world.say(rank1, Publisher(LATER).stored(PROMPT), rank=1)
    assert world.matched() == {str(E1): 1, str(rank1): 5}
    assert world.index.fleet().engines[rank1].health is Health.READY  # as rank 0 says
    world.facts(rank1, Health.DOWN)
    assert world.matched() == {str(E1): 1}


def test_the_batch_tells_the_rank_if_it_says_one_else_the_port() -> None:
    world = World()
    world.store(EngineId(E1.address, 2), LATER, peer="10.0.0.1")
    world.say(EngineId(E1.address, 0), Publisher(LATER).stored(PROMPT), peer="10.0.0.1", rank=5)
    assert [engine.rank for engine in world.index.fleet().engines] == [2, 5]


def test_engines_that_made_themselves_known_are_probed_too() -> None:
    world = World()
    world.wants(spec(E1))
    world.store(E2, LATER, peer="10.0.0.2")
    assert {wanted.address for wanted in world.index.watched()} == {E1.address, E2.address}


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_is_no_message_is_refused_and_counted() -> None:
    world = two_engines()
    index, now = world.index, world.now
    for frames in ([], [b"a"], [b"a", b"12345678"], [b"a", b"1", b"c"], [b"a", b"12345678", b"c", b"d"]):
        assert index.on_frames(frames, now, peer=None, dialled=E1, port_rank=0) == []
    index.on_frames([b"x", bytes(8), b"\xc1"], now, peer=None, dialled=E1, port_rank=0)
    index.on_frames(
        [b"no topic", bytes(8), msgspec.msgpack.encode([1.0, []])], now, peer="p", dialled=None, port_rank=0
    )
    index.on_frames([b"kv@a@m", bytes(8), b"\xc1"], now, peer="p", dialled=None, port_rank=0)
    assert index.refused == {"frames": 5, "payload": 1, "message": 2}
    assert len(index.fleet().engines) == 2


def test_garbage_claims_no_name() -> None:
    world = World()
    world.frames(b"\xc1", engine=E1, seq=0, peer="10.6.6.6")
    world.store(E1, LATER, peer="10.0.0.7")
    assert world.matched() == {str(E1): 5}


def test_a_name_in_use_or_dialled_or_of_another_model_is_refused() -> None:
    world = World()
    named = EngineId("engine-a:8000")
    world.store(named, LATER, peer="10.0.0.7")
    world.store(named, LATER, seq=0, peer="10.0.0.8")
    assert world.index.refused == {"claim": 1}
    world.wants(spec(E2))
    world.store(E2, LATER, peer="10.0.0.2")
    assert world.index.refused == {"claim": 2}
    world.index.on_facts(EngineFacts(named, Health.READY, frozenset({"other"})), world.now)
    world.say(named, peer="10.0.0.7")
    assert world.index.refused == {"claim": 3}
    assert world.codes() == ["name-claimed-twice", "name-claimed-twice", "topic-model"]


def test_engines_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "ENGINES_MAX", 2)
    world = two_engines()
    world.store(EngineId("10.0.0.3:8000"), LATER, peer="10.0.0.3")
    world.wants(spec(E1), spec(E2), spec(EngineId("10.0.0.4:8000")))
    assert world.index.refused["too-many-engines"] == 2
    assert list(world.index.fleet().engines) == [E1, E2]


# -- losses and doubts -------------------------------------------------------------------------------------------------


def test_a_loss_leaves_everything_usable_until_it_ages_out() -> None:
    world = World(Rules(bounds=Bounds(doubt_ttl_s=100)))
    world.wants(spec(E1))
    world.facts(E1)
    world.store(E1, LATER, PROMPT[: 3 * SIZE])
    world.store(E1, LATER, since=3, seq=5)
    keys = prompt_keys(LATER, [*PROMPT, 0]).tolist()
    (match,) = world.index.match("m", {LATER.name: keys}).matches
    assert (match.blocks, match.doubtful, match.exact) == (5, 3, False)
    assert (world.sync(E1), world.codes()) == (Sync.INEXACT, ["loss"])
    world.passes(90)
    assert world.matched() == {str(E1): 5}
    world.passes(20)
    assert world.matched() == {}
    assert len(world.index.residency.table(E1)) == 2


def test_a_stream_that_loses_all_the_time_forgets_nothing_before_its_time() -> None:
    world = World(Rules(bounds=Bounds(doubt_ttl_s=100)))
    world.wants(spec(E1))
    world.store(E1, LATER)
    for number in range(60):
        world.say(E1, Publisher(LATER).stored([100 + number] * SIZE), seq=5 * number + 5)
        world.passes(1)
    assert len(world.index.residency.table(E1)) == 65
    for _ in range(160):
        world.passes(1)
    assert world.index.residency.table(E1) == {}


def test_an_unreadable_replay_keeps_its_place_in_the_order() -> None:
    world = World()
    world.wants(spec(E1, replay=True))
    world.store(E1, LATER, seq=2)
    first = msgspec.msgpack.encode([1.0, [Publisher(LATER).stored(PROMPT[:SIZE])]])
    world.index.on_replayed(E1, 0, first, world.now)
    world.index.on_replayed(E1, 1, b"\xc1", world.now)
    world.index.on_replay_end(E1, ReplayEnd.COMPLETE, world.now)
    engine = world.index.engine(E1)
    assert engine is not None
    assert engine.stream.last == 2
    assert world.sync(E1) is Sync.INEXACT
    assert world.matched() == {str(E1): 5}


def test_an_unreadable_event_costs_that_event() -> None:
    world = two_engines()
    world.say(E1, ["BlockRemoved", "?"], Publisher(LATER).stored(PROMPT), 5)
    assert world.matched() == {str(E1): 5}
    assert world.codes() == ["malformed", "loss"]
    engine = world.index.engine(E1)
    assert engine is not None
    assert engine.counts["malformed"] == 2


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (["BlockStored", [1], None, [], 0, None, "TAPE"], "medium 'TAPE'"),
        (["BlockStored", [1], None, [], SIZE, None, "GPU", None, None, 3, "mamba", None], "'mamba'"),
        (["BlockStored", [1], None, [], 2 * SIZE, None, "GPU"], "blocks of"),
    ],
)
def test_what_is_not_understood_makes_an_engine_inexact_not_wrong(event: Any, why: str) -> None:
    world = two_engines()
    world.store(E1, LATER)
    assert world.sync(E1) is Sync.EXACT
    world.say(E1, event)
    view = world.index.fleet().engines[E1]
    assert view.sync is Sync.INEXACT
    assert why in view.inexact_reason
    assert world.matched() == {str(E1): 5}


def test_a_clear_empties_the_gpu_and_puts_other_media_in_doubt() -> None:
    world = two_engines()
    world.store(E1, LATER)
    world.store(E1, LATER, PROMPT[: 2 * SIZE], medium="CPU")
    assert world.sync(E1) is Sync.EXACT
    world.say(E1, ["AllBlocksCleared"])
    assert world.matched() == {str(E1): 2}
    assert world.sync(E1) is Sync.INEXACT


def test_a_store_in_the_batch_of_a_clear_comes_after_it() -> None:
    world = two_engines()
    world.store(E1, LATER)
    world.say(E1, ["AllBlocksCleared"], Publisher(LATER).stored(PROMPT[:SIZE]))
    assert world.matched() == {str(E1): 1}
    assert world.sync(E1) is Sync.EXACT


def test_blocks_are_bounded() -> None:
    world = World(Rules(bounds=Bounds(blocks_max=10)))
    world.wants(spec(E1))
    for number in range(20):
        world.store(E1, LATER, [number] * 4 * SIZE)
    assert len(world.index.residency.table(E1)) <= 2 * 10 + 4
    assert "more than 10 blocks" in world.index.fleet().engines[E1].inexact_reason


def test_blocks_that_are_announced_again_are_not_counted_twice() -> None:
    world = World()
    world.wants(spec(E1, reannounces=True))
    for _ in range(3):
        world.store(E1, LATER)
    world.say(E1, ["BlockRemoved", list(Publisher(LATER).hashes(PROMPT))[2:]])
    assert world.matched() == {str(E1): 2}


def test_two_publishers_under_one_name_are_named() -> None:
    world = two_engines()
    for turn in range(6):
        world.store(E1, LATER, [turn] * SIZE, seq=0)
    assert "name-claimed-twice" in world.codes()
    assert "two publishers" in world.index.fleet().engines[E1].inexact_reason


def test_the_kind_of_a_group_is_learned_when_it_is_said() -> None:
    world = two_engines()
    keys = Publisher(LATER).hashes(PROMPT)
    world.say(E1, ["BlockStored", keys, None, [], 0, None, "CPU"])
    world.say(E1, Publisher(LATER).stored(PROMPT) | {"kv_cache_spec_kind": "mamba"})
    assert world.sync(E1) is Sync.INEXACT


def test_an_engine_with_several_groups_needs_them_all() -> None:
    world = two_engines()
    full = Publisher(LATER).stored(PROMPT)
    window: dict[str, Any] = {"kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 5, "group_idx": 1}
    world.say(E1, full | window | {"block_hashes": full["block_hashes"][3:4]}, full)
    assert world.matched() == {str(E1): 4}
    assert world.sync(E1) is Sync.EXACT


def test_a_view_says_what_is_known() -> None:
    world = two_engines()
    world.store(E1, LATER)
    world.facts(E1, max_model_len=8192, root="/models/m")
    view = world.index.fleet().engines[E1]
    assert (view.url, view.max_model_len, view.root) == ("http://10.0.0.1:8000", 8192, "/models/m")
    assert (view.profile, view.profile_verified, view.block_size) == (LATER.name, True, SIZE)
    assert not world.index.fleet_is_stale
    assert replace(view, sync=Sync.EXACT) == view
