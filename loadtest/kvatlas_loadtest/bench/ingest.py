"""Blocks per second from event bytes on the socket to visible: 16 engines, messages of 94 blocks, as fast as they are
taken in. Over Redis with 1, 2 and 4 shards, each owning as many engines.

A second figure divides by the CPU the indexers have used, all their threads together: what one core would do if it had
nothing else to do, and what a busy machine changes least.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from kvatlas_common.wire import match_request
from kvatlas_indexer.core.ownership import winner
from kvatlas_loadtest.bench.accounting import busy_share, cpu_s
from kvatlas_loadtest.bench.deployment import client, found, indexer, stub_engines, until, valkey
from kvatlas_loadtest.bench.feeds import EVENT_BLOCKS, Feed, Prompt, begin, feeds, hash_flags, profile, taken_in
from kvatlas_loadtest.bench.rows import Options, Row, at_least, only_told
from kvatlas_loadtest.bench.stub_engines import MODEL

ENGINES = 16
BLOCK = 64  # a message of 94 blocks is a context of 6,000 tokens
PROFILE = profile(BLOCK).name
SAMPLE = 20
USED_UP = 0.85  # of a core, or of all: the rest is what nobody can get
BUDGETS = {"memory": 500_000.0, "redis": 100_000.0}

Found = Callable[[int, Prompt], Awaitable[bool]]
"""Whether an engine (counted from 0) is known to hold all of a prompt."""


@dataclass(frozen=True, slots=True)
class Ingest:
    """CPU in seconds; `busy`: share of the machine's CPU that was used meanwhile, by anybody, 0..1."""

    blocks: int
    indexers: int
    seconds: float
    indexer_cpu_s: float
    server_cpu_s: float
    busy: float

    @property
    def per_s(self) -> float:
        return self.blocks / self.seconds

    @property
    def per_cpu_s(self) -> float:
        return self.blocks / max(self.indexer_cpu_s, 0.01)  # the books are kept in hundredths

    @property
    def unit(self) -> str:
        """With what the CPU went to, and so what limits."""
        indexers, server = self.indexer_cpu_s / self.seconds, self.server_cpu_s / self.seconds
        of_server = f", Valkey {server:.2f}" if server else ""
        cores = f"cores: indexers {indexers:.2f}{of_server}; machine {self.busy:.0%} busy"
        return f"blocks/s, limited by {self.limit}; {cores}"

    @property
    def limit(self) -> str:
        """What was used up. A server of Redis's kind executes in one thread, an indexer applies in one."""
        if self.server_cpu_s > USED_UP * self.seconds:
            return "Valkey's thread"
        if self.indexer_cpu_s > USED_UP * self.seconds * self.indexers:
            return "the indexers' loops"
        return "the machine's cores" if self.busy > USED_UP else "their waiting for each other"


async def redis_rows(options: Options) -> list[Row]:
    rows: list[Row] = []
    prompts = new_prompts(options.count(100, 4))
    for shards in (1, 2, 4):
        run = await ingested(options.folder / str(shards), prompts, shards)
        name = f"ingest_redis_{shards}_shards"
        if shards == 1:
            rows.append(at_least("ingest_redis_blocks_per_s", run.per_s, run.unit, BUDGETS["redis"]))
        else:
            rows.append(only_told(f"{name}_blocks_per_s", run.per_s, run.unit))
        rows.append(only_told(f"{name}_blocks_per_cpu_s", run.per_cpu_s, "blocks/s of the shards' CPU, all threads"))
        rows.append(only_told(f"{name}_server_us", run.server_cpu_s / run.blocks * 1e6, "us of Valkey's CPU per block"))
    return rows


def new_prompts(per_engine: int) -> list[list[Prompt]]:
    """One message each, encoded."""
    rng = np.random.default_rng(1)
    prompts = [[Prompt(rng, EVENT_BLOCKS, BLOCK) for _ in range(per_engine)] for _ in range(ENGINES)]
    for prompt in (prompt for its in prompts for prompt in its):
        prompt.message(0, EVENT_BLOCKS)
    return prompts


async def ingested(folder: Path, prompts: Sequence[Sequence[Prompt]], shards: int) -> Ingest:
    """`shards` 0: the memory store."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        stubs = await enter(stub_engines(folder, ENGINES))
        made = await enter(feeds(stubs.addresses))
        told = [*hash_flags(BLOCK), *(flag for feed in made for flag in feed.flags)]
        server_pid = None
        if shards:
            server = await enter(valkey(folder))
            told, server_pid = [*told, "--store", server.url], server.pid
            names = even_names(stubs.addresses, shards)
            services = [await enter(indexer(folder, *told, "--shard", name, name=name)) for name in names]
            owners = [services[names.index(winner(feed.address, names) or "")] for feed in made]
        else:
            services = [await enter(indexer(folder, *told))]
            owners = services * ENGINES
        asked = await enter(client(services[-1]))
        await begin(made, owners, BLOCK)

        async def known(engine: int, prompt: Prompt) -> bool:
            request = match_request(MODEL, {PROFILE: prompt.keys})
            return await found(asked, request, made[engine].address, EVENT_BLOCKS)

        run = await timed(made, prompts, known, [service.pid for service in services], server_pid)
        await taken_in(run.blocks + ENGINES, made, owners)
        return run


async def timed(
    made: Sequence[Feed],
    prompts: Sequence[Sequence[Prompt]],
    known: Found,
    pids: Sequence[int],
    server_pid: int | None,
) -> Ingest:
    servers = [] if server_pid is None else [server_pid]
    cpu, server_cpu, machine = cpu_s(*pids), cpu_s(*servers), busy_share()
    began = time.perf_counter()
    sending = asyncio.create_task(_send(made, prompts))
    for engine, its in enumerate(prompts):
        await until(lambda e=engine, p=its[-1]: known(e, p), f"the last message of engine {engine}")  # type: ignore[misc]
    seconds, indexer_cpu_s, server_cpu_s = time.perf_counter() - began, cpu_s(*pids) - cpu, cpu_s(*servers) - server_cpu
    busy, could = (after - before for after, before in zip(busy_share(), machine, strict=True))
    await sending
    for engine, its in enumerate(prompts):  # no figure comes from a run that lost some
        for prompt in its[:: len(its) // SAMPLE or 1]:
            assert await known(engine, prompt), f"a message of engine {engine} was lost"
    blocks = sum(map(len, prompts)) * EVENT_BLOCKS
    return Ingest(blocks, len(pids), seconds, indexer_cpu_s, server_cpu_s, busy / could if could else 0.0)


async def _send(made: Sequence[Feed], prompts: Sequence[Sequence[Prompt]]) -> None:
    for turn in range(len(prompts[0])):
        for feed, its in zip(made, prompts, strict=True):
            await feed.send(its[turn].message(0, EVENT_BLOCKS))
        await asyncio.sleep(0)


def even_names(addresses: Sequence[str], shards: int) -> list[str]:
    """Shard names by which each gets as many engines: what is measured is not the luck of the draw."""
    for attempt in count():
        names = [f"shard-{attempt}-{number}" for number in range(shards)]
        owned = [winner(address, names) for address in addresses]
        if len({owned.count(name) for name in names}) == 1:
            return names
    raise AssertionError("unreachable")
