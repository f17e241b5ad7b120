"""Two routers before the same simulated engines, and more requests than these can take at once."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from kvatlas_loadtest.engine import SimulatedEngine
from kvatlas_loadtest.time_model import TimeModel
from tests.integration.router_kit import Running, eventually, running
from tests.integration.shard_kit import BLOCK, SMALL, Shards, config, shards

SLOW = TimeModel(step_s=0.02, prefill_token_s=0.0, decode_sequence_s=0.0, context_token_s=0.0)
ONE_AT_A_TIME = dataclasses.replace(SMALL, max_num_seqs=1)
REQUESTS = 20  # per router
WAITING_MAX = 2


def prompt(number: int) -> list[int]:
    return [(number * 7 + n) % 50 for n in range(BLOCK * 10 + 1)]


@asynccontextmanager
async def held(index: Shards, engine: SimulatedEngine) -> AsyncIterator[None]:
    """An engine that gets nothing done: the one request it takes at a time does not end before this does."""
    body = {"model": "tiny", "prompt": [1] * BLOCK, "max_tokens": 1800, "stream": True}
    async with index.http.post(f"{engine.url}/v1/completions", json=body) as response:
        assert response.status == 200
        await response.content.readany()
        yield


async def ask(run: Running, number: int) -> tuple[int, str]:
    """Status, and who answered."""
    status, headers, _ = await run.post("/v1/completions", {"model": "tiny", "prompt": prompt(number), "max_tokens": 2})
    return status, headers["x-kvatlas-engine"]


async def test_what_engines_cannot_take_waits_in_the_routers_and_all_are_answered() -> None:
    engines = [config(n, time_model=SLOW, limits=ONE_AT_A_TIME) for n in range(2)]
    async with shards("memory", "one", engines=engines) as index, AsyncExitStack() as stack:
        told = [flag for shard in index.running.values() for flag in ("--indexer", shard.grpc_address)]
        flags = (*told, "--lookup-deadline-ms", "2000", "--engine-waiting-max", str(WAITING_MAX))
        routers = [await stack.enter_async_context(running(*flags, ready=2)) for _ in range(2)]
        for run in routers:
            await eventually(lambda run=run: len(run.router.index.loads()) == 2, "every engine's load")  # type: ignore[misc]
        async with asyncio.TaskGroup() as asking, AsyncExitStack() as holding:
            for engine in index.engines:
                await holding.enter_async_context(held(index, engine))
            replies = [
                asking.create_task(ask(run, n + REQUESTS * at))
                for at, run in enumerate(routers)
                for n in range(REQUESTS)
            ]
            for run in routers:
                await eventually(lambda run=run: run.figure("queue_requests") >= REQUESTS / 2, "most to wait")  # type: ignore[misc]
        answers = [reply.result() for reply in replies]
        assert [status for status, _ in answers] == [200] * (2 * REQUESTS)
        assert {engine for _, engine in answers} == {engine.address for engine in index.engines}
        for run in routers:
            assert run.figure("queue_wait_seconds_count") >= REQUESTS / 2, "those that waited were counted"
            assert run.figure("queue_requests") == 0
