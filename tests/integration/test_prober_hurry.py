"""An engine of which something is heard is asked at once, however long its turn would take."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

from kvatlas_common.engines.probe import EngineFacts, ProbePlan, Prober, open_session
from kvatlas_common.engines.specs import parse_engine
from kvatlas_common.fleet import Health
from kvatlas_loadtest.engine import EngineConfig
from tests.integration.engine_kit import simulated_engine

SELDOM = ProbePlan(1000.0, 1000.0, 1000.0, 1000.0)
DEADLINE_S = 30.0  # far more than is needed: machines are shared


async def test_a_hurried_probe_sees_a_restart_and_a_death() -> None:
    reports: asyncio.Queue[EngineFacts] = asyncio.Queue()

    async def until(holds: Callable[[EngineFacts], object]) -> EngineFacts:
        async with asyncio.timeout(DEADLINE_S):
            while not holds(facts := await reports.get()):
                pass
        return facts

    async with (
        simulated_engine(EngineConfig(events_endpoint=None)) as engine,
        open_session() as session,
        Prober(
            session, reports.put_nowait, clock=time.monotonic, wall=time.time, rng=random.Random(1), plan=SELDOM
        ) as prober,
    ):
        prober.want([parse_engine(engine.address)])
        first = await until(lambda facts: facts.health is Health.READY and facts.process_start_s)
        await engine.restart()
        prober.hurry("10.0.0.1:1")  # nobody we know
        prober.hurry(engine.address)
        second = await until(lambda facts: facts.process_start_s != first.process_start_s)
        assert second.process_start_s is not None
        assert first.process_start_s is not None
        assert second.process_start_s > first.process_start_s
        await engine.stop()
        prober.hurry(engine.address)
        await until(lambda facts: "nobody listens" in facts.error)
