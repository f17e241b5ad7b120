"""What owners write arrives once, whatever is repeated, late, refused or lost on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvatlas_common.words import EngineId
from kvatlas_indexer.adapters.redis_client import RedisClient, Request, StoreUnavailable
from kvatlas_indexer.adapters.redis_store import RedisStore
from kvatlas_indexer.adapters.redis_writes import ATOMIC_MAX, Flush, Outcome, Position
from kvatlas_indexer.core.projection import SlotWrite, Write
from kvatlas_loadtest.valkey import Valkey
from tests.integration.redis_kit import SOON, START, A, B, fresh_prefix, opened, own, put, read, stored, table, writes

KEYS = [0, 1, 2, 3, 5, 255, 0x0D0A_0D0A_0D0A_0D0A, 2**63, 2**64 - 1]
SLOTS = [1, 256, 0x0001_0101, 0x0101_0101, 0x0101_0102, 0x0D0A_2431, 2**32 - 1]
"""Numbers whose bytes look like those of each other's records, shifted."""


async def test_a_write_reads_back(url: str) -> None:
    async with stored(url) as store:
        await own(store, A)
        await put(store, A, {7: {1: 1, 2: 2, 6: 255}, 8: {2: 1}})
        assert read(await store.lookup([1, 2, 6, 9])) == [{7: 1}, {7: 2, 8: 1}, {7: 255}, {}]
        assert await table(store, [7, 8]) == {(7, 1): 1, (7, 2): 2, (7, 6): 255, (8, 2): 1}
        await put(store, A, {7: {1: 0, 2: 0}})
        assert read(await store.lookup([1, 2, 6])) == [{}, {8: 1}, {7: 255}]


async def test_a_slot_without_blocks_is_no_reason_to_refuse_the_others(url: str) -> None:
    async with stored(url) as store:
        await own(store, A)
        for whole in (True, False):
            empty, full = SlotWrite(7, [], b""), SlotWrite(8, [store.partitions], b"\1")
            given = [Write(A, 0, (empty, full)), *(Write(A, p, (empty,)) for p in range(1, store.partitions))]
            assert set(await store.write(given, 1, START, whole=whole)) == {Outcome.OK}
        assert read(await store.lookup([store.partitions])) == [{8: 1}]


async def test_a_block_nobody_holds_leaves_nothing_behind(single: Valkey) -> None:
    async with opened(single.url) as client:
        store = RedisStore(client)
        await own(store, A)
        await put(store, A, {7: {1: 1}, 8: {1: 1}})
        await put(store, A, {7: {1: 0}, 8: {1: 0}})
        assert await client.command(0, "KEYS", client.key(0, "b*")) == []


async def test_a_record_is_not_found_across_two_others(url: str) -> None:
    """0x00010101 with one copy reads 00 01 01 01 01: the slot 0x01010101 is not in it."""
    async with stored(url) as store:
        await own(store, A)
        await put(store, A, {0x0001_0101: {1: 1}, 0x0101_0000: {1: 1}})
        await put(store, A, {0x0101_0101: {1: 0}})
        assert await table(store, SLOTS) == {(0x0001_0101, 1): 1}
        await put(store, A, {0x0101_0101: {1: 3}})
        await put(store, A, {0x0001_0101: {1: 0}})
        assert read(await store.lookup([1])) == [{0x0101_0000: 1, 0x0101_0101: 3}]


async def test_who_has_been_replaced_writes_nothing_in_any_partition(url: str) -> None:
    prefix = fresh_prefix()
    async with stored(url, prefix) as old, stored(url, prefix) as new:
        await own(old, A)
        await put(old, A, {7: dict.fromkeys(range(8), 1)}, position=Position(1, 4, 2.5, 99))
        assert await new.raise_fence(A, 2) == [Position(1, 4, 2.5, 99)] * new.partitions
        await put(old, A, {7: {1: 0, 9: 1}}, expect=Outcome.FENCED)
        await put(old, A, {7: {1: 0}}, whole=True, expect=Outcome.FENCED)
        assert await old.positions([(A, 1)]) == {A: [Outcome.FENCED] * old.partitions}
        assert await old.raise_fence(A, 1) is None
        await put(new, A, {7: {9: 1}}, fence=2)
        assert await table(new, [7]) == {(7, key): 1 for key in [*range(8), 9]}


async def test_a_wiped_store_is_noticed_and_published_again(url: str) -> None:
    async with opened(url) as client:
        store = RedisStore(client)
        await own(store, A)
        await store.put_records({str(A): (1, b"{}")})
        await put(store, A, {7: dict.fromkeys(range(9), 1)})
        await forget_all(client)
        assert await store.positions([(A, 1)]) == {A: [Outcome.BEHIND] * store.partitions}
        await put(store, A, {7: {1: 1}}, expect=Outcome.BEHIND)
        assert (await store.lookup(range(4))).lost == frozenset(range(store.partitions))
        assert await table(store, [7]) == {}
        await put(store, A, {8: dict.fromkeys(range(9), 1)}, whole=True)
        assert await store.positions([(A, 1)]) == {A: [Outcome.OK] * store.partitions}
        await put(store, A, {8: {1: 0}})
        assert await table(store, [8]) == {(8, key): 1 for key in (0, *range(2, 9))}


async def test_a_fail_over_that_lost_writes_is_noticed_even_between_two_messages(url: str) -> None:
    """The sequence does not tell: both writes carry the same."""
    async with opened(url) as client:
        store = RedisStore(client)
        await own(store, A)
        states = [await client.command(p, "DUMP", client.key(p, f"s{A}")) for p in range(store.partitions)]
        await put(store, A, {7: {1: 1}})
        for partition, state in enumerate(states):
            await client.command(partition, "RESTORE", client.key(partition, f"s{A}"), 0, state, "REPLACE")
        assert await store.positions([(A, 1)]) == {A: [Outcome.BEHIND] * store.partitions}
        await put(store, A, {7: {2: 1}}, expect=Outcome.BEHIND)


async def test_a_large_write_goes_in_parts_and_is_trusted_only_when_whole(url: str) -> None:
    prefix = fresh_prefix()
    async with stored(url, prefix) as store, stored(url, prefix) as other:
        await own(store, A)
        many = {key: 1 + key % 3 for key in range(5 * ATOMIC_MAX * store.partitions)}
        await put(store, A, {7: many, 8: {3: 1}}, position=Position(1, 9, 2.0, 3))
        assert await table(store, [7, 8]) == {**{(7, key): copies for key, copies in many.items()}, (8, 3): 1}
        first = list(range(5 * ATOMIC_MAX))
        assert read(await store.lookup(first)) == [{7: many[key]} | ({8: 1} if key == 3 else {}) for key in first]
        assert await other.raise_fence(A, 2) == [Position(1, 9, 2.0, 3)] * store.partitions


async def test_a_publication_that_broke_off_is_not_trusted(single: Valkey) -> None:
    prefix = fresh_prefix()
    async with opened(single.url, prefix) as client, stored(single.url, prefix) as other:
        store = RedisStore(client)
        await own(store, A)
        sent = recorded(client)
        await put(store, A, {7: dict.fromkeys(range(3 * ATOMIC_MAX), 1)}, whole=True)
        await forget_all(client)
        parts = sent[-1].data
        await client.round([Request(0, parts[:-1], len(parts) - 1)])
        assert await store.positions([(A, 1)]) == {A: [Outcome.BEHIND]}
        await put(store, A, {7: {1: 0}}, expect=Outcome.BEHIND)
        assert await other.raise_fence(A, 2) == [None]
        await put(other, A, {7: {1: 0}}, fence=2, expect=Outcome.BEHIND)
        await put(other, A, {9: {1: 1}}, fence=2, whole=True)
        assert await other.positions([(A, 2)]) == {A: [Outcome.OK]}


async def test_what_a_stopped_server_does_late_changes_nothing(single: Valkey) -> None:
    """The write that timed out is carried out after all, and after the one that took its place."""
    prefix = fresh_prefix()
    async with opened(single.url, prefix, timeouts=SOON) as client, stored(single.url, prefix) as reader:
        store = RedisStore(client)
        await own(store, A)
        sent = recorded(client)
        single.pause()
        try:
            with pytest.raises(StoreUnavailable):
                await put(store, A, {7: {1: 1, 2: 1}})
        finally:
            single.resume()
        late = sent[-1]
        async with asyncio.timeout(30):
            while await table(reader, [7]) == {}:  # it is carried out when the server goes on
                await asyncio.sleep(0.01)
        await put(store, A, {7: {1: 0, 2: 2}})
        ((reply,),) = await client.round([late])
        assert Outcome(reply[0]) is Outcome.BEHIND
        assert await table(store, [7]) == {(7, 2): 2}


async def test_scripts_a_server_does_not_know_are_loaded_again(url: str) -> None:
    async with opened(url) as client:
        store = RedisStore(client)
        await own(store, A)
        for partition in range(client.partitions):
            await client.command(partition, "SCRIPT", "FLUSH")
        await put(store, A, {7: dict.fromkeys(range(4), 1)})
        assert len(await table(store, [7])) == 4


async def test_many_engines_in_one_round(url: str) -> None:
    async with stored(url) as store:
        engines = [EngineId(f"10.0.0.{i}:8000") for i in range(20)]
        for engine in engines:
            await own(store, engine)
        flushes = [
            Flush(write, 1, START)
            for i, engine in enumerate(engines)
            for write in writes(store, engine, {100 + i: {1: 1, 2: 1, i + 10: 1}})
        ]
        assert set(await store.write_all(flushes)) == {Outcome.OK}
        first, second = read(await store.lookup([1, 2]))
        assert first == second == {100 + i: 1 for i in range(20)}
        assert await store.positions([(e, 1) for e in engines]) == {e: [Outcome.OK] * store.partitions for e in engines}


# -- against a naive model ---------------------------------------------------------------------------------------------


@dataclass
class Model:
    """Two shards, two engines, a few keys and slots; plain dictionaries beside the store."""

    blocks: dict[tuple[int, int], int] = field(default_factory=dict)  # (slot, key) -> copies
    fence: dict[EngineId, int] = field(default_factory=dict)
    owner: dict[EngineId, int] = field(default_factory=dict)
    position: dict[EngineId, Position] = field(default_factory=dict)


blocks = st.dictionaries(st.sampled_from(KEYS), st.sampled_from([0, 1, 1, 2, 255]), max_size=6)
slot_writes = st.dictionaries(st.sampled_from(SLOTS), blocks, max_size=3)
shards = st.integers(0, 1)
engines = st.sampled_from([A, B])
steps = st.one_of(
    st.tuples(st.just("write"), shards, engines, slot_writes),
    st.tuples(st.just("write"), shards, engines, slot_writes),
    st.tuples(st.just("whole"), shards, engines, slot_writes),
    st.tuples(st.just("take"), shards, engines),
    st.tuples(st.just("again"), st.integers(1, 4)),
)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(script=st.lists(steps, min_size=4, max_size=20))
async def test_equal_to_a_naive_model(url: str, script: list[tuple[Any, ...]]) -> None:
    prefix, model = fresh_prefix(), Model()
    async with opened(url, prefix) as one, opened(url, prefix) as two:
        stores, sent = [RedisStore(one), RedisStore(two)], [*map(recorded, (one, two))]
        for number, (kind, *what) in enumerate([("take", 0, A), ("take", 0, B), *script], 1):
            if kind == "take":
                await take(model, stores, *what)
            elif kind == "again":
                past = [r for requests in sent for r in requests][-what[0] :]
                await one.round(past)  # a write carried out twice, or late: it changes nothing
            else:
                await write(model, stores, number, kind == "whole", *what)
            assert await table(stores[0], SLOTS) == model.blocks
        found = [read(await stores[1].lookup([key]))[0] for key in KEYS]
        assert found == [{s: c for (s, k), c in model.blocks.items() if k == key} for key in KEYS]


async def take(model: Model, stores: list[RedisStore], shard: int, engine: EngineId) -> None:
    fence = model.fence[engine] = model.fence.get(engine, 0) + 1
    model.owner[engine] = shard
    known = [model.position.get(engine)] * stores[shard].partitions
    assert await stores[shard].raise_fence(engine, fence) == known
    if None in known:
        model.position[engine] = START
        await put(stores[shard], engine, {}, fence=fence, whole=True)


async def write(  # noqa: PLR0917
    model: Model,
    stores: list[RedisStore],
    seq: int,
    whole: bool,
    shard: int,
    engine: EngineId,
    slots: dict[int, dict[int, int]],
) -> None:
    mine = model.owner[engine] == shard
    fence = model.fence[engine] - (0 if mine else 1)
    position = Position(1, seq, seq / 3, seq)
    outcomes = await stores[shard].write(writes(stores[shard], engine, slots), fence, position, whole=whole)
    if not mine:
        assert set(outcomes) <= {Outcome.FENCED, Outcome.BEHIND}  # BEHIND: it never owned the engine
        return
    assert set(outcomes) == {Outcome.OK}
    model.position[engine] = position
    for slot, copies in slots.items():
        model.blocks |= {(slot, key): count for key, count in copies.items()}
    model.blocks = {at: count for at, count in model.blocks.items() if count}


# -- within ------------------------------------------------------------------------------------------------------------


def recorded(client: RedisClient) -> list[Request]:
    """The writes a client sends from now on, as they were sent."""
    sent: list[Request] = []
    send = client.round

    async def remember(requests: Sequence[Request], *, timeout_s: float | None = None) -> list[list[Any]]:
        sent.extend(r for r in requests if b"normal" in b"".join(r.data) or b"whole" in b"".join(r.data))
        return await send(requests, timeout_s=timeout_s)

    client.round = remember  # type: ignore[method-assign]
    return sent


async def forget_all(client: RedisClient) -> None:
    """As after a wipe: none of this test's keys is left."""
    for partition in range(client.partitions):
        if names := await client.command(partition, "KEYS", client.key(partition, "*")):
            await client.command(partition, "DEL", *names)
