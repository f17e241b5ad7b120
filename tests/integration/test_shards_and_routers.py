"""Routers before a shared index: told of all shards, they miss none that dies; and one process with a shared store."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import aiohttp

from kvatlas_loadtest.valkey import Valkey
from tests.integration.engine_kit import simulated_engine
from tests.integration.fault_kit import flags
from tests.integration.processes import router, until
from tests.integration.redis_kit import fresh_prefix, stored
from tests.integration.router_kit import Running, running
from tests.integration.shard_kit import BLOCK, DEADLINE_S, config, shards

PROMPTS = [[seed * 40 + n % 40 for n in range(BLOCK * 10 + 1)] for seed in range(6)]


async def ask(run: Running, prompt: list[int]) -> tuple[str, str, int, int]:
    """Engine, reason, and cached tokens: predicted (-1: not said) and actual."""
    status, headers, page = await run.post("/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 1})
    assert status == 200, page
    usage = json.loads(page)["usage"]
    predicted = int(headers.get("x-kvatlas-cached-tokens", -1))
    return (
        headers["x-kvatlas-engine"],
        headers["x-kvatlas-reason"],
        predicted,
        usage["prompt_tokens_details"]["cached_tokens"],
    )


async def test_a_router_before_two_shards_misses_neither(single: Valkey) -> None:
    async with shards(single.url, "one", "two", engines=[config(n) for n in range(3)]) as index:
        await index.spread()
        told = [flag for shard in index.running.values() for flag in ("--indexer", shard.grpc_address)]
        async with running(*told, "--lookup-deadline-ms", "2000", ready=3) as run:
            homes = [(await ask(run, prompt))[0] for prompt in PROMPTS]
            await index.agree("after a load")
            again = [await ask(run, prompt) for prompt in PROMPTS]
            assert again == [(home, "precise", BLOCK * 10, BLOCK * 10) for home in homes]

            index.crash("one")
            during = [await ask(run, prompt) for prompt in PROMPTS]
            assert [engine for engine, *_ in during] == homes
            await index.spread()
            await index.agree("after a shard died")
            after = [await ask(run, prompt) for prompt in PROMPTS]
            assert after == [(home, "precise", BLOCK * 10, BLOCK * 10) for home in homes]


async def test_up_keeps_its_index_where_it_is_told_and_finds_it_there(single: Valkey, tmp_path: Path) -> None:
    prefix = fresh_prefix()
    async with simulated_engine(config(0)) as engine, aiohttp.ClientSession() as http:
        ports = ("--grpc-listen", "127.0.0.1:0", "--rest-listen", "127.0.0.1:0", "--zmq-listen", "")
        store = ("--store", single.url, "--store-prefix", prefix, "--lookup-deadline-ms", "2000")
        options = [*flags(engine), *ports, *store]
        body = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 1}
        for life in ("first", "second"):
            async with router(tmp_path, life, *options, indexer="127.0.0.1:9", command="up", fresh=True) as up:

                async def predicted(url: str = up.url) -> int:
                    async with http.post(f"{url}/v1/completions", json=body) as response:
                        assert response.status == 200
                        told = response.headers
                        return int(told["x-kvatlas-cached-tokens"]) if told["x-kvatlas-reason"] == "precise" else 0

                await until(predicted, f"its {life} life to find the prompt in the index", DEADLINE_S)
                assert await predicted() == BLOCK * 10
                assert await recorded(single.url, prefix, "exact")
                up.signal(signal.SIGTERM)
                assert await up.exited() == 0
                up.assert_sound()


async def recorded(url: str, prefix: str, sync: str) -> bool:
    async with stored(url, prefix) as store:
        return any(f'"sync":"{sync}"'.encode() in record for record in (await store.records())[1].values())
