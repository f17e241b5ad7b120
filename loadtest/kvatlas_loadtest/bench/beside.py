"""The memory store's rows, beside NVIDIA Dynamo's indexer where there is one: the same events, the same lookups.

Both are asked in turns, and take in events in turns, so that a busy machine is busy for both; our own budget is
measured before, with nobody else there, as it is without a peer. Rows `..._of_dynamo` say
how many times faster we are; below 1, we are slower. A lookup is compared as each is made to be asked: ours for the
keys of blocks or, as a router has to, from token ids (their keys first, hashed as the engines do); Dynamo's for names
of blocks (`/query_by_hash`) or token ids (`/query`).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from kvatlas_common.wire import match_request
from kvatlas_common.words import EngineId
from kvatlas_loadtest.bench.accounting import running_s
from kvatlas_loadtest.bench.deployment import Service, until
from kvatlas_loadtest.bench.dynamo import NAME, Dynamo, Question, dynamo, python
from kvatlas_loadtest.bench.feeds import EVENT_BLOCKS, Prompt, feeds
from kvatlas_loadtest.bench.ingest import BLOCK as INGEST_BLOCK
from kvatlas_loadtest.bench.ingest import BUDGETS as INGEST_BUDGETS
from kvatlas_loadtest.bench.ingest import ENGINES as INGEST_ENGINES
from kvatlas_loadtest.bench.ingest import Ingest, ingested, new_prompts, timed
from kvatlas_loadtest.bench.lookups import (
    BLOCK,
    PROFILE,
    WARM_UP,
    WITHIN_S,
    Held,
    check,
    indexed,
    p50_ms,
    requests,
    tell,
    told,
)
from kvatlas_loadtest.bench.rows import Options, Row, at_least, only_told
from kvatlas_loadtest.bench.stub_engines import MODEL
from kvatlas_router.adapters.index_client import Shard

TIMES = 2.0
FLEET = 256
ROUNDS = 3

Lookup = Callable[[int], Awaitable[tuple[dict[str, int], float]]]
"""Of a prompt, by its number: engine -> leading blocks, and the seconds it took."""


@dataclass(slots=True)
class Lookups:
    """One side's, one after the other: seconds each, and of its process's CPU for all."""

    name: str
    ask: Lookup
    pid: int
    engines: Sequence[str]
    took: list[float] = field(default_factory=list)
    spent: float = 0.0

    @property
    def cpu_ms(self) -> float:
        return self.spent / len(self.took) * 1e3


async def lookup_rows(options: Options) -> list[Row]:
    count = options.count(100, 4)
    held = Held.drawn((count + WARM_UP) * (1 if python() is None else 2))
    alone, both = held.parts(count + WARM_UP)
    async with AsyncExitStack() as stack:
        service, shard, engines = await stack.enter_async_context(indexed(options.folder / "memory", held, "memory"))
        by_itself = Lookups("keys", _by_keys(shard, alone), service.pid, engines)
        await _in_turns(alone, [by_itself])
        rows = told("memory", by_itself.took, by_itself.spent)
        if python() is None:
            return rows
        peer = await _peer(stack, options.folder / "peer", both)
        keys, by_hash = await _by_key_in_turns(service, shard, engines, peer, both)
        tokens = Lookups("token ids", _by_tokens(shard, both), service.pid, engines)
        query = Lookups("/query", _by(Question.by_tokens, peer, both), peer.pid, _numbers(both))
        await _in_turns(both, [tokens, query])
    return rows + compared("grpc_match_memory", keys, by_hash) + compared("grpc_match_tokens", tokens, query)


async def fleet_rows(options: Options) -> list[Row]:
    """Lookups about a large fleet, where each engine holds some of every prompt. Nothing without a peer."""
    if python() is None:
        return []
    held = Held.drawn(options.count(30, 2) + WARM_UP, engines=options.count(FLEET, 4))
    async with AsyncExitStack() as stack:
        service, shard, engines = await stack.enter_async_context(indexed(options.folder / "memory", held, "memory"))
        peer = await _peer(stack, options.folder / "peer", held)
        keys, by_hash = await _by_key_in_turns(service, shard, engines, peer, held)
    return compared("grpc_match_256_engines", keys, by_hash, budget=None)


async def ingest_rows(options: Options) -> list[Row]:
    prompts = new_prompts(options.count(400, 4))
    ours, theirs = list[Ingest](), list[Ingest]()
    for number in range(1 if python() is None else options.count(ROUNDS, 1)):
        ours.append(await ingested(options.folder / f"memory-{number}", prompts, shards=0))
        if python() is not None:
            theirs.append(await _ingested_by_peer(options.folder / f"peer-{number}", prompts))
    run = sorted(ours, key=lambda its: its.per_s)[len(ours) // 2]
    row = at_least("ingest_memory_blocks_per_s", run.per_s, run.unit, INGEST_BUDGETS["memory"])
    per_cpu = only_told("ingest_memory_blocks_per_cpu_s", run.per_cpu_s, "blocks/s of the indexer's CPU, all threads")
    if not theirs:
        return [row, per_cpu]
    row["peer"] = per_cpu["peer"] = NAME
    row["peer_value"], per_cpu["peer_value"] = (
        median(its.per_s for its in theirs),
        median(its.per_cpu_s for its in theirs),
    )
    times = median(our.per_s / their.per_s for our, their in zip(ours, theirs, strict=True))
    times_cpu = median(our.per_cpu_s / their.per_cpu_s for our, their in zip(ours, theirs, strict=True))
    cores = median(their.indexer_cpu_s / their.seconds for their in theirs)
    return [
        row,
        per_cpu,
        at_least(
            "ingest_memory_of_dynamo",
            times,
            f"times its blocks/s, p50 of {len(ours)}; it took {cores:.2f} cores",
            TIMES,
        ),
        only_told("ingest_memory_of_dynamo_per_cpu", times_cpu, "times its blocks/s of CPU, all threads"),
    ]


def compared(name: str, ours: Lookups, theirs: Lookups, budget: float | None = TIMES) -> list[Row]:
    """In times: of latency, which may have a budget, and of CPU."""
    our_ms, their_ms = p50_ms(ours.took), p50_ms(theirs.took)
    unit = (
        f"times faster, p50 of {len(ours.took) - WARM_UP}: {ours.name} {our_ms:.2f} ms, {theirs.name} {their_ms:.2f} ms"
    )
    cpu = f"times less CPU per lookup: {ours.cpu_ms:.2f} ms, {theirs.cpu_ms:.2f} ms"
    times = f"{name}_of_dynamo", their_ms / our_ms, unit
    return [
        only_told(*times) if budget is None else at_least(*times, budget),
        only_told(f"{name}_of_dynamo_cpu", theirs.cpu_ms / ours.cpu_ms, cpu),
    ]


async def _by_key_in_turns(
    service: Service, shard: Shard, engines: Sequence[str], peer: Dynamo, held: Held
) -> tuple[Lookups, Lookups]:
    keys = Lookups("keys", _by_keys(shard, held), service.pid, engines)
    by_hash = Lookups("/query_by_hash", _by(Question.by_hash, peer, held), peer.pid, _numbers(held))
    await _in_turns(held, [keys, by_hash])
    return keys, by_hash


def _numbers(held: Held) -> list[str]:
    """What the peer calls the engines."""
    return list(map(str, range(held.engines)))


async def _in_turns(held: Held, sides: Sequence[Lookups]) -> None:
    """Every answer is held against the truth."""
    for side in sides:
        side.spent -= running_s(side.pid)
    for number, depths in enumerate(held.depths):
        for side in sides:
            found, seconds = await side.ask(number)
            side.took.append(seconds)
            check(found, side.engines, depths)
    for side in sides:
        side.spent += running_s(side.pid)


def _by_keys(shard: Shard, held: Held) -> Lookup:
    asking = requests(held)

    async def ask(number: int) -> tuple[dict[str, int], float]:
        began = time.perf_counter()
        found = (await shard.match(asking[number], WITHIN_S)).blocks()
        seconds = time.perf_counter() - began
        return _named(found), seconds

    return ask


def _by_tokens(shard: Shard, held: Held) -> Lookup:
    async def ask(number: int) -> tuple[dict[str, int], float]:
        began = time.perf_counter()
        keys = held.prompts[number].true_keys()
        found = (await shard.match(match_request(MODEL, {PROFILE: keys}), WITHIN_S)).blocks()
        seconds = time.perf_counter() - began
        return _named(found), seconds

    return ask


def _named(found: Mapping[EngineId, int]) -> dict[str, int]:
    return {str(engine): blocks for engine, blocks in found.items()}


def _by(question: Callable[[Prompt], Question], peer: Dynamo, held: Held) -> Lookup:
    asking = [question(prompt) for prompt in held.prompts]

    async def ask(number: int) -> tuple[dict[str, int], float]:
        found, seconds = await peer.ask(asking[number])
        return {str(engine): tokens // BLOCK for engine, tokens in found.items()}, seconds

    return ask


async def _peer(stack: AsyncExitStack, folder: Path, held: Held) -> Dynamo:
    """It has been told the same, and has taken it in."""
    made = await stack.enter_async_context(feeds([f"127.0.0.1:{n}" for n in range(held.engines)]))
    peer = await stack.enter_async_context(dynamo(folder, made, BLOCK))
    await tell(made, held)
    for prompt, depths in zip(held.prompts, held.depths, strict=True):
        for engine in (0, held.engines - 1):
            await until(lambda p=prompt, e=engine, d=depths[engine]: peer.found(p, e, d), "all to be taken in")  # type: ignore[misc]
    return peer


async def _ingested_by_peer(folder: Path, prompts: Sequence[Sequence[Prompt]]) -> Ingest:
    addresses = [f"127.0.0.1:{number}" for number in range(INGEST_ENGINES)]
    async with feeds(addresses) as made, dynamo(folder, made, INGEST_BLOCK) as peer:

        async def known(engine: int, prompt: Prompt) -> bool:
            return await peer.found(prompt, engine, EVENT_BLOCKS)

        return await timed(made, prompts, known, [peer.pid], None)
