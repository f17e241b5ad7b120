"""SIGTERM under load: what is under way is finished, nothing fails before readiness does, and the logs stay clean."""

from __future__ import annotations

import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest

from kvatlas_loadtest.engine import EngineConfig
from tests.integration.fault_kit import BRISK, client, failures, flags, load, precise, ready_engines, simulated
from tests.integration.processes import Router, indexer, router, until


@pytest.mark.parametrize("command", ["router", "up"])
async def test_a_router_told_to_end_finishes_what_is_under_way(command: str, tmp_path: Path) -> None:
    """In one process with its indexer, too: then the streams between them break from both ends at once."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        session = await enter(client())
        engines = await enter(simulated(EngineConfig(time_model=BRISK), EngineConfig(time_model=BRISK)))
        options = [*(flag for e in engines for flag in flags(e)), "--drain-delay-s", "1"]
        if command == "up":
            options += ["--grpc-listen", "127.0.0.1:0", "--rest-listen", "127.0.0.1:0", "--zmq-listen", ""]
        routing = await enter(router(tmp_path, command, *options, indexer="127.0.0.1:9", command=command, fresh=True))
        await ready_engines(session, routing, 2)

        async with load(session, routing.url, workers=8, max_tokens=100) as traffic:
            await traffic.more(8)
            routing.signal(signal.SIGTERM)
            await _unready(session, routing)
            unready_at = time.monotonic()
            assert len(traffic.under_way) == 8
            traffic.stop()
        assert await routing.exited() == 0
        assert failures([e for e in traffic.exchanges if e.begun < unready_at]) == []
        assert any(e.ended is not None and e.ended > unready_at for e in traffic.exchanges)
        routing.assert_sound()


async def _unready(session: aiohttp.ClientSession, routing: Router) -> None:
    async def look() -> bool:
        async with session.get(f"{routing.url}/readyz") as response:
            return response.status == 503

    await until(look, "the router to say that it is not ready")


async def test_an_indexer_told_to_end_ends_cleanly_and_fails_nobody(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        session = await enter(client())
        engines = await enter(simulated(EngineConfig(time_model=BRISK), EngineConfig(time_model=BRISK)))
        listed = [flag for e in engines for flag in flags(e)]
        indexing = await enter(indexer(tmp_path, "indexer", *listed, fresh=True))
        routing = await enter(router(tmp_path, "router", "--lookup-deadline-ms", "500", indexer=indexing.grpc))
        await ready_engines(session, routing, 2)
        await precise(session, routing)

        async with load(session, routing.url) as traffic:
            await traffic.more()
            indexing.signal(signal.SIGTERM)
            assert await indexing.exited() == 0
            after = await traffic.more()
        assert failures(traffic.exchanges) == []
        assert {e.reason for e in after} == {"affinity:index-unavailable"}
        indexing.assert_sound()
        routing.assert_sound()
