"""One behaviour of every residency store: in memory, on one Valkey, on a cluster of three.

What is written to the residency is what any reader of the store finds: who holds a block, how many copies, and how many
leading blocks of a prompt each engine would serve.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvatlas_common.matching import EngineMatch, Holder
from kvatlas_common.words import EngineId, Medium
from kvatlas_indexer.adapters.redis_store import RedisStore
from kvatlas_indexer.adapters.redis_writes import Flush, Outcome
from kvatlas_indexer.core.match import EngineGroups, Plan
from kvatlas_indexer.core.projection import Projection, Write
from kvatlas_indexer.core.records import EngineRecord, PlaceRecord
from kvatlas_indexer.core.residency import Residency
from kvatlas_indexer.core.shared import SharedFleet
from kvatlas_loadtest.bench.redis_rows import MODEL, record
from tests.integration.redis_kit import START, A, B, opened

ENGINES = (A, B)
GPU, CPU = Medium.GPU, Medium.CPU


class Store(Protocol):
    @property
    def residency(self) -> Residency: ...

    async def holders(self, key: int) -> list[Holder]: ...

    async def match(self, keys: Sequence[int]) -> list[EngineMatch]: ...


@dataclass
class Memory:
    residency: Residency

    async def holders(self, key: int) -> list[Holder]:
        return self.residency.holders(key)

    async def match(self, keys: Sequence[int]) -> list[EngineMatch]:
        plan = Plan([EngineGroups(e, True, self.residency.places(e), {}, 16) for e in ENGINES])
        return list(plan.match(self.residency.masks(keys)).matches)


@dataclass
class Shared:
    """An owner writes its residency; a reader knows only what is in the store."""

    residency: Residency
    store: RedisStore
    projection: Projection

    async def holders(self, key: int) -> list[Holder]:
        shared = await self._flushed()
        return list(shared.holders(MODEL, (await self.store.lookup([key])).values[0]))

    async def match(self, keys: Sequence[int]) -> list[EngineMatch]:
        shared = await self._flushed()
        (plan,) = shared.plan(MODEL)[0].values()
        return list(plan.match(shared.masks((await self.store.lookup(keys)).values)).matches)

    async def _flushed(self) -> SharedFleet:
        shared = SharedFleet(self._record(engine) for engine in ENGINES)  # it gives the slots their numbers
        flushes = [Flush(write, 1, START) for engine in ENGINES for write in self.projection.take(engine)]
        assert set(await self.store.write_all(flushes)) <= {Outcome.OK}
        return shared

    def _record(self, engine: EngineId) -> EngineRecord:
        number = self.projection.number
        places = [
            PlaceRecord(
                group, medium, number(p.live), [*map(number, p.doubts)], [s.doubtful_since or 0.0 for s in p.doubts]
            )
            for (group, medium), p in self.residency.places(engine).items()
        ]
        return msgspec.structs.replace(record(engine, 0), places=places)


@asynccontextmanager
async def made(kind: str, request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if kind == "memory":
        yield Memory(Residency())
        return
    servers = [request.getfixturevalue("single")] if kind == "single" else request.getfixturevalue("cluster")
    url = servers[0].url if kind == "single" else f"redis+cluster://{servers[0].address}"
    async with opened(url) as client:
        store, residency = RedisStore(client), Residency()
        for engine in ENGINES:
            await store.raise_fence(engine, 1)
            empty = [Write(engine, partition, ()) for partition in range(store.partitions)]
            await store.write(empty, 1, START, whole=True)
        numbers: Iterator[int] = iter(await store.allocate_slots(1000))
        yield Shared(residency, store, Projection(residency, partitions=store.partitions, new_number=numbers.__next__))


@pytest.fixture(params=["memory", "single", "cluster"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_copies_are_counted(kind: str, request: pytest.FixtureRequest) -> None:
    async with made(kind, request) as store:
        store.residency.store(A, 0, GPU, [1, 2, 1])
        assert await store.holders(1) == [Holder(A, 0, GPU, 2)]
        store.residency.remove(A, 0, GPU, [1, 2])
        assert await store.holders(1) == [Holder(A, 0, GPU, 1)]
        assert await store.holders(2) == []


async def test_a_clear_forgets_one_engine_in_the_media_it_names(kind: str, request: pytest.FixtureRequest) -> None:
    async with made(kind, request) as store:
        for engine in ENGINES:
            store.residency.store(engine, 0, GPU, range(700))
            store.residency.store(engine, 0, CPU, range(10))
        assert {m.engine: m.blocks for m in await store.match(range(800))} == {A: 700, B: 700}
        store.residency.clear(A, [GPU])
        assert {m.engine: m.blocks for m in await store.match(range(800))} == {A: 10, B: 700}
        store.residency.store(A, 0, GPU, range(10, 12))
        (of_a,) = [m for m in await store.match(range(800)) if m.engine == A]
        assert (of_a.blocks, of_a.media) == (12, {CPU: 10, GPU: 2})


async def test_doubtful_entries_count_until_they_expire(kind: str, request: pytest.FixtureRequest) -> None:
    async with made(kind, request) as store:
        store.residency.store(A, 0, GPU, range(5))
        store.residency.doubt(A, 10.0)
        store.residency.store(A, 0, GPU, [0])
        assert await store.holders(0) == [Holder(A, 0, GPU, 1)]
        assert await store.holders(1) == [Holder(A, 0, GPU, 1, doubtful=True)]
        assert [(m.blocks, m.doubtful) for m in await store.match(range(9))] == [(5, 4)]
        store.residency.expire_doubts(11.0)
        assert [(m.blocks, m.doubtful) for m in await store.match(range(9))] == [(1, 0)]


some_keys = st.lists(st.integers(0, 12), min_size=1, max_size=8)
steps = st.one_of(
    st.tuples(st.sampled_from(["store", "remove"]), st.sampled_from(ENGINES), st.sampled_from([GPU, CPU]), some_keys),
    st.tuples(st.just("clear"), st.sampled_from(ENGINES), st.sampled_from([GPU, CPU]), st.just([0])),
    st.tuples(st.just("look"), st.just(A), st.just(GPU), st.just([0])),
)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(script=st.lists(steps, max_size=25))
async def test_equal_to_counting(kind: str, request: pytest.FixtureRequest, script: list[tuple[Any, ...]]) -> None:
    async with made(kind, request) as store:
        held: Counter[tuple[EngineId, Medium, int]] = Counter()
        for what, engine, medium, keys in [*script, ("look", A, GPU, [0])]:
            if what == "store":
                store.residency.store(engine, 0, medium, keys)
                held.update((engine, medium, key) for key in keys)
            elif what == "remove":
                store.residency.remove(engine, 0, medium, keys)
                held.subtract((engine, medium, key) for key in keys if held[engine, medium, key] > 0)
                held = +held
            elif what == "clear":
                store.residency.clear(engine, [medium])
                held = Counter({at: n for at, n in held.items() if at[:2] != (engine, medium)})
            else:
                depth = {e: next(i for i in range(14) if not any(held[e, m, i] for m in Medium)) for e in ENGINES}
                found = {match.engine: match.blocks for match in await store.match(range(13))}
                assert found == {e: n for e, n in depth.items() if n}
                for key in range(13):
                    holders = {(h.engine, h.medium): h.copies for h in await store.holders(key)}
                    assert holders == {(e, m): n for (e, m, k), n in held.items() if k == key}
