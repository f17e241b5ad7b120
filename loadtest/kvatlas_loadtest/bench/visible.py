"""How long after an engine has published an event a lookup shows it, while 20,000 blocks a second come in.

A real indexer process (over Redis two, one that owns the engine and one that is asked), a real PUB socket, the client
that routers use. The blocks of the message just sent are looked up again and again until all are found, then those of
the message sent next: the time from the send to that answer, one lookup included, is what a user's next request would
have to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from kvatlas_common.blocks.extras import PromptExtras
from kvatlas_common.wire import match_request
from kvatlas_loadtest.bench.rows import Options, Row, at_most, only_told
from kvatlas_loadtest.engine import EngineConfig, SimulatedEngine
from kvatlas_loadtest.events import EventEncoder
from kvatlas_loadtest.hashing import PromptChain
from kvatlas_loadtest.kv_events import Stored, key_of
from kvatlas_loadtest.percentiles import percentile
from kvatlas_loadtest.process import Node
from kvatlas_loadtest.time_model import NO_TIME
from kvatlas_loadtest.valkey import Valkey
from kvatlas_router.adapters.index_client import LookupFailed, Shard

BLOCKS_PER_S = 20_000
EVENT_BLOCKS = 94
ASK_AGAIN_S = 0.0005
WARM_UP = 200  # messages
FOUND_WITHIN_S = 5.0
BUDGETS_MS = {"memory": 10.0, "redis": 20.0}


async def memory_rows(options: Options) -> list[Row]:
    return await _rows(options, "memory")


async def redis_rows(options: Options) -> list[Row]:
    return await _rows(options, "redis")


async def _rows(options: Options, store: str) -> list[Row]:
    waits_ms = sorted(1e3 * wait for wait in await _measured(store, options))
    unit = f"ms at {BLOCKS_PER_S} blocks/s, of {len(waits_ms)}"
    p50, p99 = (percentile(waits_ms, share) for share in (0.5, 0.99))
    return [
        at_most(f"visible_{store}_p99_ms", p99, unit, BUDGETS_MS[store]),
        only_told(f"visible_{store}_p50_ms", p50, unit),
    ]


def prompts(config: EngineConfig, count: int, seed: int = 0) -> list[Stored]:
    """Each is one prompt's blocks, hashed as the engine would."""
    chance = random.Random(seed)
    made: list[Stored] = []
    for _ in range(count):
        tokens = [chance.randrange(1000, 30_000) for _ in range(EVENT_BLOCKS * config.limits.block_size)]
        hashes = tuple(PromptChain(config.profile(), PromptExtras(), config.hashes_as_bytes).extend(tokens))
        made.append(Stored(hashes, None, tuple(tokens), (None,) * EVENT_BLOCKS))
    return made


def publish(engine: SimulatedEngine, stored: Stored) -> None:
    encoder = EventEncoder(engine.config.version, engine.config.limits.block_size)
    engine.publisher().publish(encoder.batch([stored], time.time(), 0))


def asking_for(config: EngineConfig, stored: Stored) -> Any:
    return match_request(config.model, {config.profile().name: [key_of(each) for each in stored.hashes]})


async def _measured(store: str, options: Options) -> list[float]:
    """Seconds from send to found, of every message that was asked for."""
    config = EngineConfig(time_model=NO_TIME)
    sent = prompts(config, WARM_UP + options.count(2_000, 20))
    async with SimulatedEngine(config) as engine, _indexed(store, options.folder, engine) as shard:
        waits: list[float] = []
        asking: asyncio.Task[None] | None = None
        due = time.perf_counter()
        for number, stored in enumerate(sent):
            due += EVENT_BLOCKS / BLOCKS_PER_S
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            sent_at = time.perf_counter()
            publish(engine, stored)
            if number >= WARM_UP and (asking is None or asking.done()):
                if asking is not None:
                    asking.result()
                asking = asyncio.create_task(_found(shard, asking_for(config, stored), sent_at, waits))
        if asking is not None:
            await asking
        return waits


async def _found(shard: Shard, request: Any, sent_at: float, waits: list[float]) -> None:
    async with asyncio.timeout(FOUND_WITHIN_S):
        while True:
            answer = await shard.match(request, FOUND_WITHIN_S)
            if answer.matches and answer.matches[0].blocks == EVENT_BLOCKS:
                waits.append(time.perf_counter() - sent_at)
                return
            await asyncio.sleep(ASK_AGAIN_S)


@contextlib.asynccontextmanager
async def _indexed(store: str, folder: Path, engine: SimulatedEngine) -> AsyncIterator[Shard]:
    """Indexers that know the engine; answers the one to ask."""
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    flag = f"{engine.address},events={engine.events_endpoint},replay={engine.replay_endpoint}"
    command = ["kvatlas_cli", "indexer", "--grpc-listen", "127.0.0.1:0", "--rest-listen", "127.0.0.1:0"]
    command += ["--zmq-listen", "tcp://127.0.0.1:0", "--engine", flag]
    async with contextlib.AsyncExitStack() as stack:
        grpc: dict[str, str] = {}
        names = ["only"]
        if store == "redis":
            valkey = await asyncio.to_thread(Valkey(folder / "valkey").start)
            stack.callback(valkey.stop)
            command += ["--store", valkey.url]
            names = ["first", "second"]
        for name in names:
            node = _node(name, folder, [*command, "--shard", name] if store == "redis" else command, grpc)
            stack.callback(node.kill)
            await node.start()
        (first,) = prompts(engine.config, 1, seed=1)  # from which the engine's hash profile is learnt
        publish(engine, first)
        # With two shards one of them owns the engine. Whichever it is, asking the second is what routers do as well.
        shard = Shard(grpc[names[-1]], "bench", lambda: None, lambda: None)
        stack.push_async_callback(shard.close)
        await _known(shard, asking_for(engine.config, first))
        yield shard


def _node(name: str, folder: Path, command: Sequence[str], grpc: dict[str, str]) -> Node:
    def ready(line: Any) -> bool:
        if line.get("event") == "indexer ready":
            grpc[name] = line["grpc"]
        return name in grpc

    return Node(name, folder, lambda: command, ready)


async def _known(shard: Shard, request: Any) -> None:
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(LookupFailed):  # no engine is known yet
                if (await shard.match(request, 1.0)).matches:
                    return
            await asyncio.sleep(0.02)
