"""What a router and an indexer cost while 100 engines do nothing: both poll load and health, and are subscribed to the
events of every engine."""

from __future__ import annotations

import asyncio
import time

from kvatlas_loadtest.bench.accounting import cpu_s
from kvatlas_loadtest.bench.deployment import indexer, page, router, stub_engines, until
from kvatlas_loadtest.bench.rows import Options, Row, at_most, only_told

SETTLE_S = 10.0  # engines that do nothing are asked less and less often


async def rows(options: Options) -> list[Row]:
    count = options.count(100, 4)
    async with stub_engines(options.folder, count, events=True) as engines:
        listed = [
            flag
            for address, events in zip(engines.addresses, engines.events, strict=True)
            for flag in ("--engine", f"{address},events={events}")
        ]
        async with (
            indexer(options.folder, *listed) as indexing,
            router(options.folder, "--indexer", indexing.grpc) as routing,
        ):

            async def ready() -> bool:
                views = (await page(f"{indexing.rest}/v1/engines"))["engines"]
                return bool(sum(view["health"] == "ready" for view in views) == count)

            await until(ready, "every engine to be ready")
            await asyncio.sleep(options.count(int(SETTLE_S), 1))
            spent = [cpu_s(indexing.pid), cpu_s(routing.pid)]
            began = time.perf_counter()
            await asyncio.sleep(options.count(15, 1))
            took = time.perf_counter() - began
            of_indexer, of_router = (
                (cpu_s(pid) - before) / took for pid, before in zip((indexing.pid, routing.pid), spent, strict=True)
            )
    return [
        at_most("idle_cores_100_engines", of_indexer + of_router, f"cores, router and indexer, {count} engines", 0.1),
        only_told("idle_cores_100_engines_indexer", of_indexer, "cores"),
        only_told("idle_cores_100_engines_router", of_router, "cores"),
    ]
