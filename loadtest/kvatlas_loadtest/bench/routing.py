"""What a router adds to the time to the first byte, and the CPU it takes: a system prompt of 6,000 tokens seen before,
a user's turn of 1,200 tokens that nobody has seen, against the same engine asked directly.

Asked in turns, so that a busy machine is busy for both. The engine costs next to nothing, the client neither.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from kvatlas_common.blocks.keys import prompt_keys
from kvatlas_common.prompts.requests import CHAT
from kvatlas_loadtest.bench.accounting import cpu_s
from kvatlas_loadtest.bench.deployment import Service, answers, indexer, router, stub_engines, until
from kvatlas_loadtest.bench.feeds import EVENT_BLOCKS, Feed, begin, feeds, hash_flags, profile, stored
from kvatlas_loadtest.bench.prompts import Texts, model_folder
from kvatlas_loadtest.bench.rows import Options, Row, at_most, only_told
from kvatlas_loadtest.bench.stub_engines import MODEL
from kvatlas_loadtest.percentiles import percentile
from kvatlas_loadtest.prompting import Prompter

ENGINES = 4
BLOCK = 16
SYSTEM_TOKENS, TURN_TOKENS, CHUNKS = 6_000, 1_200, 50
WARM_UP = 20
AT_ONCE = 4
DEADLINE_MS = "200"
"""For lookups: what is measured is how long they take, not how many are given up on a busy machine."""


@dataclass
class Client:
    """One connection to an HTTP server, kept. `cached`: what routers predicted, by answer."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    cached: list[int] = field(default_factory=list)

    async def ask(self, body: bytes) -> float:
        """Seconds to the first byte of the answer's body. Reads all of it."""
        head = f"POST {CHAT} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        began = time.perf_counter()
        self.writer.write(head.encode() + b"\r\n\r\n" + body)
        answer = await self.reader.readuntil(b"\r\n\r\n")
        first = await self.reader.readuntil(b"\r\n")
        took = time.perf_counter() - began
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        self.cached += [int(line[24:]) for line in answer.lower().split(b"\r\n") if line.startswith(_CACHED)]
        while size := int(first, 16):
            await self.reader.readexactly(size + 2)
            first = await self.reader.readuntil(b"\r\n")
        await self.reader.readexactly(2)
        return took


_CACHED = b"x-kvatlas-cached-tokens:"


@dataclass(frozen=True, slots=True)
class Prompts:
    """A system prompt of so many tokens, and turns of so many that are new."""

    system: str
    texts: Texts
    system_tokens: int = SYSTEM_TOKENS
    turn_tokens: int = TURN_TOKENS

    @property
    def cached(self) -> int:
        """Tokens of the system prompt in whole blocks."""
        return self.system_tokens // BLOCK * BLOCK

    def body(self, tokens: int = 1, system: str | None = None) -> bytes:
        """A request whose user's turn nobody has seen; its answer has so many chunks."""
        messages = [
            {"role": "system", "content": self.system if system is None else system},
            {"role": "user", "content": self.texts.cut(self.turn_tokens)},
        ]
        return json.dumps({"model": MODEL, "max_tokens": tokens, "stream": True, "messages": messages}).encode()


async def rows(options: Options) -> list[Row]:
    model, called = await asyncio.to_thread(model_folder, options.folder)
    texts = Texts(model, seed=1)
    prompts = Prompts(texts.cut(SYSTEM_TOKENS), texts)
    async with AsyncExitStack() as stack:
        made, routing = await routed(stack, options.folder, model)
        await hold(made[0], prompts, Prompter.load(model))
        through = await stack.enter_async_context(client(routing.url))
        await until(lambda: predicted(through, prompts), "the system prompt to be found in the index")
        engine = await stack.enter_async_context(client(f"http://{made[0].address}"))
        direct, by_router = await _in_turns(engine, through, prompts, options.count(200, 5))
        per_request = await _cpu(stack, routing, prompts, options.count(200, 8))
    return _told(direct, by_router, per_request, called)


async def routed(stack: AsyncExitStack, folder: Path, model: Path) -> tuple[list[Feed], Service]:
    """Engines that cost nothing, an indexer that knows them, and a router before them with the model's files."""
    enter = stack.enter_async_context
    stubs = await enter(stub_engines(folder, ENGINES))
    made = await enter(feeds(stubs.addresses))
    told = [*hash_flags(BLOCK), *(flag for feed in made for flag in feed.flags)]
    indexing = await enter(indexer(folder, *told))
    await begin(made, [indexing] * ENGINES, BLOCK)
    known = ("--indexer", indexing.grpc, "--lookup-deadline-ms", DEADLINE_MS)
    routing = await enter(router(folder, *known, "--model-files", f"{MODEL}={model}"))
    await until(lambda: answers(f"{routing.url}/readyz"), "the router to be ready")
    return made, routing


def _told(direct: Sequence[float], routed: Sequence[float], per_request: float, called: str) -> list[Row]:
    """Of the slow ones is told by how much they exceed the engine's own median: that counts what the machine does to
    them as the router's. The peer is the engine itself by that measure.
    """
    added_p50 = median(routed) - median(direct)
    added_p99 = percentile(sorted(routed), 0.99) - median(direct)
    p99 = at_most("router_added_p99_ms", added_p99 * 1e3, f"ms, of {len(routed)}, {called}", 10.0)
    p99["peer"] = "the engine asked directly: its p99 above its p50"
    p99["peer_value"] = (percentile(sorted(direct), 0.99) - median(direct)) * 1e3
    return [
        at_most("router_added_p50_ms", added_p50 * 1e3, f"ms, of {len(routed)}, {called}", 3.0),
        p99,
        at_most(
            "router_cpu_ms_per_request", per_request * 1e3, f"ms of the router's CPU, {CHUNKS} chunks, {called}", 5.0
        ),
        only_told("router_direct_p50_ms", median(direct) * 1e3, "ms to the first byte without a router"),
    ]


async def hold(feed: Feed, prompts: Prompts, prompter: Prompter) -> None:
    """An engine says that it holds the system prompt."""
    (tokens,) = prompter.prompts(CHAT, json.loads(prompts.body()))
    keys = prompt_keys(profile(BLOCK), tokens)[: prompts.cached // BLOCK].tolist()
    for start in range(0, len(keys), EVENT_BLOCKS):
        part = keys[start : start + EVENT_BLOCKS]
        its = list(tokens[start * BLOCK : (start + len(part)) * BLOCK])
        await feed.send(stored(part, its, BLOCK, keys[start - 1] if start else None))


async def predicted(through: Client, prompts: Prompts) -> bool:
    through.cached.clear()
    await through.ask(prompts.body())
    return through.cached == [prompts.cached]


async def _in_turns(engine: Client, through: Client, prompts: Prompts, count: int) -> tuple[list[float], list[float]]:
    direct, by_router = [], []
    for _ in range(count + WARM_UP):
        body = prompts.body()
        direct.append(await engine.ask(body))
        by_router.append(await through.ask(body))
    found = sum(cached >= SYSTEM_TOKENS - BLOCK for cached in through.cached)
    assert found > 0.95 * count, f"only {found} of {count} requests were found in the index"
    return direct[WARM_UP:], by_router[WARM_UP:]


async def _cpu(stack: AsyncExitStack, routing: Service, prompts: Prompts, count: int) -> float:
    """Seconds per request, several at a time."""
    clients = [await stack.enter_async_context(client(routing.url)) for _ in range(AT_ONCE)]
    bodies = [[prompts.body(CHUNKS) for _ in range(count // AT_ONCE)] for _ in clients]

    async def ask_all(asking: Client, its: Sequence[bytes]) -> None:
        for body in its:
            await asking.ask(body)

    spent = cpu_s(routing.pid)
    await asyncio.gather(*(ask_all(one, its) for one, its in zip(clients, bodies, strict=True)))
    return (cpu_s(routing.pid) - spent) / sum(map(len, bodies))


@asynccontextmanager
async def client(url: str) -> AsyncIterator[Client]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 22)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
