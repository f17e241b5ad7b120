"""Live load and routing history, shared: two shards and two routers, on a store of each shard's own and on one of all.

What goes on at an engine, and what one router sends there, the other knows; and no router is told of its own requests.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import aiohttp
import numpy as np
import pytest

from kvatlas_common.fleet import InFlight, Load
from kvatlas_common.matching import EngineMatch
from kvatlas_common.observations import Routed
from kvatlas_common.words import EngineId
from kvatlas_loadtest.time_model import TimeModel
from kvatlas_loadtest.valkey import Valkey
from kvatlas_router.adapters.index_client import LookupFailed
from tests.integration.indexer_kit import ScriptedIndexer, ready, saying
from tests.integration.processes import until
from tests.integration.router_kit import Running, ScriptedEngine, eventually, running
from tests.integration.shard_kit import BLOCK, DEADLINE_S, Shards, config, shards

SLOW = TimeModel(step_s=0.02, prefill_token_s=0.005, decode_sequence_s=0.0, context_token_s=0.0)
PROMPT = [n % 50 for n in range(BLOCK * 10 + 1)]


@dataclass
class Deployment:
    index: Shards
    one: Running
    two: Running

    def engines(self) -> list[EngineId]:
        return [EngineId(engine.address) for engine in self.index.engines]

    @asynccontextmanager
    async def asking(self, run: Running) -> AsyncIterator[tuple[EngineId, aiohttp.ClientResponse]]:
        """A streamed answer of many tokens, begun and not read; it is cancelled at the end."""
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1500, "stream": True}
        async with run.http.post(f"{run.url}/v1/completions", json=body) as response:
            assert response.status == 200
            yield EngineId.parse(response.headers["x-kvatlas-engine"]), response


@asynccontextmanager
async def deployed(url: str) -> AsyncIterator[Deployment]:
    engines = [config(n, time_model=SLOW) for n in range(2)]
    async with shards(url, "one", "two", engines=engines) as index, AsyncExitStack() as stack:
        told = [flag for shard in index.running.values() for flag in ("--indexer", shard.grpc_address)]
        flags = (*told, "--lookup-deadline-ms", "2000")
        routers = [await stack.enter_async_context(running(*flags, ready=2)) for _ in range(2)]
        made = Deployment(index, *routers)
        for run in routers:
            await eventually(lambda run=run: scraped(run) == set(made.engines()), "every engine's load")  # type: ignore[misc]
        yield made


@pytest.fixture(params=["memory", "valkey"])
async def deployment(request: pytest.FixtureRequest) -> AsyncIterator[Deployment]:
    server: Valkey | None = request.getfixturevalue("single") if request.param == "valkey" else None
    async with deployed(server.url if server else "memory") as made:
        yield made


def scraped(run: Running) -> set[EngineId]:
    return {engine for engine, load in run.router.index.loads().items() if load.scraped_at}


def load(run: Running, engine: EngineId) -> Load:
    return run.router.index.loads().get(engine, Load())


async def test_each_router_knows_what_the_other_has_in_flight_and_what_the_engine_says(deployment: Deployment) -> None:
    one, two = deployment.one, deployment.two
    async with deployment.asking(one) as (engine, response):
        await response.content.readany()
        await eventually(lambda: load(two, engine).others == InFlight(0, 0, 1), "the other router to know of it")
        await eventually(lambda: (load(one, engine).running, load(two, engine).running) == (1, 1), "both to see it run")
        assert load(one, engine).others == InFlight()
        async with deployment.asking(two) as (second, other):
            await other.content.readany()
            await eventually(lambda: load(one, second).others == InFlight(0, 0, 1), "the first to know of the second")
    for run in (one, two):
        await eventually(
            lambda run=run: {(v.running, v.others) for v in run.router.index.loads().values()} == {(0, InFlight())},  # type: ignore[misc]
            "nothing to run any more",
        )


async def test_blocks_on_their_way_are_expected_by_every_router_and_estimated_for_later(
    deployment: Deployment,
) -> None:
    one, two = deployment.one, deployment.two
    await one.post("/v1/completions", {"model": "tiny", "prompt": [7] * (BLOCK * 2), "max_tokens": 1})
    await two.until(lambda fleet: any(v.profile_verified for v in fleet.engines.values()))
    for each in deployment.index.engines:  # so that every one of them is known
        await deployment.index.ask(each, [9] * (BLOCK * 2))
    fleet = await two.until(lambda fleet: all(v.profile_verified for v in fleet.engines.values()))
    await one.until(lambda fleet: all(v.profile_verified for v in fleet.engines.values()))
    sending = asyncio.create_task(one.post("/v1/completions", {"model": "tiny", "prompt": PROMPT, "max_tokens": 1}))
    (profile,) = {v.profile for v in fleet.engines.values()}
    assert profile is not None
    keys = await keys_of(two, profile)

    async def match(estimate: bool) -> dict[EngineId, EngineMatch]:
        try:
            return {
                m.engine: m for m in (await two.router.index.match("tiny", {profile: keys}, estimate=estimate)).matches
            }
        except LookupFailed:
            return {}

    async def expected() -> bool:
        return any(m.blocks == 0 and m.expected == 10 for m in (await match(False)).values())

    await until(expected, "the blocks to be expected while they are computed", DEADLINE_S)
    _, headers, _ = await sending
    engine = EngineId.parse(headers["x-kvatlas-engine"])

    async def held() -> bool:
        return (await match(False)).get(engine, EngineMatch(engine, 0, {}, True)).blocks == 10

    await until(held, "the blocks to be held", DEADLINE_S)
    guesses = await match(True)
    assert (guesses[engine].blocks, guesses[engine].exact) == (10, False)
    await deployment.index.engines[deployment.engines().index(engine)].restart()

    async def forgotten() -> bool:
        shards_now = deployment.index.running.values()
        return not any(engine in s.routing.history.leading(keys.tolist(), time.monotonic()) for s in shards_now)

    await until(forgotten, "a restarted engine to be forgotten by every shard", DEADLINE_S)


async def keys_of(run: Running, profile: str) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Of `PROMPT`, as a router makes them."""
    async with run.http.post(
        f"{run.admin_url}/debug/route", json={"model": "tiny", "prompt": PROMPT, "max_tokens": 1}
    ) as response:
        answer = json.loads(await response.read())
    return np.array([int(key) for key in answer["keys"][profile]], dtype=np.uint64)


async def test_engines_the_router_probes_itself_have_loads_too() -> None:
    async with (
        shards("memory", engines=[config(0, time_model=SLOW)]) as index,
        running("--engine", index.engines[0].address, "--indexer", "127.0.0.1:9", ready=1) as run,
    ):
        (engine,) = (EngineId(e.address) for e in index.engines)
        await eventually(lambda: scraped(run) == {engine}, "the load of the engine")
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1500, "stream": True}
        async with run.http.post(f"{run.url}/v1/completions", json=body):
            await eventually(lambda: load(run, engine).running == 1, "the request to be seen")


async def test_an_indexer_that_comes_back_is_told_what_is_in_flight() -> None:
    indexer = ScriptedIndexer()
    hanging = asyncio.Event()

    async def script(_: object, writer: asyncio.StreamWriter) -> None:
        await hanging.wait()

    async with ScriptedEngine(script) as engine, indexer:
        await indexer.tell(ready(engine.address))
        indexer.match = saying()
        async with running("--indexer", indexer.address, "--lookup-deadline-ms", "2000", ready=1) as run:
            body = {"model": "tiny", "prompt": list(range(100)), "max_tokens": 1}
            asking = asyncio.create_task(run.post("/v1/completions", body, {"x-request-id": "r-1"}))
            await eventually(lambda: len(indexer.observed) == 1, "the request to be reported")
            (before,) = indexer.observed
            assert isinstance(before, Routed)
            assert not before.again
            await indexer.stop()
            indexer.observed.clear()
            await indexer.start()
            await eventually(lambda: len(indexer.observed) == 1, "it to be reported again")
            (again,) = indexer.observed
            assert isinstance(again, Routed)
            assert again.again
            assert (again.request_id, again.engine, again.keys) == ("r-1", before.engine, before.keys)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
