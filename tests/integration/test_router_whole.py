"""The whole read path: simulated engines publish, a real indexer indexes, the router finds what they hold."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from kvatlas_common.fleet import Sync
from kvatlas_indexer.app import Indexer
from kvatlas_indexer.settings import IndexerSettings
from kvatlas_loadtest.engine import EngineConfig
from tests.integration.engine_kit import simulated_engine
from tests.integration.router_kit import Running, running

SENTENCE = "the ship sails west until an island rises out of the morning fog and nobody speaks"


@asynccontextmanager
async def system(engines: int, *flags: str) -> AsyncIterator[Running]:
    async with AsyncExitStack() as stack:
        served = [await stack.enter_async_context(simulated_engine(EngineConfig(seed=n))) for n in range(engines)]
        listed = [f"{e.address},events={e.events_endpoint},replay={e.replay_endpoint}" for e in served]
        argv = [flag for text in listed for flag in ("--engine", text)]
        free = ["--zmq-listen", "tcp://127.0.0.1:*", "--grpc-listen", "127.0.0.1:0", "--rest-listen", "127.0.0.1:0"]
        indexer = Indexer(IndexerSettings.load([*argv, *free], {}), environ={})
        await indexer.start()
        stack.push_async_callback(indexer.stop)
        target = ("--indexer", indexer.grpc_address, "--lookup-deadline-ms", "2000")
        yield await stack.enter_async_context(running(*target, *flags, ready=engines))


async def test_follow_ups_find_their_engine_and_predictions_come_true() -> None:
    rng = random.Random(5)
    async with system(3) as run:
        talks: list[list[dict[str, str]]] = [
            [{"role": "system", "content": " ".join(rng.choices(SENTENCE.split(), k=80)) + f" {n}"}] for n in range(6)
        ]
        homes: dict[int, str] = {}
        followed = right = known = 0
        for turn in range(5):
            for n, talk in enumerate(talks):
                talk.append({"role": "user", "content": " ".join(rng.choices(SENTENCE.split(), k=20))})
                body = {"model": "tiny", "messages": talk, "max_tokens": 8}
                status, headers, page = await run.post(body=body)
                assert status == 200
                said = json.loads(page)
                talk.append({"role": "assistant", "content": said["choices"][0]["message"]["content"]})
                if (predicted := headers.get("x-kvatlas-cached-tokens")) is None:
                    continue  # the engine has not published anything yet, so nothing is known of it
                actual = said["usage"]["prompt_tokens_details"]["cached_tokens"]
                known += 1
                right += int(predicted) == actual
                if turn > 1:
                    followed += homes[n] == headers["x-kvatlas-engine"]
                homes[n] = headers["x-kvatlas-engine"]
        fleet = await run.until(lambda f: all(v.sync is Sync.EXACT for v in f.engines.values()))
        assert all(v.profile_verified for v in fleet.engines.values())
        assert known >= 20
        assert (right, followed) == (known, 18)
