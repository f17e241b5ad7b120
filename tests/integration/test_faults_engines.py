"""Engines that are killed, before a real indexer and a real router: what cannot be saved is what was begun."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

from tests.integration.fault_kit import Index, client, failures, load, metric, published, ready_engines
from tests.integration.processes import engine, indexer, router, until


async def test_an_engine_killed_while_it_answers_costs_only_the_answers_it_had_begun(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        session = await enter(client())
        victim, *others = await asyncio.gather(*(enter(engine(tmp_path, f"engine-{n}")) for n in range(3)))
        indexing = await enter(indexer(tmp_path, "indexer", *(flag for e in (victim, *others) for flag in e.flags)))
        routing = await enter(router(tmp_path, "router", "--lookup-deadline-ms", "500", indexer=indexing.grpc))
        index = Index(session, indexing.rest)
        await ready_engines(session, routing, 3)

        async with load(session, routing.url, workers=8, max_tokens=60) as traffic:
            await until(
                lambda: sum(e.engine == victim.address and e.pieces >= 3 for e in traffic.under_way) >= 2,
                "two streams that the victim has begun",
            )
            victim.kill()
            killed_at = time.monotonic()
            await ready_engines(session, routing, 2)
            tried = await metric(session, routing.admin, "kvatlas_router_retries_total")
            served = await traffic.more(16)
            assert {e.engine for e in served} == {other.address for other in others}
            assert await metric(session, routing.admin, "kvatlas_router_retries_total") == tried, "not even tried"
            again = await enter(engine(tmp_path, "engine-0-again", again=victim))
            await ready_engines(session, routing, 3)
            back_at = time.monotonic()
            await until(lambda: any(e.engine == again.address for e in traffic.begun_since(back_at)), "it to be used")

        cut = [e for e in traffic.exchanges if e.error == "cut"]
        assert len(cut) >= 2
        assert all(e.engine == victim.address and e.pieces and e.begun < killed_at for e in cut)
        assert failures([e for e in traffic.exchanges if e not in cut]) == []
        assert await metric(session, routing.admin, "kvatlas_router_cuts_total") == len(cut)
        assert await metric(session, routing.admin, "kvatlas_router_requests_total", outcome="cut") == len(cut)
        for one in (again, *others):
            truth = await published(one.replay_port)
            assert truth
            await index.agrees(one.address, lambda truth=truth: truth)  # type: ignore[misc]
        indexing.assert_sound()
        routing.assert_sound()
