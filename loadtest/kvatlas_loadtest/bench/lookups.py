"""What a lookup of 512 blocks takes: in process, over gRPC with either store, and where 256 engines hold every block.

Each prompt is looked up once. Engines hold random depths of it, and have told so in pieces, in any order: the same set
of holders is rarely the same object in memory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from kvatlas_common.wire import match_request
from kvatlas_common.words import EngineId
from kvatlas_indexer.adapters.redis_client import Timeouts, open_redis
from kvatlas_indexer.adapters.redis_store import RedisStore
from kvatlas_indexer.adapters.redis_writes import Flush, Position
from kvatlas_indexer.core.projection import SlotWrite, Write
from kvatlas_indexer.core.records import encode_record
from kvatlas_loadtest.bench.accounting import running_s
from kvatlas_loadtest.bench.deployment import Service, client, indexer, stub_engines, until, valkey
from kvatlas_loadtest.bench.feeds import (
    EVENT_BLOCKS,
    Feed,
    Prompt,
    begin,
    feeds,
    hash_flags,
    profile,
    taken_in,
)
from kvatlas_loadtest.bench.in_process import InProcess
from kvatlas_loadtest.bench.redis_rows import MODEL as RECORDED_MODEL
from kvatlas_loadtest.bench.redis_rows import record
from kvatlas_loadtest.bench.rows import Options, Row, at_most, only_told
from kvatlas_loadtest.bench.stub_engines import MODEL
from kvatlas_router.adapters.index_client import LookupFailed, Shard

BLOCK = 16
BLOCKS = 512
ENGINES = 32
WIDE_ENGINES = 256
WARM_UP = 10
PROFILE = profile(BLOCK).name
BUDGETS = {"memory": 0.6, "redis": 1.5}
WITHIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Held:
    """Prompts, and by prompt how many leading blocks of it each engine holds."""

    prompts: list[Prompt]
    depths: list[list[int]]

    @classmethod
    def drawn(cls, prompts: int, blocks: int = BLOCKS, engines: int = ENGINES, holding: int | None = None) -> Held:
        """`holding`: so many of the engines hold something of it; None: all."""
        rng, some = np.random.default_rng(1), engines if holding is None else holding
        depths = rng.integers(0, blocks + 1, size=(prompts, some))
        depths[np.arange(prompts), rng.integers(0, some, prompts)] = blocks  # somebody holds all of it
        depths = np.pad(depths, ((0, 0), (0, engines - some)))
        return cls([Prompt(rng, blocks, BLOCK, true=True) for _ in range(prompts)], depths.tolist())

    def parts(self, first: int) -> tuple[Held, Held]:
        """The first so many prompts, and the others."""
        return Held(self.prompts[:first], self.depths[:first]), Held(self.prompts[first:], self.depths[first:])

    @property
    def engines(self) -> int:
        return len(self.depths[0])

    @property
    def blocks(self) -> int:
        return sum(map(sum, self.depths))

    def messages(self) -> Iterator[tuple[int, bytes]]:
        """(engine, message) in any order, but that of each engine's own."""
        waiting: list[list[bytes]] = [[] for _ in self.depths[0]]
        for prompt, depths in zip(self.prompts, self.depths, strict=True):
            for engine, depth in enumerate(depths):
                starts = range(0, depth, EVENT_BLOCKS)
                waiting[engine] += [prompt.message(start, min(start + EVENT_BLOCKS, depth)) for start in starts]
        order = np.repeat(np.arange(len(waiting)), [len(its) for its in waiting])
        np.random.default_rng(2).shuffle(order)
        next_of = [iter(its) for its in waiting]
        for engine in order.tolist():
            yield engine, next(next_of[engine])


async def in_process_rows(options: Options) -> list[Row]:
    held, to = Held.drawn(options.count(100, 4) + WARM_UP), InProcess(ENGINES, BLOCK)
    for engine, payload in held.messages():
        to.hear(engine, payload)
    took = []
    for prompt, depths in zip(held.prompts, held.depths, strict=True):
        began = time.perf_counter()
        answer = to.match(prompt.keys)
        took.append(time.perf_counter() - began)
        check({str(m.engine): m.blocks for m in answer.matches}, list(map(str, to.engines)), depths)
    return [at_most("match_memory_ms", p50_ms(took), f"ms, p50 of {len(took) - WARM_UP}, {ENGINES} engines", 0.1)]


async def redis_rows(options: Options) -> list[Row]:
    held = Held.drawn(options.count(60, 4) + WARM_UP)
    async with indexed(options.folder / "redis", held, "redis") as (service, shard, engines):
        spent = running_s(service.pid)
        took = await _asked(shard, requests(held), engines, held.depths)
        return told("redis", took, running_s(service.pid) - spent)


async def wide_rows(options: Options) -> list[Row]:
    """What is in the store was written there by an owner that has gone; an indexer reads it for whoever asks."""
    prompts = [Prompt(np.random.default_rng(n), BLOCKS, BLOCK) for n in range(options.count(8, 2) + WARM_UP)]
    engines = [EngineId(f"10.1.{n // 250}.{n % 250 + 1}:8000") for n in range(options.count(WIDE_ENGINES, 8))]
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(valkey(options.folder))
        await _write(server.url, engines, prompts)
        asked = await stack.enter_async_context(indexer(options.folder, "--store", server.url, "--shard", "reader"))
        shard = await stack.enter_async_context(client(asked))
        asking = [match_request(RECORDED_MODEL, {_recorded_profile(): prompt.keys}) for prompt in prompts]
        await until(lambda: _answers(shard, asking[0], len(engines)), "the engines' records to be read")
        took = await _asked(shard, asking, [str(e) for e in engines], [[BLOCKS] * len(engines)] * len(prompts))
    unit = f"ms over gRPC, p50 of {len(took) - WARM_UP}, {len(engines)} engines holding every block"
    return [at_most("match_redis_wide_ms", p50_ms(took), unit, 5.0)]


@asynccontextmanager
async def indexed(folder: Path, held: Held, store: str) -> AsyncIterator[tuple[Service, Shard, list[str]]]:
    """An indexer that knows what is held, a client of it, and what the engines are called."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        stubs = await enter(stub_engines(folder, held.engines))
        made = await enter(feeds(stubs.addresses))
        flags = [*hash_flags(BLOCK), *(flag for feed in made for flag in feed.flags)]
        if store == "redis":
            flags += ["--store", (await enter(valkey(folder))).url]
        service = await enter(indexer(folder, *flags))
        shard = await enter(client(service))
        await begin(made, [service] * held.engines, BLOCK)
        await tell(made, held)
        await taken_in(held.blocks + held.engines, made, [service])
        last = requests(held)[-1]
        await until(lambda: _answers(shard, last, sum(1 for d in held.depths[-1] if d)), "all to be looked up")
        yield service, shard, [feed.address for feed in made]


def told(store: str, took: Sequence[float], spent: float) -> list[Row]:
    """Of one client's lookups over gRPC: seconds each, and of the indexer's CPU for all of them."""
    unit = f"ms, p50 of {len(took) - WARM_UP}, one client, {ENGINES} engines"
    return [
        at_most(f"grpc_match_{store}_p50_ms", p50_ms(took), unit, BUDGETS[store]),
        only_told(f"grpc_match_{store}_cpu_ms", spent / len(took) * 1e3, "ms of the indexer's CPU per lookup, mean"),
    ]


def requests(held: Held) -> list[Any]:
    return [match_request(MODEL, {PROFILE: prompt.keys}) for prompt in held.prompts]


async def tell(made: Sequence[Feed], held: Held) -> None:
    for number, (engine, payload) in enumerate(held.messages()):
        await made[engine].send(payload)
        if number % 100 == 0:
            await asyncio.sleep(0)


async def _asked(
    shard: Shard, requests: Sequence[Any], engines: Sequence[str], depths: Sequence[Sequence[int]]
) -> list[float]:
    """Seconds each; every answer is held against the truth."""
    took = []
    for request, of_engines in zip(requests, depths, strict=True):
        began = time.perf_counter()
        answer = await shard.match(request, WITHIN_S)
        took.append(time.perf_counter() - began)
        check({str(m.engine): m.blocks for m in answer.matches}, engines, of_engines)
    return took


async def _answers(shard: Shard, request: Any, engines: int) -> bool:
    try:
        answer = await shard.match(request, WITHIN_S)
    except LookupFailed:
        return False
    return sum(1 for match in answer.matches if match.blocks) == engines


def check(found: dict[str, int], engines: Sequence[str], depths: Sequence[int]) -> None:
    expected = {engine: depth for engine, depth in zip(engines, depths, strict=True) if depth}
    assert {engine: blocks for engine, blocks in found.items() if blocks} == expected, "a lookup was wrong"


def p50_ms(took: Sequence[float]) -> float:
    return median(took[WARM_UP:]) * 1e3


def _recorded_profile() -> str:
    profile_name = record(EngineId("10.0.0.1:8000"), 1).profile
    assert profile_name is not None
    return profile_name


async def _write(url: str, engines: Sequence[EngineId], prompts: Sequence[Prompt]) -> None:
    """Message by message, the engines in another order each time: holders of neighbouring blocks differ in order."""
    rng = np.random.default_rng(3)
    redis = await open_redis(url, timeouts=Timeouts(command_s=30.0))
    try:
        store = RedisStore(redis)
        numbers = list(await store.allocate_slots(len(engines)))
        await store.put_records(
            {str(e): (1, encode_record(record(e, number))) for e, number in zip(engines, numbers, strict=True)}
        )
        for engine in engines:
            await store.raise_fence(engine, 1)
            await store.write([Write(engine, 0, ())], 1, Position(1, 0, 0.0, 0), whole=True)
        seq = 0
        for prompt in prompts:
            for start in range(0, BLOCKS, EVENT_BLOCKS):
                seq += 1
                keys = prompt.keys[start : start + EVENT_BLOCKS]
                writes = [SlotWrite(number, keys, b"\1" * len(keys)) for number in numbers]
                at = Position(1, seq, 0.0, seq)
                order = rng.permutation(len(engines)).tolist()
                await store.write_all([Flush(Write(engines[i], 0, (writes[i],)), 1, at) for i in order])
    finally:
        await redis.aclose()
