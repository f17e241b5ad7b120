"""The shared store, measured on a Valkey of its own, in one run with the naive way of doing the same.

Naive is what a first version would do: a set per block, `SADD` and `EXPIRE` for each block stored, `SMEMBERS` for each
looked up, in pipelines of redis-py. Both sides take turns, so that a busy machine is busy for both.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from statistics import median

import redis.asyncio

from kvatlas_common.fleet import Health, Sync
from kvatlas_common.words import EngineId
from kvatlas_indexer.adapters.redis_client import RedisClient, Timeouts, open_redis
from kvatlas_indexer.adapters.redis_store import RedisStore
from kvatlas_indexer.adapters.redis_writes import Flush, Position
from kvatlas_indexer.core.projection import SlotWrite, Write
from kvatlas_indexer.core.records import EngineRecord, NamingRecord, PlaceRecord, StreamRecord
from kvatlas_indexer.core.shared import SharedFleet
from kvatlas_loadtest.bench.deployment import valkey
from kvatlas_loadtest.bench.rows import Options, Row, at_least, at_most
from kvatlas_loadtest.valkey import Valkey

EVENT_BLOCKS = 94
PROMPT_BLOCKS = 512
WIDE_ENGINES = 256
MILLION = 1_000_000
NAIVE_TTL_S = 6 * 3600
MODEL = "tiny"


class Bench:
    """One store and one naive client on the same server."""

    def __init__(self, client: RedisClient, naive: redis.asyncio.Redis, rng: random.Random) -> None:
        self._client = client
        self._store = RedisStore(client)
        self._naive = naive
        self._rng = rng
        self._seq = 0

    async def rows(self) -> list[Row]:
        engine = EngineId("10.0.0.1:8000")
        await self._own(engine)
        ingest = await self._ingest(engine)
        lookups = await self._lookups(engine)
        wide = await self._wide()
        memory = await self._memory(engine)
        return [*ingest, *lookups, wide, *memory]

    # -- writing -------------------------------------------------------------------------------------------------------

    async def _ingest(self, engine: EngineId, events: int = 300, rounds: int = 5) -> list[Row]:
        """Blocks per second of one writer that waits for each event's write; the best of several turns."""
        ours, theirs, cpu = [], [], []
        for _ in range(rounds):
            batches = [self._keys(EVENT_BLOCKS) for _ in range(events)]
            used, began = await self._cpu(), time.perf_counter()
            for keys in batches:
                await self._write([self._flush(engine, 1, keys)])
            ours.append(events * EVENT_BLOCKS / (time.perf_counter() - began))
            cpu.append((await self._cpu() - used) / (events * EVENT_BLOCKS))
            some = batches[: events // 10]
            began = time.perf_counter()
            for keys in some:
                pipeline = self._naive.pipeline(transaction=False)
                for key in keys:
                    pipeline.sadd(f"n:{key}", "10.0.0.1:8000|0|gpu")
                    pipeline.expire(f"n:{key}", NAIVE_TTL_S)
                await pipeline.execute()
            theirs.append(len(some) * EVENT_BLOCKS / (time.perf_counter() - began))
        row = at_least("redis_store_ingest_blocks_per_s", median(ours), "blocks/s", 100_000)
        row["peer"], row["peer_value"] = "SADD+EXPIRE per block, pipelined", median(theirs)
        return [
            row,
            at_least("redis_store_ingest_ratio", median(ours) / median(theirs), "times naive", 3),
            at_most("redis_cpu_per_block_written_us", median(cpu) * 1e6, "us of server CPU", 10),
        ]

    # -- reading -------------------------------------------------------------------------------------------------------

    async def _lookups(self, engine: EngineId, turns: int = 6, count: int = 25) -> list[Row]:
        """Both sides in turns of many lookups, then one by one: a lookup right after other work of its process finds
        cold caches, and on a busy machine waits for its slice. Wall times say what a user sees; CPU, on both sides of
        the socket, what it costs whatever else the machine does.
        """
        prompts = [self._keys(PROMPT_BLOCKS) for _ in range(turns * count)]
        for keys in prompts:
            await self._write([self._flush(engine, 1, keys)])
            pipeline = self._naive.pipeline(transaction=False)
            for key in keys:
                pipeline.sadd(f"n:{key}", "10.0.0.1:8000|0|gpu")
            await pipeline.execute()
        ours, theirs, our_cpu, their_cpu, server = [], [], 0.0, 0.0, 0.0
        for turn in range(turns):
            some = prompts[turn * count : (turn + 1) * count]
            before, mine = await self._cpu(), time.process_time()
            ours += [await self._lookup(keys) for keys in some]
            mine, middle = time.process_time() - mine, await self._cpu()
            his = time.process_time()
            theirs += [await self._naive_lookup(keys) for keys in some]
            his, after = time.process_time() - his, await self._cpu()
            server += middle - before
            our_cpu += mine + middle - before
            their_cpu += his + after - middle
        after_work = []
        for keys in prompts:
            await self._naive_lookup(keys)
            after_work.append(await self._lookup(keys))
        naive = "SMEMBERS per block, pipelined"
        wall = at_most("redis_store_lookup_ms", median(ours) * 1e3, "ms", 1.0)
        cpu = at_most("redis_store_lookup_cpu_ms", our_cpu / len(prompts) * 1e3, "ms of CPU, client and server", 1.0)
        wall["peer"], wall["peer_value"] = naive, median(theirs) * 1e3
        cpu["peer"], cpu["peer_value"] = naive, their_cpu / len(prompts) * 1e3
        return [
            wall,
            at_least("redis_store_lookup_ratio", median(theirs) / median(ours), "times faster than naive", 8),
            cpu,
            at_least("redis_store_lookup_cpu_ratio", their_cpu / our_cpu, "times less CPU than naive", 8),
            at_most("redis_store_lookup_after_work_ms", median(after_work) * 1e3, "ms, each after a naive one", 1.0),
            at_most("redis_cpu_per_lookup_us", server / len(prompts) * 1e6, "us of server CPU, 512 blocks", 1000),
        ]

    async def _lookup(self, keys: Sequence[int]) -> float:
        """Seconds."""
        began = time.perf_counter()
        found = await self._store.lookup(keys)
        took = time.perf_counter() - began
        assert None not in found.values
        return took

    async def _naive_lookup(self, keys: Sequence[int]) -> float:
        """Seconds."""
        pipeline = self._naive.pipeline(transaction=False)
        began = time.perf_counter()
        for key in keys:
            pipeline.smembers(f"n:{key}")
        found = await pipeline.execute()
        took = time.perf_counter() - began
        assert all(found)
        return took

    async def _wide(self, prompts: int = 8) -> Row:
        """512 blocks, each engine holding a random depth of them; a fresh prompt each time, matches included."""
        engines = [EngineId(f"10.1.{i // 250}.{i % 250 + 1}:8000") for i in range(WIDE_ENGINES)]
        numbers = list(await self._store.allocate_slots(WIDE_ENGINES))
        for engine in engines:
            await self._own(engine)
        shared = SharedFleet(record(engine, number) for engine, number in zip(engines, numbers, strict=True))
        plans, _ = shared.plan(MODEL)
        (plan,) = plans.values()
        took = []
        for _ in range(prompts):
            keys = self._keys(PROMPT_BLOCKS)
            depths = [self._rng.randint(1, PROMPT_BLOCKS) for _ in engines]
            depths[self._rng.randrange(WIDE_ENGINES)] = PROMPT_BLOCKS
            order = self._rng.sample(range(WIDE_ENGINES), WIDE_ENGINES)
            await self._write([self._flush(engines[i], numbers[i], keys[: depths[i]]) for i in order])
            began = time.perf_counter()
            found = plan.match(shared.masks((await self._store.lookup(keys)).values))
            took.append(time.perf_counter() - began)
            assert found.blocks() == dict(zip(engines, depths, strict=True))
        return at_most("match_redis_wide_store_ms", median(took) * 1e3, "ms, 256 engines of random depth", 5.0)

    # -- a million blocks ----------------------------------------------------------------------------------------------

    async def _memory(self, engine: EngineId) -> list[Row]:
        """One holder per block, with TTL, and nothing else in the server."""
        await self._client.command(0, "FLUSHALL", "SYNC")
        await self._own(engine)
        empty = await self._used_memory()
        for _ in range(MILLION // 10_000):
            await self._write([self._flush(engine, 1, self._keys(2_000)) for _ in range(5)])
        size = (await self._used_memory() - empty) / MILLION
        used, mine = await self._cpu(), time.process_time()
        began, found = time.perf_counter(), 0
        async for batch in self._store.scan([1]):
            found += len(batch)
        took = time.perf_counter() - began
        cpu = time.process_time() - mine + await self._cpu() - used
        assert found >= MILLION
        return [
            at_most("bytes_per_holder_redis", size, "bytes, 1M one-holder blocks with TTL", 110),
            at_most("redis_read_back_s", took, "s per million blocks", 2.0),
            at_most("redis_read_back_cpu_s", cpu, "s of CPU per million blocks, client and server", 2.0),
        ]

    # -- within --------------------------------------------------------------------------------------------------------

    async def _own(self, engine: EngineId) -> None:
        await self._store.raise_fence(engine, 1)
        await self._store.write([Write(engine, 0, ())], 1, Position(1, 0, 0.0, 0), whole=True)

    def _flush(self, engine: EngineId, number: int, keys: Sequence[int]) -> Flush:
        self._seq += 1
        write = Write(engine, 0, (SlotWrite(number, keys, b"\1" * len(keys)),))
        return Flush(write, 1, Position(1, self._seq, time.time(), self._seq))

    async def _write(self, flushes: Iterable[Flush]) -> None:
        outcomes = await self._store.write_all(list(flushes))
        assert {outcome.name for outcome in outcomes} == {"OK"}

    def _keys(self, count: int) -> list[int]:
        return [self._rng.getrandbits(64) for _ in range(count)]

    async def _cpu(self) -> float:
        """Seconds of CPU the server has used."""
        info = await self._client.info(0, "cpu")
        return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])

    async def _used_memory(self) -> int:
        return int((await self._client.info(0, "memory"))["used_memory"])


def record(engine: EngineId, number: int) -> EngineRecord:
    """An engine with one group of full attention on its gpu."""
    return EngineRecord(
        engine=str(engine),
        epoch=1,
        url=f"http://{engine.address}",
        models=[MODEL],
        adapters=[],
        root=None,
        health=Health.READY,
        profile="sha256_cbor/b16/tagged/seed=42",
        profile_verified=True,
        block_size=16,
        sync=Sync.EXACT,
        inexact_reason="",
        max_model_len=None,
        kv_tokens=None,
        heard=True,
        drop_last_blocks=0,
        places=[PlaceRecord(0, "gpu", number)],
        rules=[],
        stream=StreamRecord(True, "", None, None),
        naming=NamingRecord(True, "sha256_cbor/b16/tagged/seed=42", True, True),
    )


async def measure(server: Valkey, seed: int = 1) -> list[Row]:
    """`server`: one that is this run's own; everything in it is deleted."""
    client = await open_redis(server.url, timeouts=Timeouts(command_s=30, lookup_s=30))
    naive = redis.asyncio.Redis(port=server.port)
    try:
        return await Bench(client, naive, random.Random(seed)).rows()
    finally:
        await naive.aclose()
        await client.aclose()


async def rows(options: Options) -> list[Row]:
    """Starts a Valkey, measures, stops it; about 20 s."""
    async with valkey(options.folder) as server:
        return await measure(server)
