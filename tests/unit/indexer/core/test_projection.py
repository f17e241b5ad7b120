"""What is written to a shared store is what the residency holds, whatever happens in between: against a dictionary as
the store, with writes that fail, arrive twice or not at all, owners that die, and stores that lose everything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.core.projection import COPIES_MAX, Projection, Write
from kvatlas_indexer.core.residency import Residency

A, B = EngineId("10.0.0.1:8000"), EngineId("10.0.0.2:8000")
GPU = Medium.GPU
Table = dict[tuple[int, Medium, int], int]


class Store:
    """Blocks by slot number, and the record of each engine: (group, medium) -> its slot numbers, oldest first."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[int, int], int] = {}  # (slot number, key) -> copies
        self.records: dict[EngineId, dict[tuple[int, Medium], list[int]]] = {}

    def write(self, writes: Iterable[Write], *, partition: int | None = None) -> None:
        for write in writes:
            for slot in write.slots if partition in (None, write.partition) else ():
                for key, copies in zip(slot.keys, slot.copies, strict=True):
                    if copies:
                        self.blocks[slot.number, key] = copies
                    else:
                        self.blocks.pop((slot.number, key), None)

    def table(self, engine: EngineId) -> Table:
        places = self.records.get(engine, {})
        return {
            (group, medium, key): copies
            for (group, medium), numbers in places.items()
            for (number, key), copies in self.blocks.items()
            if number in numbers
        }


def projected(partitions: int = 1, **options: int) -> tuple[Residency, Projection]:
    residency, numbers = Residency(), count(1)
    return residency, Projection(residency, partitions=partitions, new_number=numbers.__next__, **options)


def test_only_what_was_touched_is_written_and_as_it_is_now() -> None:
    residency, projection = projected()
    residency.store(A, 0, GPU, [1, 2, 3, 3])
    (write,) = projection.take(A)
    assert {k: c for s in write.slots for k, c in zip(s.keys, s.copies, strict=True)} == {1: 1, 2: 1, 3: 2}
    residency.store(A, 0, GPU, [4])
    residency.remove(A, 0, GPU, [1, 4])
    (write,) = projection.take(A)
    assert {k: c for s in write.slots for k, c in zip(s.keys, s.copies, strict=True)} == {1: 0, 4: 0}
    assert projection.take(A) == []
    assert projection.waiting() == []


def test_a_slot_without_blocks_is_no_write() -> None:
    residency, projection = projected()
    residency.store(A, 0, GPU, [1])
    residency.remove(A, 0, GPU, [1])
    residency.remove(A, 0, GPU, [])
    projection.take(A)
    projection.publish_again(A)
    assert projection.whole([A]) == {A: []}
    residency.remove(A, 0, GPU, [])
    assert projection.take(A) == []


def test_blocks_go_to_their_partitions() -> None:
    residency, projection = projected(partitions=4)
    residency.store(A, 0, GPU, range(100))
    writes = projection.take(A)
    assert sorted(write.partition for write in writes) == [0, 1, 2, 3]
    assert all(key % 4 == write.partition for write in writes for slot in write.slots for key in slot.keys)


def test_a_slot_that_was_retired_before_it_was_written_is_not_written() -> None:
    residency, projection = projected()
    residency.store(A, 0, GPU, [1])
    projection.number(residency.places(A)[0, GPU].live)
    residency.clear(A)
    assert projection.take(A) == []
    assert projection.take_retired() == [1]
    assert projection.take_retired() == []


def test_slots_that_go_to_another_owner_are_not_reported_dead() -> None:
    residency, projection = projected()
    for engine in (A, B):
        residency.store(engine, 0, GPU, [1])
        projection.take(engine)
        residency.clear(engine)
    projection.forget_retired(A)
    assert projection.take_retired() == [2]


def test_too_much_to_remember_becomes_everything() -> None:
    residency, projection = projected(pending_max=10)
    residency.store(A, 0, GPU, range(10))
    assert not projection.is_whole(A)
    residency.store(A, 0, GPU, [10])
    assert projection.is_whole(A)
    ((write,),) = projection.whole([A]).values()
    assert len(write) == 11


def test_what_is_published_again_is_under_new_numbers_and_the_old_are_dead() -> None:
    residency, projection = projected()
    residency.store(A, 0, GPU, [1])
    residency.doubt(A, 1.0)
    residency.store(A, 0, GPU, [2])
    before = {slot.number for write in projection.take(A) for slot in write.slots}
    projection.publish_again(A)
    projection.renumber([A])
    ((write,),) = projection.whole([A]).values()
    after = {slot.number for slot in write.slots}
    assert len(before) == len(after) == 2
    assert not before & after
    assert set(projection.take_retired()) == before
    assert projection.waiting() == []


def test_more_copies_than_a_byte_holds_are_as_many_as_it_holds() -> None:
    residency, projection = projected()
    residency.store(A, 0, GPU, [1] * 300)
    (write,) = projection.take(A)
    assert write.slots[0].copies == bytes([COPIES_MAX])


keys = st.lists(st.integers(0, 20), min_size=1, max_size=6)
engines = st.sampled_from([A, B])
media = st.sampled_from([Medium.GPU, Medium.CPU])


class Owner(RuleBasedStateMachine):
    """One owner after the other, over one store. At any time, all that is pending once written, the store equals the
    residency; and whoever reads the store back has what the owner had when it wrote last.
    """

    @initialize(partitions=st.integers(1, 3), pending_max=st.sampled_from([3, 1000]))
    def begin(self, partitions: int, pending_max: int) -> None:
        self.partitions, self.pending_max = partitions, pending_max
        self.numbers: Iterator[int] = count(1)
        self.store = Store()
        self.late: list[Write] = []
        self.begun()

    def begun(self) -> None:
        self.residency = Residency()
        self.projection = Projection(
            self.residency,
            partitions=self.partitions,
            new_number=self.numbers.__next__,
            pending_max=self.pending_max,
        )

    @rule(engine=engines, medium=media, keys=keys)
    def stored(self, engine: EngineId, medium: Medium, keys: list[int]) -> None:
        self.residency.store(engine, 0, medium, keys)

    @rule(engine=engines, medium=media, keys=keys)
    def removed(self, engine: EngineId, medium: Medium, keys: list[int]) -> None:
        self.residency.remove(engine, 0, medium, keys)

    @rule(engine=engines, medium=media)
    def cleared(self, engine: EngineId, medium: Medium) -> None:
        self.residency.clear(engine, [medium])

    @rule(engine=engines)
    def doubted(self, engine: EngineId) -> None:
        self.residency.doubt(engine, 5.0)

    @rule()
    def doubts_expire(self) -> None:
        self.residency.expire_doubts(10.0)

    @rule(engine=engines, names=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=3))
    def renamed(self, engine: EngineId, names: list[tuple[int, int]]) -> None:
        self.residency.rename(engine, names)

    @rule()
    def swept(self) -> None:
        while self.residency.sweep():
            pass

    @rule()
    def flushed(self) -> None:
        self.flush()
        for engine in (A, B):
            assert self.store.table(engine) == self.residency.table(engine)

    @rule(partition=st.integers(0, 2))
    def a_write_fails_half_way(self, partition: int) -> None:
        """Some partitions have it, nobody knows which: it is written again."""
        for engine in self.projection.waiting():
            if self.projection.is_whole(engine):
                continue
            self.record(engine)
            writes = self.projection.take(engine)
            self.store.write(writes, partition=partition)
            self.projection.put_back(engine, writes)

    @rule()
    def the_store_loses_everything(self) -> None:
        self.store = Store()
        for engine in (A, B):
            self.projection.publish_again(engine)

    @rule()
    def the_owner_dies_and_another_takes_over(self) -> None:
        self.flush()
        before = {engine: self.residency.table(engine) for engine in (A, B)}
        store = self.store
        self.begun()
        for engine, places in store.records.items():
            for at, numbers in places.items():
                for number in numbers:
                    held = {key: c for (n, key), c in store.blocks.items() if n == number}
                    since = None if number == numbers[-1] else 5.0
                    self.residency.restore(engine, at, held, number=number, since=since)
        assert {engine: self.residency.table(engine) for engine in (A, B)} == before
        assert not any(self.projection.take(engine) for engine in (A, B)), "it is all in the store already"

    def teardown(self) -> None:
        self.flushed()

    def flush(self) -> None:
        again = [engine for engine in self.projection.waiting() if self.projection.is_whole(engine)]
        self.projection.renumber(again)
        for engine in (A, B):
            self.record(engine)
        for writes in self.projection.whole(again).values():
            self.store.write(writes)
        for engine in self.projection.waiting():
            self.store.write(self.projection.take(engine))
        dead = set(self.projection.take_retired())
        self.store.blocks = {at: copies for at, copies in self.store.blocks.items() if at[0] not in dead}

    def record(self, engine: EngineId) -> None:
        places = self.residency.places(engine)
        self.store.records[engine] = {at: [self.projection.number(s) for s in p.slots()] for at, p in places.items()}


TestOwner = Owner.TestCase
TestOwner.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
