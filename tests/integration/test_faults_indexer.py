"""An indexer that is killed, absent or stopped: requests go on without it, and with it again as soon as it is back."""

from __future__ import annotations

import itertools
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median

from kvatlas_loadtest.engine import EngineConfig, SimulatedEngine
from tests.integration.fault_kit import (
    BRISK,
    Index,
    ask,
    bodies,
    client,
    failures,
    flags,
    load,
    metric,
    precise,
    ready_engines,
    simulated,
)
from tests.integration.processes import indexer, router, until

TWO = (EngineConfig(time_model=BRISK), EngineConfig(time_model=BRISK))
PATIENT = ("--lookup-deadline-ms", "500")  # a crowded machine is not what is tested
FALLBACKS = {"affinity:index-unavailable", "affinity:index-error", "affinity:deadline"}
STOPPED_S = 3.0


def dialled(engines: list[SimulatedEngine]) -> list[str]:
    return [flag for engine in engines for flag in flags(engine)]


async def test_an_indexer_killed_under_load_fails_nobody_and_is_exact_when_it_is_back(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        session = await enter(client())
        engines = await enter(simulated(*TWO))
        first = await enter(indexer(tmp_path, "indexer", *dialled(engines)))
        routing = await enter(router(tmp_path, "router", *PATIENT, indexer=first.grpc))
        await ready_engines(session, routing, 2)
        await precise(session, routing)

        async with load(session, routing.url) as traffic:
            await traffic.more()
            first.kill()
            killed_at = time.monotonic()
            without = await traffic.more()
            assert {e.reason for e in without} == {"affinity:index-unavailable"}
            second = await enter(indexer(tmp_path, "indexer-again", *dialled(engines), again=first))
            back_at = time.monotonic()
            await until(lambda: any(e.reason == "precise" for e in traffic.begun_since(back_at)), "precise choices")
        assert failures(traffic.exchanges) == []
        assert {e.reason for e in traffic.exchanges if e.begun > killed_at} <= {*FALLBACKS, "precise"}
        assert await metric(session, routing.admin, "kvatlas_router_indexers_up") == 1

        index = Index(session, second.rest)
        for engine in engines:
            await index.agrees(engine.address, engine.block_table)
        asked = list(itertools.islice(bodies(seed=5), 5))
        first_time, second_time = [[await ask(session, routing.url, body) for body in asked] for _ in range(2)]
        assert [e.predicted for e in first_time + second_time] == [e.cached for e in first_time + second_time]
        assert all(e.cached for e in second_time)
        second.assert_sound()
        routing.assert_sound()


async def test_a_router_that_starts_without_any_indexer_serves_from_its_list_or_from_its_memory(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        session = await enter(client())
        engines = await enter(simulated(*TWO))
        both = {engine.address for engine in engines}
        indexing = await enter(indexer(tmp_path, "indexer", *dialled(engines)))
        teacher = await enter(router(tmp_path, "teacher", "--state-dir", str(state), indexer=indexing.grpc))
        await ready_engines(session, teacher, 2)
        await until(lambda: all(e in _text(state / "fleet.json") for e in both), "the fleet on disk")
        teacher.kill()
        indexing.kill()

        given = [flag for engine in engines for flag in ("--engine", engine.address)]
        for name, options in (("listed", given), ("remembered", ["--state-dir", str(state)])):
            started = await enter(router(tmp_path, name, *options, indexer=indexing.grpc))
            async with load(session, started.url, seed=len(name)) as traffic:
                await until(lambda t=traffic: {e.engine for e in t.exchanges} >= both, "both engines used")  # type: ignore[misc]
            assert failures(traffic.exchanges) == [], f"the {name} router served from its first moment on"
            assert {e.reason for e in traffic.exchanges} == {"affinity:index-unavailable"}
            started.assert_sound()


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


async def test_an_indexer_that_stands_still_costs_each_request_no_more_than_the_deadline(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        session = await enter(client())
        engines = await enter(simulated(*TWO))
        indexing = await enter(indexer(tmp_path, "indexer", *dialled(engines)))
        routing = await enter(router(tmp_path, "router", "--lookup-deadline-ms", "50", indexer=indexing.grpc))
        await ready_engines(session, routing, 2)
        await precise(session, routing)

        async with load(session, routing.url) as traffic:
            before = await traffic.more(20)
            indexing.signal(signal.SIGSTOP)
            stopped_at = time.monotonic()
            await until(lambda: time.monotonic() > stopped_at + STOPPED_S, "time to pass")
            during = traffic.begun_since(stopped_at)
            indexing.signal(signal.SIGCONT)
            await until(lambda: traffic.exchanges[-2].reason == "precise", "precise choices again")
        assert failures(traffic.exchanges) == []
        assert {e.reason for e in during} <= FALLBACKS | {"precise"}
        assert sum(e.reason == "precise" for e in during) <= 4, "only those decided just before the stop"
        slowest = max(e.first_byte_s for e in before)
        assert median(e.first_byte_s for e in during) < 2 * slowest + 0.05 + 0.5, "the deadline, and normal time"
        assert max(e.first_byte_s for e in during) < slowest + STOPPED_S / 2, "and nobody waited for it to go on"
        for engine in engines:
            await Index(session, indexing.rest).agrees(engine.address, engine.block_table)
        indexing.assert_sound()
        routing.assert_sound()
