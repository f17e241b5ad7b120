"""What every residency store must do, held against a dictionary of counters that nobody could get wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvatlas_common.matching import Holder
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core.residency import DOUBTS_MAX, Residency

STORES: dict[str, Callable[[], Residency]] = {"memory": Residency}
A, B = EngineId("10.0.0.1:8000"), EngineId("10.0.0.1:8000", 1)
GPU, CPU = Medium.GPU, Medium.CPU


@pytest.fixture(params=list(STORES.values()), ids=list(STORES))
def store(request: pytest.FixtureRequest) -> Residency:
    made: Residency = request.param()
    return made


def sweep_all(store: Residency) -> int:
    steps = 0
    while store.sweep():
        steps += 1
    return steps


# -- copies ------------------------------------------------------------------------------------------------------------


def test_a_block_stored_twice_is_there_until_it_is_removed_twice(store: Residency) -> None:
    store.store(A, 0, GPU, [1, 2])
    store.store(A, 0, GPU, [1])
    assert store.table(A) == {(0, GPU, 1): 2, (0, GPU, 2): 1}
    assert store.remove(A, 0, GPU, [1]) == 0
    assert store.table(A) == {(0, GPU, 1): 1, (0, GPU, 2): 1}
    assert store.remove(A, 0, GPU, [1, 2]) == 0
    assert store.table(A) == {}
    assert len(store) == 0


def test_a_block_twice_in_one_store_is_two_copies(store: Residency) -> None:
    store.store(A, 0, GPU, iter([1, 1, 1]))
    assert store.table(A) == {(0, GPU, 1): 3}
    assert store.blocks(A) == {GPU: 1}


def test_held_blocks_are_there_once_however_often_it_is_said(store: Residency) -> None:
    store.hold(A, 0, GPU, [1, 1, 2])
    store.hold(A, 0, GPU, [2])
    assert store.table(A) == {(0, GPU, 1): 1, (0, GPU, 2): 1}
    store.remove(A, 0, GPU, [2])
    assert store.table(A) == {(0, GPU, 1): 1}


def test_engines_ranks_groups_and_media_are_counted_apart(store: Residency) -> None:
    for engine in (A, B):
        store.store(engine, 0, GPU, [7])
    store.store(A, 1, GPU, [7])
    store.store(A, 0, CPU, [7])
    store.remove(A, 0, GPU, [7])
    assert store.table(A) == {(1, GPU, 7): 1, (0, CPU, 7): 1}
    assert set(store.holders(7)) == {Holder(A, 1, GPU, 1), Holder(A, 0, CPU, 1), Holder(B, 0, GPU, 1)}
    assert store.blocks(A) == {GPU: 1, CPU: 1}


def test_what_is_removed_and_was_not_there_is_counted(store: Residency) -> None:
    assert store.remove(A, 0, GPU, iter([1, 2])) == 2
    store.store(A, 0, GPU, [1])
    assert store.remove(A, 0, GPU, [1, 2, 3]) == 2
    assert store.remove(A, 0, GPU, [1]) == 1


# -- clears and deaths -------------------------------------------------------------------------------------------------


def test_a_clear_forgets_at_once_and_is_swept_up_while_stores_go_on(store: Residency) -> None:
    keys = range(200_000)
    store.store(A, 0, GPU, keys)
    store.store(B, 0, GPU, keys[:1000])
    store.clear(A)
    assert store.table(A) == {}
    assert store.blocks(A) == {}
    assert store.holders(5) == [Holder(B, 0, GPU, 1)]
    assert len(store) == len(keys)  # nothing was walked: it is all still there, and nobody reads it
    steps, expected = 0, 0
    while store.sweep():
        store.store(A, 0, GPU, [steps])
        steps += 1
        expected += 1
    assert steps > 4  # bit by bit
    assert len(store.table(A)) == expected
    assert len(store) == max(1000, expected)
    assert store.unswept == 0


def test_a_clear_may_spare_other_media(store: Residency) -> None:
    store.store(A, 0, GPU, [1])
    store.store(A, 1, GPU, [1])
    store.store(A, 0, CPU, [1])
    store.clear(A, [GPU])
    assert store.table(A) == {(0, CPU, 1): 1}


def test_bits_are_used_again(store: Residency) -> None:
    for life in range(50):
        store.store(A, 0, GPU, [life, life + 1])
        store.doubt(A, float(life))
        store.clear(A)
        assert sweep_all(store) > 0
        assert len(store) == 0
    store.store(A, 0, GPU, [1])
    assert store.masks([1])[0].bit_length() <= 2


def test_clearing_what_is_not_there_is_nothing(store: Residency) -> None:
    store.clear(A)
    store.doubt(A, 1.0)
    store.expire_doubts(2.0)
    assert not store.sweep()


# -- doubt -------------------------------------------------------------------------------------------------------------


def test_doubtful_blocks_stay_usable_until_their_time(store: Residency) -> None:
    store.store(A, 0, GPU, [1, 2])
    store.doubt(A, 100.0)
    store.store(A, 0, GPU, [3])
    assert store.in_doubt(A)
    assert store.holders(1) == [Holder(A, 0, GPU, 1, doubtful=True)]
    assert store.holders(3) == [Holder(A, 0, GPU, 1)]
    store.expire_doubts(100.0, A)
    assert len(store.table(A)) == 3
    store.expire_doubts(100.5, B)
    assert len(store.table(A)) == 3
    store.expire_doubts(100.5, A)
    assert store.table(A) == {(0, GPU, 3): 1}
    assert not store.in_doubt(A)


def test_a_store_settles_a_doubt_as_a_first_copy(store: Residency) -> None:
    store.store(A, 0, GPU, [1, 1, 2])
    store.doubt(A, 100.0)
    store.store(A, 0, GPU, [1])
    store.expire_doubts(200.0)
    assert store.table(A) == {(0, GPU, 1): 1}


def test_a_removal_takes_one_doubtful_copy(store: Residency) -> None:
    store.store(A, 0, GPU, [1, 1, 2])
    store.doubt(A, 100.0)
    assert store.remove(A, 0, GPU, [1, 2]) == 0
    assert store.holders(1) == [Holder(A, 0, GPU, 1, doubtful=True)]
    assert store.remove(A, 0, GPU, [1, 2]) == 1
    assert store.table(A) == {}


def test_a_doubtful_block_removed_twice_at_once_is_missed_once(store: Residency) -> None:
    store.store(A, 0, CPU, [1])
    store.doubt(A, 1.0)
    assert store.remove(A, 0, CPU, [1, 1]) == 1
    assert store.table(A) == {}


def test_doubts_are_bounded_and_the_oldest_goes_first(store: Residency) -> None:
    for at in range(DOUBTS_MAX + 3):
        store.store(A, 0, GPU, [at])
        store.doubt(A, float(at))
    assert sorted(key for _, _, key in store.table(A)) == list(range(3, DOUBTS_MAX + 3))


def test_nothing_held_cannot_be_doubted(store: Residency) -> None:
    store.store(A, 0, GPU, [1])
    store.remove(A, 0, GPU, [1])
    store.doubt(A, 1.0)
    assert not store.in_doubt(A)


# -- names -------------------------------------------------------------------------------------------------------------


def test_renamed_blocks_keep_their_copies_and_their_doubts(store: Residency) -> None:
    store.store(A, 0, GPU, [1, 1])
    store.store(A, 1, CPU, [1])
    store.store(B, 0, GPU, [1])
    store.doubt(A, 5.0, [CPU])
    store.rename(A, [(1, 10), (2, 20)])
    assert store.table(A) == {(0, GPU, 10): 2, (1, CPU, 10): 1}
    assert store.table(B) == {(0, GPU, 1): 1}
    assert {holder.doubtful for holder in store.holders(10)} == {True, False}


def test_a_name_taken_over_adds_up(store: Residency) -> None:
    store.store(A, 0, GPU, [1, 1, 10])
    store.rename(A, [(1, 10), (10, 10)])
    assert store.table(A) == {(0, GPU, 10): 3}
    assert store.blocks(A) == {GPU: 1}


def test_a_block_found_under_two_names_is_where_it_was_stored_last(store: Residency) -> None:
    store.store(A, 0, GPU, [1])
    store.doubt(A, 5.0)
    store.store(A, 0, GPU, [10, 10])
    store.rename(A, [(1, 10)])
    assert store.table(A) == {(0, GPU, 10): 2}
    assert [holder.doubtful for holder in store.holders(10)] == [False]
    assert store.blocks(A) == {GPU: 1}


# -- reading -----------------------------------------------------------------------------------------------------------


def test_masks_tell_holders_and_end_where_they_are_told_to(store: Residency) -> None:
    store.store(A, 0, GPU, range(300))
    place = store.place(A, 0, GPU)
    assert place is not None
    assert all(mask & place.mask for mask in store.masks(range(300)))
    assert store.masks([5, 999, 6])[1] == 0
    assert store.leading_masks([*range(140), 999, *range(140, 300)]) == store.masks(range(140))
    assert store.leading_masks(range(300)) == store.masks(range(300))
    assert store.leading_masks([]) == []


def test_after_how_many_blocks_a_bit_falls_out(store: Residency) -> None:
    third = EngineId("10.0.0.2:8000")
    for engine, blocks in ((A, [*range(5)]), (B, [0, 1]), (third, [0, 2])):
        store.store(engine, 0, GPU, blocks)
    a, b, c = (place.mask for engine in (A, B, third) if (place := store.place(engine, 0, GPU)) is not None)
    assert store.fall_outs(range(9), a | b | c) == [(1, c), (2, b), (5, a)]
    assert store.fall_outs(range(4), a | b) == [(2, b), (4, a)]
    assert store.fall_outs(range(2), a | b) == [(2, a | b)]
    assert store.fall_outs([7], a) == [(0, a)]
    assert store.fall_outs([], a) == [(0, a)]
    assert store.fall_outs(range(9), 0) == []


def test_the_version_rises_with_every_change_of_slots(store: Residency) -> None:
    seen = [store.version]

    def changes(do: Callable[[], object]) -> bool:
        do()
        seen.append(store.version)
        return seen[-1] > seen[-2]

    assert changes(lambda: store.store(A, 0, GPU, [1]))
    assert not changes(lambda: store.store(A, 0, GPU, [2]))
    assert not changes(lambda: store.expire_doubts(9.0))
    assert changes(lambda: store.doubt(A, 1.0))
    assert not changes(lambda: store.expire_doubts(0.5))
    assert changes(lambda: store.expire_doubts(2.0))
    assert changes(lambda: store.clear(A))


def test_a_buried_map_is_freed_by_the_sweep(store: Residency) -> None:
    unneeded = dict.fromkeys(range(100000), b"")
    store.bury(unneeded)
    assert len(unneeded) == 100_000
    assert sweep_all(store) > 2
    assert unneeded == {}


# -- all of it, at random ----------------------------------------------------------------------------------------------


@dataclass
class OraclePlace:
    live: Counter[int] = field(default_factory=Counter)
    doubts: list[tuple[float, Counter[int]]] = field(default_factory=list)

    def generations(self) -> list[Counter[int]]:
        return [*(counter for _, counter in self.doubts), self.live]

    def store(self, key: int) -> None:
        for _, counter in self.doubts:
            counter.pop(key, None)
        self.live[key] += 1

    def remove(self, key: int) -> bool:
        for counter in (self.live, *(counter for _, counter in self.doubts)):
            if counter[key]:
                counter[key] -= 1
                if not counter[key]:
                    del counter[key]
                return True
            del counter[key]
        return False


class Oracle:
    """Residency as its contract says it, in the plainest way."""

    def __init__(self) -> None:
        self.places: dict[tuple[EngineId, int, Medium], OraclePlace] = {}

    def of(self, engine: EngineId) -> dict[tuple[int, Medium], OraclePlace]:
        return {(group, medium): p for (owner, group, medium), p in self.places.items() if owner == engine}

    def doubt(self, engine: EngineId, now: float, media: Iterable[Medium]) -> None:
        for (_, medium), place in self.of(engine).items():
            if medium in media and place.live:
                place.doubts = [*place.doubts, (now, place.live)][-DOUBTS_MAX:]
                place.live = Counter()

    def table(self, engine: EngineId) -> dict[tuple[int, Medium, int], int]:
        return {
            (group, medium, key): copies
            for (group, medium), place in self.of(engine).items()
            for counter in place.generations()
            for key, copies in counter.items()
        }

    def blocks(self, engine: EngineId) -> dict[Medium, int]:
        counts: Counter[Medium] = Counter()
        for (_, medium), place in self.of(engine).items():
            counts[medium] += sum(map(len, place.generations()))
        return {medium: count for medium, count in counts.items() if count}


ENGINES = st.sampled_from([A, B, EngineId("[::1]:80")])
GROUPS = st.integers(0, 1)
MEDIA = st.sampled_from([GPU, CPU])
KEYS = st.integers(0, 9).map(lambda n: (n * 0x9E3779B97F4A7C15) % 2**64)
SOME = st.lists(KEYS, max_size=6)


class ResidencyMachine(RuleBasedStateMachine):
    make: Callable[[], Residency]

    def __init__(self) -> None:
        super().__init__()
        self.store_ = type(self).make()
        self.oracle = Oracle()
        self.now = 0.0

    def place(self, engine: EngineId, group: int, medium: Medium) -> OraclePlace:
        return self.oracle.places.setdefault((engine, group, medium), OraclePlace())

    @rule(engine=ENGINES, group=GROUPS, medium=MEDIA, keys=SOME)
    def store(self, engine: EngineId, group: int, medium: Medium, keys: list[int]) -> None:
        self.store_.store(engine, group, medium, iter(keys))
        for key in keys:
            self.place(engine, group, medium).store(key)

    @rule(engine=ENGINES, group=GROUPS, medium=MEDIA, keys=SOME)
    def hold(self, engine: EngineId, group: int, medium: Medium, keys: list[int]) -> None:
        self.store_.hold(engine, group, medium, keys)
        place = self.place(engine, group, medium)
        for key in keys:
            if key not in place.live:
                place.store(key)

    @rule(engine=ENGINES, group=GROUPS, medium=MEDIA, keys=SOME)
    def remove(self, engine: EngineId, group: int, medium: Medium, keys: list[int]) -> None:
        place = self.place(engine, group, medium)
        missing = [key for key in keys if not place.remove(key)]
        assert self.store_.remove(engine, group, medium, iter(keys)) == len(missing)

    @rule(engine=ENGINES, media=st.sets(MEDIA, min_size=1))
    def clear(self, engine: EngineId, media: set[Medium]) -> None:
        self.store_.clear(engine, media)
        for group, medium in self.oracle.of(engine):
            if medium in media:
                del self.oracle.places[engine, group, medium]

    @rule(engine=ENGINES, media=st.sets(MEDIA, min_size=1))
    def doubt(self, engine: EngineId, media: set[Medium]) -> None:
        self.now += 1
        self.store_.doubt(engine, self.now, media)
        self.oracle.doubt(engine, self.now, media)

    @rule(engine=st.none() | ENGINES, age=st.integers(0, 4))
    def expire_doubts(self, engine: EngineId | None, age: int) -> None:
        self.store_.expire_doubts(self.now - age, engine)
        for (owner, _, _), place in self.oracle.places.items():
            if engine in {None, owner}:
                place.doubts = [(since, c) for since, c in place.doubts if since >= self.now - age]

    @rule(engine=ENGINES, names=st.lists(st.tuples(KEYS, KEYS), max_size=3))
    def rename(self, engine: EngineId, names: list[tuple[int, int]]) -> None:
        self.store_.rename(engine, names)
        for place in self.oracle.of(engine).values():
            for old, new in names:
                for counter in place.generations():
                    if copies := counter.pop(old, 0):
                        counter[new] += copies
                for counter in [counter for counter in place.generations() if new in counter][:-1]:
                    del counter[new]

    @rule()
    def sweep(self) -> None:
        self.store_.sweep()

    @invariant()
    def they_agree(self) -> None:
        for engine in (A, B, EngineId("[::1]:80")):
            assert self.store_.table(engine) == self.oracle.table(engine)
            assert {m: n for m, n in self.store_.blocks(engine).items() if n} == self.oracle.blocks(engine)
            assert self.store_.in_doubt(engine) >= any(c for p in self.oracle.of(engine).values() for _, c in p.doubts)

    @invariant()
    def every_holder_is_told(self) -> None:
        for n in range(10):
            key = (n * 0x9E3779B97F4A7C15) % 2**64
            told = Counter((h.engine, h.group, h.medium, h.copies, h.doubtful) for h in self.store_.holders(key))
            held = Counter(
                (*at, counter[key], counter is not place.live)
                for at, place in self.oracle.places.items()
                for counter in place.generations()
                if key in counter
            )
            assert told == held


@pytest.mark.parametrize("make", STORES.values(), ids=STORES)
def test_it_agrees_with_the_oracle(make: Callable[[], Residency]) -> None:
    machine = type("Machine", (ResidencyMachine,), {"make": staticmethod(make)})
    run_state_machine_as_test(machine, settings=settings(max_examples=80, stateful_step_count=25, deadline=None))
