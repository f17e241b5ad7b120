"""How long until a router knows of a request that another one has sent: from the report to a shard until the other
router's stream tells of it, at 60 requests a second. Two that meet at an engine within that time did not know better.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack

from kvatlas_common.fleet import Load
from kvatlas_common.observations import Finished, FirstToken, Observation, Outcome, Routed
from kvatlas_common.wire import observation_message
from kvatlas_common.words import EngineId
from kvatlas_loadtest.bench.deployment import Service, indexer, stub_engines, until
from kvatlas_loadtest.bench.rows import Options, Row, only_told
from kvatlas_loadtest.bench.stub_engines import MODEL
from kvatlas_loadtest.percentiles import percentile
from kvatlas_router.adapters.index_client import Shard
from kvatlas_router.core.loads import MergedLoads

ENGINES = 4
REQUESTS_PER_S = 60.0
BLOCKS = 450  # keys that a report carries: 7,200 tokens in blocks of 16
PROFILE = "sha256_cbor/b16/tagged/seed=42"
KNOWN_WITHIN_S = 5.0


class _Router:
    """One that reports, and hears of loads."""

    def __init__(self, name: str, service: Service) -> None:
        self._told = asyncio.Event()
        self.loads = MergedLoads(self._hear)
        self.shard = Shard(service.grpc, name, lambda: None, lambda: None, loads=self.loads)

    def _hear(self, engine: EngineId, load: Load) -> None:
        told, self._told = self._told, asyncio.Event()
        told.set()

    async def hears_of(self, engine: EngineId, prefilling: int) -> None:
        async with asyncio.timeout(KNOWN_WITHIN_S):
            while self.loads.latest.get(engine, Load()).others.prefilling != prefilling:
                await self._told.wait()


async def rows(options: Options) -> list[Row]:
    async with AsyncExitStack() as stack:
        stubs = await stack.enter_async_context(stub_engines(options.folder, ENGINES))
        flags = [flag for address in stubs.addresses for flag in ("--engine", address)]
        service = await stack.enter_async_context(indexer(options.folder, *flags))
        one, two = _Router("one", service), _Router("two", service)
        for router in (one, two):
            stack.push_async_callback(router.shard.close)
        engines = [EngineId.parse(address) for address in stubs.addresses]
        await until(lambda: _know(two, engines), "the engines' loads")
        each = options.count(1200, 40) // ENGINES
        took = await asyncio.gather(*(_reported(one, two, engine, each) for engine in engines))
    waits_ms = sorted(wait * 1e3 for waits in took for wait in waits)
    unit = f"ms from one router's report to the other's knowing it, of {len(waits_ms)}"
    return [
        only_told("shared_load_p50_ms", percentile(waits_ms, 0.5), unit),
        only_told("shared_load_p99_ms", percentile(waits_ms, 0.99), unit),
    ]


async def _know(router: _Router, engines: list[EngineId]) -> bool:
    return all(router.loads.latest.get(engine, Load()).scraped_at for engine in engines)


async def _reported(one: _Router, two: _Router, engine: EngineId, count: int) -> list[float]:
    chance, waits = random.Random(str(engine)), []
    for number in range(count):
        await asyncio.sleep(chance.expovariate(REQUESTS_PER_S / ENGINES))
        request, keys = f"{engine}-{number}", tuple(chance.getrandbits(64) for _ in range(BLOCKS))
        began = time.perf_counter()
        _report(one, Routed(request, engine, MODEL, BLOCKS * 16, 0, {PROFILE: keys}))
        await two.hears_of(engine, 1)
        waits.append(time.perf_counter() - began)
        _report(one, FirstToken(request, engine, MODEL, 0.1))
        _report(one, Finished(request, engine, MODEL, None, 1, comparable=False, outcome=Outcome.OK))
        await two.hears_of(engine, 0)
    return waits


def _report(router: _Router, observation: Observation) -> None:
    router.shard.report(observation_message(observation))
