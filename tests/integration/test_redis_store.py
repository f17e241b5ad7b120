"""Lookups, records, slots and the sweep, on real Valkeys."""

from __future__ import annotations

import asyncio
import random

from kvatlas_indexer.adapters.redis_client import RedisClient
from kvatlas_indexer.adapters.redis_store import WINDOW_FIRST, RedisStore
from kvatlas_indexer.adapters.redis_sweep import IDLE_S, STEP_COUNT, RedisSweep, Step
from kvatlas_loadtest.valkey import Valkey
from tests.integration.redis_kit import A, B, fresh_prefix, opened, own, put, read, stored, table

HOUR_S = 3600.0


# -- lookups -----------------------------------------------------------------------------------------------------------


async def test_a_lookup_stops_in_the_window_where_a_block_is_held_by_nobody(url: str) -> None:
    rng = random.Random(7)
    keys = [rng.getrandbits(64) for _ in range(4000)]
    async with stored(url) as store:
        await own(store, A)
        await put(store, A, {5: dict.fromkeys(keys[:700], 1)})
        values = (await store.lookup(keys)).values
        assert [value is not None for value in values] == [True] * 700 + [False] * (3 * WINDOW_FIRST - 700)
        await put(store, A, {5: dict.fromkeys(keys, 1)})
        assert read(await store.lookup(keys)) == [{5: 1}] * 4000
        assert (await store.lookup([])).values == []


async def test_lookups_at_once_over_few_connections_do_not_mix(url: str) -> None:
    async with opened(url, connections_max=2) as client:
        store = RedisStore(client)
        await own(store, A)
        await put(store, A, {100 + key: {key: 1} for key in range(60)})
        found = await asyncio.gather(*(store.lookup([key]) for key in range(60)))
        assert [read(lookup) for lookup in found] == [[{100 + key: 1}] for key in range(60)]


async def test_a_cancelled_lookup_leaves_its_replies_to_nobody(url: str) -> None:
    async with opened(url, connections_max=1) as client:
        store = RedisStore(client)
        await own(store, A)
        await put(store, A, {7: dict.fromkeys(range(3000), 1), 8: {4000: 1}})
        for steps in range(12):
            task = asyncio.create_task(store.lookup(range(3000)))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert read(await store.lookup([4000])) == [{8: 1}]


async def test_a_value_that_is_not_ours_holds_nothing(single: Valkey) -> None:
    async with opened(single.url) as client:
        store = RedisStore(client)
        await own(store, A)
        await put(store, A, {7: {1: 1}})
        await client.command(0, "SET", client.key(0, "b") + (2).to_bytes(8, "big"), b"not ours")
        await client.command(0, "SET", client.key(0, "b") + b"not a key", b"12345")
        assert await table(store, [7]) == {(7, 1): 1}


# -- records -----------------------------------------------------------------------------------------------------------


async def test_records_and_their_version_reach_every_partition(url: str) -> None:
    async with stored(url) as store:
        assert await store.records() == (0, {})
        assert await store.put_records({str(A): (1, b'{"a": 1}'), str(B): (1, b'{"b": 1}')}) == frozenset()
        version, records = await store.records()
        assert records == {str(A): b'{"a": 1}', str(B): b'{"b": 1}'}
        for key in range(store.partitions):
            lookup = await store.lookup([key])
            assert (lookup.version, lookup.lost) == (version, frozenset())
        assert await store.remove_record(B, 1)
        assert await store.version() > version
        assert list((await store.records())[1]) == [str(A)]


async def test_a_record_of_an_engine_given_to_somebody_else_is_refused(url: str) -> None:
    async with opened(url) as client:
        store = RedisStore(client)
        await client.command(0, "SET", client.key(0, f"f{B.address}"), 5)
        assert await store.put_records({str(A): (1, b"a"), str(B): (4, b"late")}) == {str(B)}
        assert (await store.records())[1] == {str(A): b"a"}
        assert await store.put_records({str(B): (5, b"b")}) == frozenset()
        assert not await store.remove_record(B, 4)
        assert (await store.records())[1] == {str(A): b"a", str(B): b"b"}


async def test_versions_and_slot_numbers_rise_even_after_everything_was_lost(single: Valkey) -> None:
    async with opened(single.url) as client:
        store = RedisStore(client)
        first = await store.allocate_slots(3)
        await store.put_records({str(A): (1, b"a")})
        version = await store.version()
        again = await store.allocate_slots(2, above=first[-1] + 10)
        assert again[0] > first[-1] + 10
        await client.command(0, "DEL", client.key(0, "slot"), client.key(0, "v"), client.key(0, "engines"))
        await asyncio.sleep(0.002)  # versions count milliseconds
        await store.put_records({str(A): (1, b"a")})
        assert await store.version() > version
        assert (await store.allocate_slots(1, above=again[-1]))[0] > again[-1]


# -- the sweep ---------------------------------------------------------------------------------------------------------


async def swept(sweep: RedisSweep, live: set[int]) -> list[Step]:
    """One pass, to its end."""
    steps: list[Step] = []
    while not steps or not steps[-1].finished:
        steps.append(await sweep.step(live))
        assert steps[-1].sweeping
    return steps


async def ttls(client: RedisClient) -> list[int]:
    found: list[int] = []
    for partition in range(client.partitions):
        names = await client.command(partition, "KEYS", client.key(partition, "b*"))
        found += await client.pipeline(partition, [("TTL", name) for name in names])
    return found


async def test_a_pass_takes_out_retired_slots_and_leaves_the_rest(url: str) -> None:
    async with opened(url) as client:
        store = RedisStore(client)
        sweep = RedisSweep(client, "shard-1", block_ttl_s=HOUR_S)
        await own(store, A)
        many = range(3 * STEP_COUNT)
        await put(store, A, {7: dict.fromkeys(many, 1), 8: dict.fromkeys(range(100), 2), 9: {1: 1}})
        await store.retire([7, 9])
        await swept(sweep, {8})
        assert await table(store, [7, 8, 9]) == {(8, key): 2 for key in range(100)}
        assert len(await ttls(client)) == 100
        assert await store.unswept() == 0
        assert await sweep.step({8}) == Step(IDLE_S)


async def test_a_slot_still_in_a_record_is_left_alone(url: str) -> None:
    async with opened(url) as client:
        store = RedisStore(client)
        sweep = RedisSweep(client, "shard-1", block_ttl_s=HOUR_S)
        await own(store, A)
        await put(store, A, {7: {1: 1}, 8: {1: 1}})
        await store.retire([7, 8])
        await swept(sweep, {7})
        assert await table(store, [7, 8]) == {(7, 1): 1}
        assert await store.unswept() == 1


async def test_ttls_are_jittered_and_renewed_for_who_is_alive(url: str) -> None:
    async with opened(url) as client:
        store = RedisStore(client, block_ttl_s=1000)
        sweep = RedisSweep(client, "shard-1", block_ttl_s=HOUR_S)
        await own(store, A)
        for key in range(40):
            await put(store, A, {7 if key % 2 else 8: {key: 1}})
        before = await ttls(client)
        assert len(set(before)) > 10
        assert all(890 <= ttl <= 1100 for ttl in before)
        await swept(sweep, {7})
        after = sorted(await ttls(client))
        assert [ttl > 1100 for ttl in after] == [False] * 20 + [True] * 20
        assert all(0.89 * HOUR_S <= ttl <= 1.1 * HOUR_S for ttl in after[20:])


async def test_one_shard_sweeps_and_another_goes_on_where_it_stopped(url: str) -> None:
    prefix = fresh_prefix()
    async with opened(url, prefix) as one, opened(url, prefix) as two:
        store = RedisStore(one)
        first, second = (RedisSweep(c, n, block_ttl_s=HOUR_S) for c, n in ((one, "shard-1"), (two, "shard-2")))
        await own(store, A)
        await put(store, A, {7: dict.fromkeys(range(8 * STEP_COUNT), 1)})
        await store.retire([7])
        step = await first.step(set())
        assert (step.sweeping, step.finished) == (True, False)
        assert 0 < step.stripped < 4 * STEP_COUNT
        assert step.pause_s > 0
        assert await second.step(set()) == Step(IDLE_S)
        await one.command(0, "DEL", one.key(0, "sweeper"))  # the lock runs out
        rest = await swept(second, set())
        assert step.stripped + sum(s.stripped for s in rest) == 8 * STEP_COUNT
        assert await table(store, [7]) == {}


async def test_a_cursor_of_another_process_is_not_believed(single: Valkey) -> None:
    async with opened(single.url) as client:
        store = RedisStore(client)
        sweep = RedisSweep(client, "shard-1", block_ttl_s=HOUR_S)
        await own(store, A)
        await put(store, A, {7: dict.fromkeys(range(4 * STEP_COUNT), 1)})
        await store.retire([7])
        await sweep.step(set())
        await client.command(0, "HSET", client.key(0, "sweep"), "server", "another", "cursor", "1")
        await swept(sweep, set())
        assert await table(store, [7]) == {}


async def test_what_is_written_under_the_sweep_stays(url: str) -> None:
    """Blocks are rewritten all the while; in the end the dead are gone and every live holder is there."""
    prefix = fresh_prefix()
    async with opened(url, prefix) as client, stored(url, prefix) as writer:
        store = RedisStore(client)
        sweep = RedisSweep(client, "shard-1", block_ttl_s=HOUR_S)
        await own(store, A)
        await own(writer, B)
        keys = range(2 * STEP_COUNT)
        await put(store, A, {7: dict.fromkeys(keys, 1)})
        await store.retire([7])
        copies = dict.fromkeys(keys, 0)
        rng = random.Random(3)

        async def write() -> None:
            for _ in range(60):
                some = {key: rng.randint(0, 3) for key in rng.sample(keys, 100)}
                copies.update(some)
                await put(writer, B, {8: some})

        writing = asyncio.create_task(write())
        await swept(sweep, {8})
        await writing
        assert await table(store, [7, 8]) == {(8, key): count for key, count in copies.items() if count}
        assert await store.unswept() == 0


async def test_a_pass_comes_round_again_for_the_sake_of_the_ttl(single: Valkey) -> None:
    async with opened(single.url) as client:
        sweep = RedisSweep(client, "shard-1", block_ttl_s=HOUR_S)
        await swept(sweep, set())
        assert await sweep.step(set()) == Step(IDLE_S)
        now = int((await client.command(0, "TIME"))[0])
        await client.command(0, "HSET", client.key(0, "sweep"), "began", now - HOUR_S / 4 - 1)
        assert (await sweep.step(set())).sweeping
