"""The peer: NVIDIA Dynamo's standalone indexer, where `KVATLAS_BENCH_DYNAMO` names a Python that has the package
`ai-dynamo-runtime`. It gets the same events from the same sockets, and is asked for the same prompts.

It names blocks itself: xxh3_64 with seed 1337 over the token ids (u32, little-endian), each block on its own, as signed
integers; a prompt's blocks are found from its first one on, and counted in tokens. Version 1.6.1: `python -m
dynamo.indexer --help`, `POST /query_by_hash`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import numpy as np
import xxhash

from kvatlas_loadtest.bench.deployment import until
from kvatlas_loadtest.bench.feeds import Feed, Prompt
from kvatlas_loadtest.bench.stub_engines import MODEL
from kvatlas_loadtest.valkey import free_port

NAME = "NVIDIA Dynamo, standalone indexer"
_SEED = 1337


def python() -> str | None:
    """A Python with Dynamo's indexer; None: there is no peer."""
    return os.environ.get("KVATLAS_BENCH_DYNAMO") or None


class Dynamo:
    """A running one. `pid`: of its process."""

    def __init__(self, session: aiohttp.ClientSession, url: str, pid: int) -> None:
        self.pid = pid
        self._session = session
        self._url = url

    async def found(self, prompt: Prompt, engine: int, blocks: int) -> bool:
        """Whether a lookup finds so many leading blocks of a prompt on an engine (counted from 0)."""
        return (await self.lookup(names(prompt))).get(engine, 0) == blocks * prompt.block_size

    async def lookup(self, named: Sequence[int]) -> dict[int, int]:
        """Engine -> leading tokens."""
        body = {"model_name": MODEL, "block_hashes": named}
        async with self._session.post(f"{self._url}/query_by_hash", json=body) as response:
            response.raise_for_status()
            scores = (await response.json())["scores"]
        return {int(engine) - 1: ranks["0"] for engine, ranks in scores.items()}

    async def lookup_s(self, prompt: Prompt) -> float:
        """Seconds from the request, made ahead, to its answer."""
        named = names(prompt)
        began = time.perf_counter()
        await self.lookup(named)
        return time.perf_counter() - began


def names(prompt: Prompt) -> list[int]:
    data = prompt.tokens.astype("<u4").tobytes()
    size = 4 * prompt.block_size
    hashes = [xxhash.xxh3_64_intdigest(data[at : at + size], seed=_SEED) for at in range(0, len(data), size)]
    signed: list[int] = np.array(hashes, np.uint64).view(np.int64).tolist()
    return signed


@asynccontextmanager
async def dynamo(folder: Path, feeds: Sequence[Feed], block_size: int) -> AsyncIterator[Dynamo]:
    """Listens to these engines. Raises `TimeoutError` when it does not."""
    interpreter, port = python(), free_port()
    assert interpreter is not None
    workers = ",".join(f"{number}={feed.endpoint}" for number, feed in enumerate(feeds, start=1))
    command = ["-m", "dynamo.indexer", "--port", str(port), "--block-size", str(block_size)]
    command += ["--model-name", MODEL, "--workers", workers]
    with (folder / "dynamo.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(interpreter, *command, stdout=log, stderr=log)
    try:
        async with aiohttp.ClientSession() as session:
            peer = Dynamo(session, f"http://127.0.0.1:{port}", process.pid)
            warm_up = Prompt(np.random.default_rng(0), 1, block_size)

            async def listens() -> bool:
                for feed in feeds:
                    await feed.send(warm_up.message(0, 1))
                await asyncio.sleep(0.1)
                try:
                    return len(await peer.lookup(names(warm_up))) == len(feeds)
                except aiohttp.ClientError:
                    return False

            await until(listens, "Dynamo to listen to every engine")
            yield peer
    finally:
        process.kill()
        await process.wait()
