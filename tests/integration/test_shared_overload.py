"""Two routers before the same simulated engines, and more requests than these can take at once."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from kvatlas_loadtest.time_model import TimeModel
from tests.integration.router_kit import eventually, running
from tests.integration.shard_kit import BLOCK, config, shards

SLOW = TimeModel(step_s=0.01, prefill_token_s=0.0005, decode_sequence_s=0.0, context_token_s=0.0)
REQUESTS = 20  # per router
WAITING_MAX = 2


def prompt(number: int) -> list[int]:
    return [(number * 7 + n) % 50 for n in range(BLOCK * 10 + 1)]


async def test_what_engines_cannot_take_waits_in_the_routers_and_all_are_answered() -> None:
    engines = [config(n, time_model=SLOW) for n in range(2)]
    async with shards("memory", "one", engines=engines) as index, AsyncExitStack() as stack:
        told = [flag for shard in index.running.values() for flag in ("--indexer", shard.grpc_address)]
        flags = (*told, "--lookup-deadline-ms", "2000", "--engine-waiting-max", str(WAITING_MAX))
        routers = [await stack.enter_async_context(running(*flags, ready=2)) for _ in range(2)]
        for run in routers:
            await eventually(lambda run=run: len(run.router.index.loads()) == 2, "every engine's load")  # type: ignore[misc]
        replies = await asyncio.gather(
            *(
                run.post("/v1/completions", {"model": "tiny", "prompt": prompt(n + REQUESTS * at), "max_tokens": 2})
                for at, run in enumerate(routers)
                for n in range(REQUESTS)
            )
        )
        assert [status for status, _, _ in replies] == [200] * (2 * REQUESTS)
        for run in routers:
            assert run.figure("queue_wait_seconds_count") >= REQUESTS / 2, "most of them waited"
            assert run.figure("queue_requests") == 0
        assert {headers["x-kvatlas-engine"] for _, headers, _ in replies} == {e.address for e in index.engines}
