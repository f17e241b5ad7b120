"""One small deployment (simulated engines, an indexer, a router) for what the command asks of it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import aiohttp

from kvatlas_cli import local
from kvatlas_indexer.settings import IndexerSettings
from kvatlas_loadtest.engine import EngineConfig
from kvatlas_loadtest.texts import WORDS
from kvatlas_loadtest.time_model import NO_TIME
from kvatlas_router.settings import RouterSettings

PROMPT = " ".join(WORDS * 2)
DEADLINE_S = 20.0


@dataclass(frozen=True, slots=True)
class Deployment:
    """`key`: of a block that `engine` holds."""

    admin: str
    indexer: str
    public: str
    engine: str
    idle_engine: str

    @property
    def addresses(self) -> list[str]:
        return ["--admin", self.admin, "--indexer", self.indexer]


@contextmanager
def deployed() -> Iterator[Deployment]:
    """Runs in a thread of its own, for the command is not asynchronous."""
    ready, done = threading.Event(), threading.Event()
    found: list[Deployment] = []
    failed: list[BaseException] = []

    def serve() -> None:
        try:
            asyncio.run(_serve(found, ready, done))
        except BaseException as error:
            failed.append(error)
            ready.set()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert ready.wait(DEADLINE_S)
        assert not failed, failed
        yield found[0]
    finally:
        done.set()
        thread.join(DEADLINE_S)
    assert not failed, failed


async def _serve(found: list[Deployment], ready: threading.Event, done: threading.Event) -> None:
    anywhere = {"grpc_listen": "127.0.0.1:0", "rest_listen": "127.0.0.1:0", "zmq_listen": ()}
    indexing = IndexerSettings.model_validate(anywhere)
    routing = RouterSettings.model_validate({"host": "127.0.0.1", "port": 0, "admin_port": 0})
    async with (
        local.simulated([EngineConfig(time_model=NO_TIME), EngineConfig(time_model=NO_TIME)]) as engines,
        local.serving(indexing, routing, engines, os.environ) as stack,
        aiohttp.ClientSession() as client,
    ):
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1}
        async with client.post(f"{engines[0].url}/v1/completions", json=body) as answer:
            assert answer.status == 200

        async def routed_precisely() -> bool:
            async with client.post(f"{stack.admin_url}/debug/route", json=body) as answer:
                decision = await answer.json()
                return answer.status == 200 and decision["engines"][0]["cached_tokens"] is not None

        await local.until(routed_precisely, "a precise route", DEADLINE_S)
        indexer = f"http://{stack.indexer.rest_address}"
        found.append(Deployment(stack.admin_url, indexer, stack.url, engines[0].address, engines[1].address))
        ready.set()
        await asyncio.to_thread(done.wait)
