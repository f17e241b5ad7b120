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
from statistics import median

from kvatlas_common.blocks.keys import prompt_keys
from kvatlas_common.prompts.requests import CHAT
from kvatlas_loadtest.bench.accounting import cpu_s
from kvatlas_loadtest.bench.deployment import Service, indexer, router, stub_engines, until
from kvatlas_loadtest.bench.feeds import Feed, begin, feeds, hash_flags, profile, stored
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
    system: str
    texts: Texts

    def body(self, tokens: int = 1) -> bytes:
        """A request whose user's turn nobody has seen; its answer has so many chunks."""
        messages = [
            {"role": "system", "content": self.system},
            {"role": "user", "content": self.texts.cut(TURN_TOKENS)},
        ]
        return json.dumps({"model": MODEL, "max_tokens": tokens, "stream": True, "messages": messages}).encode()


async def rows(options: Options) -> list[Row]:
    model, called = await asyncio.to_thread(model_folder, options.folder)
    texts = Texts(model, seed=1)
    prompts = Prompts(texts.cut(SYSTEM_TOKENS), texts)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        stubs = await enter(stub_engines(options.folder, ENGINES))
        made = await enter(feeds(stubs.addresses))
        told = [*hash_flags(BLOCK), *(flag for feed in made for flag in feed.flags)]
        indexing = await enter(indexer(options.folder, *told))
        await begin(made, [indexing] * ENGINES, BLOCK)
        known = ("--indexer", indexing.grpc, "--lookup-deadline-ms", DEADLINE_MS)
        routing = await enter(router(options.folder, *known, "--model-files", f"{MODEL}={model}"))
        holder = await _held(made, prompts, Prompter.load(model))
        through = await enter(_client(routing.url))
        await until(lambda: _predicted(through, prompts), "the system prompt to be found in the index")
        direct, routed = await _in_turns(
            await enter(_client(f"http://{holder.address}")), through, prompts, options.count(200, 5)
        )
        per_request = await _cpu(stack, routing, prompts, options.count(200, 8))
    return _told(direct, routed, per_request, called)


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


async def _held(made: Sequence[Feed], prompts: Prompts, prompter: Prompter) -> Feed:
    """One engine says that it holds the system prompt; it is returned."""
    (tokens,) = prompter.prompts(CHAT, json.loads(prompts.body()))
    keys = prompt_keys(profile(BLOCK), tokens)[: SYSTEM_TOKENS // BLOCK].tolist()
    await made[0].send(stored(keys, list(tokens[: len(keys) * BLOCK]), BLOCK))
    return made[0]


async def _predicted(through: Client, prompts: Prompts) -> bool:
    through.cached.clear()
    await through.ask(prompts.body())
    return through.cached == [SYSTEM_TOKENS // BLOCK * BLOCK]


async def _in_turns(engine: Client, through: Client, prompts: Prompts, count: int) -> tuple[list[float], list[float]]:
    direct, routed = [], []
    for _ in range(count + WARM_UP):
        body = prompts.body()
        direct.append(await engine.ask(body))
        routed.append(await through.ask(body))
    found = sum(cached >= SYSTEM_TOKENS - BLOCK for cached in through.cached)
    assert found > 0.95 * count, f"only {found} of {count} requests were found in the index"
    return direct[WARM_UP:], routed[WARM_UP:]


async def _cpu(stack: AsyncExitStack, routing: Service, prompts: Prompts, count: int) -> float:
    """Seconds per request, several at a time."""
    clients = [await stack.enter_async_context(_client(routing.url)) for _ in range(AT_ONCE)]
    bodies = [[prompts.body(CHUNKS) for _ in range(count // AT_ONCE)] for _ in clients]

    async def ask_all(client: Client, its: Sequence[bytes]) -> None:
        for body in its:
            await client.ask(body)

    spent = cpu_s(routing.pid)
    await asyncio.gather(*(ask_all(client, its) for client, its in zip(clients, bodies, strict=True)))
    return (cpu_s(routing.pid) - spent) / sum(map(len, bodies))


@asynccontextmanager
async def _client(url: str) -> AsyncIterator[Client]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 22)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
