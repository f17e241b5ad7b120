"""What the fault tests share: a load that keeps books, the index as REST shows it, and the truth to hold it against."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import zmq
import zmq.asyncio

from kvatlas_common.events.decode import decode_batch
from kvatlas_common.events.types import AllBlocksCleared, BlockStored
from kvatlas_loadtest.engine import EngineConfig, SimulatedEngine
from kvatlas_loadtest.texts import WORDS
from kvatlas_loadtest.time_model import TimeModel
from tests.integration.engine_kit import simulated_engine
from tests.integration.processes import DEADLINE_S, Router, labelled, until

CHAT = "/v1/chat/completions"
BRISK = TimeModel(speed=4.0)
"""A stream of 32 tokens takes about 70 ms."""

LOAD_S = 120.0
"""After so long a load gives up: a request hangs."""

Table = dict[int, int]  # block key -> copies


# -- a load ------------------------------------------------------------------------------------------------------------


def chat(question: str, context: str = "", *, max_tokens: int = 32) -> dict[str, Any]:
    system = [{"role": "system", "content": context}] if context else []
    return {
        "model": "tiny",
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [*system, {"role": "user", "content": question}],
    }


def bodies(seed: int, *, max_tokens: int = 32, contexts: int = 4, words: int = 150) -> Iterator[dict[str, Any]]:
    """Without end: mostly one of a few contexts, sometimes one nobody has seen, and a question of its own."""
    chance = random.Random(seed)
    shared = [" ".join(chance.choices(WORDS, k=words)) for _ in range(contexts)]
    for number in itertools.count():
        context = chance.choice(shared) if chance.random() < 0.75 else " ".join(chance.choices(WORDS, k=words))
        yield chat(f"{number} {' '.join(chance.choices(WORDS, k=12))}", context, max_tokens=max_tokens)


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and what has come of it so far. Times on the monotonic clock; `pieces`: chunks of the answer.

    `predicted`: cached tokens as the router's header has them; `cached`: as the engine reported them.
    """

    begun: float
    first_at: float | None = None
    ended: float | None = None
    status: int = 0
    engine: str = ""
    reason: str = ""
    predicted: int | None = None
    cached: int | None = None
    pieces: int = 0
    error: str = "no end"  # "" for a whole answer; "cut" where a begun stream ended with an error event

    @property
    def first_byte_s(self) -> float:
        assert self.first_at is not None, self
        return self.first_at - self.begun

    def headed(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self.engine = response.headers.get("x-kvatlas-engine", "")
        self.reason = response.headers.get("x-kvatlas-reason", "")
        predicted = response.headers.get("x-kvatlas-cached-tokens")
        self.predicted = int(predicted) if predicted else None

    def line(self, line: bytes) -> None:
        """A line of the stream. What follows the end, or an error, is not looked at."""
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or self.error != "no end":
            return
        self.first_at = self.first_at or time.monotonic()
        if data == b"[DONE]":
            self.error = ""
            return
        try:
            chunk = json.loads(data)
        except ValueError:  # the half of a chunk before a cut
            return
        if "error" in chunk:
            self.error = "cut" if self.pieces else f"error at once: {chunk['error']}"
        self.pieces += bool(chunk.get("choices"))
        if usage := chunk.get("usage"):
            self.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


async def ask(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], exchange: Exchange | None = None
) -> Exchange:
    """Raises nothing for a request that fails: `error` says how."""
    exchange = exchange or Exchange(time.monotonic())
    try:
        async with session.post(url + CHAT, json=body) as response:
            exchange.headed(response)
            if response.status != 200:
                exchange.error = f"status {response.status}: {(await response.text())[:200]}"
            async for line in response.content:
                exchange.line(line)
    except (aiohttp.ClientError, TimeoutError) as failure:
        exchange.error = repr(failure)
    exchange.ended = time.monotonic()
    return exchange


class Load:
    """Requests under way all the time, `workers` at once; each worker sends its next when it has its answer."""

    def __init__(self, session: aiohttp.ClientSession, url: str, *, max_tokens: int, seed: int) -> None:
        self.exchanges: list[Exchange] = []
        self._session = session
        self._url = url
        self._bodies = bodies(seed, max_tokens=max_tokens)
        self._stopping = False

    async def work(self) -> None:
        while not self._stopping:
            exchange = Exchange(time.monotonic())
            self.exchanges.append(exchange)
            await ask(self._session, self._url, next(self._bodies), exchange)

    def stop(self) -> None:
        """Nothing new is sent; answers under way are awaited where the load is left."""
        self._stopping = True

    @property
    def under_way(self) -> list[Exchange]:
        return [e for e in self.exchanges if e.ended is None]

    def begun_since(self, moment: float) -> list[Exchange]:
        """Those begun after a moment that are over."""
        return [e for e in self.exchanges if e.begun > moment and e.ended is not None]

    async def more(self, count: int = 10) -> list[Exchange]:
        """Waits for so many answers to requests begun from now on."""
        now = time.monotonic()
        await until(lambda: len(self.begun_since(now)) >= count, f"{count} more answers")
        return self.begun_since(now)


@contextlib.asynccontextmanager
async def load(
    session: aiohttp.ClientSession, url: str, workers: int = 4, *, max_tokens: int = 32, seed: int = 0
) -> AsyncIterator[Load]:
    made = Load(session, url, max_tokens=max_tokens, seed=seed)
    async with asyncio.timeout(LOAD_S), asyncio.TaskGroup() as tasks:
        for _ in range(workers):
            tasks.create_task(made.work())
        try:
            yield made
        finally:
            made.stop()


def failures(exchanges: Sequence[Exchange]) -> list[Exchange]:
    return [exchange for exchange in exchanges if exchange.error]


# -- our processes, asked ----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=30)
    ) as session:
        yield session


async def metric(session: aiohttp.ClientSession, base: str, name: str, **labels: str) -> float:
    async with session.get(f"{base}/metrics") as response:
        return labelled(await response.text(), name, labels)


class Index:
    """An indexer over its REST API."""

    def __init__(self, session: aiohttp.ClientSession, rest: str) -> None:
        self.url = f"http://{rest}"
        self._session = session

    async def engines(self) -> dict[str, dict[str, Any]]:
        """By id."""
        return {engine["id"]: engine for engine in (await self._get("/v1/engines"))["engines"]}

    async def engine(self, address: str) -> dict[str, Any]:
        """Empty while it is not known."""
        return (await self.engines()).get(address, {})

    async def sync(self, address: str) -> str:
        return str((await self.engine(address)).get("sync", "not known"))

    async def metric(self, name: str, **labels: str) -> float:
        return await metric(self._session, self.url, f"kvatlas_indexer_{name}", **labels)

    async def held(self, address: str, keys: Sequence[int]) -> Table:
        """Copies of each of these blocks that an engine holds, doubtful ones included."""
        table: Table = {}
        for key in keys:
            found = (await self._get(f"/v1/blocks/{key}?model=tiny"))["holders"]
            copies = sum(h["copies"] for h in found if h["engine"] == address)
            if copies:
                table[key] = copies
        return table

    async def differs(self, address: str, truth: Table) -> str:
        """What of the index is not the truth; "" where they are equal. Every block is asked for by its key, and none
        is left over: the engine holds as many as there are."""
        blocks = (await self.engine(address)).get("blocks") or {}
        if sum(blocks.values()) != len(truth):
            return f"{blocks} blocks held, {len(truth)} true"
        held = await self.held(address, list(truth))
        return "" if held == truth else f"{len(truth.items() ^ held.items())} blocks differ"

    async def agrees(self, address: str, truth: Callable[[], Table], *, sync: str = "exact") -> None:
        """Waits until the index equals the truth, and says so (or that it is not `exact`, as wanted)."""

        last = "nothing"

        async def look() -> bool:
            nonlocal last
            engine = await self.engine(address)
            last = f"sync {engine.get('sync')} ({engine.get('inexact_reason')}), wanted {sync}"
            if engine.get("sync") == sync:
                last = await self.differs(address, truth()) or ""
            return not last

        try:
            await until(look, f"{address} as its own block table")
        except AssertionError as error:
            error.add_note(f"last seen: {last}")
            raise

    async def _get(self, path: str) -> Any:
        async with self._session.get(self.url + path) as response:
            assert response.status == 200, f"{path}: {response.status} {await response.text()}"
            return await response.json()


async def ready_engines(session: aiohttp.ClientSession, router: Router, count: int, *, down: int = 0) -> None:
    """Waits until the router knows so many engines to be ready, and the profile of their keys; so many, to be down."""

    async def look() -> bool:
        told = [await metric(session, router.admin, "kvatlas_router_engines", health=h) for h in ("ready", "down")]
        return told[0] == count and told[1] >= down

    await until(look, f"{count} ready engines in the router")


async def precise(session: aiohttp.ClientSession, router: Router) -> None:
    """Waits until the router asks the index again, and is answered."""

    asked = bodies(seed=1, max_tokens=1)

    async def look() -> bool:
        return (await ask(session, router.url, next(asked))).reason == "precise"

    await until(look, "a precise choice")


# -- engines in this process, and the truth about any ------------------------------------------------------------------


@contextlib.asynccontextmanager
async def simulated(*configs: EngineConfig) -> AsyncIterator[list[SimulatedEngine]]:
    """Simulated engines that share one tokenizer."""
    async with contextlib.AsyncExitStack() as stack:
        engines: list[SimulatedEngine] = []
        for config in configs:
            engines.append(await stack.enter_async_context(simulated_engine(config)))
        yield engines


def flags(engine: SimulatedEngine, *, replay: bool = True) -> tuple[str, str]:
    """How an indexer is told of it: dialled."""
    asked = f",replay={engine.replay_endpoint}" if replay else ""
    return "--engine", f"{engine.address},events={engine.events_endpoint}{asked}"


async def fill(session: aiohttp.ClientSession, engine: SimulatedEngine, count: int = 4, *, seed: int = 0) -> None:
    """Requests straight to an engine, one after the other, of at least one event message each."""
    for body in itertools.islice(bodies(seed), count):
        reply = await ask(session, engine.url, body)
        assert not reply.error, reply


async def published(replay_port: int) -> Table:
    """What an engine's own messages come to, from number 0 on: the truth about one in another process.

    Applied naively, in the order in which its replay endpoint gives them, by nothing of the indexer's.
    """
    context: zmq.asyncio.Context = zmq.asyncio.Context()
    socket = context.socket(zmq.DEALER)
    try:
        socket.connect(f"tcp://127.0.0.1:{replay_port}")
        await socket.send_multipart([b"", bytes(8)])
        held: Counter[int] = Counter()
        for expected in itertools.count():
            async with asyncio.timeout(DEADLINE_S):
                _, _, seq, payload = await socket.recv_multipart()
            if seq == b"\xff" * 8:
                return dict(+held)
            assert int.from_bytes(seq, "big") == expected, "the engine no longer remembers its first messages"
            for event in decode_batch(payload).events:
                if isinstance(event, AllBlocksCleared):
                    held.clear()
                elif isinstance(event, BlockStored):
                    held.update(event.keys)
                else:
                    held.subtract(event.keys)
        raise AssertionError("unreachable")
    finally:
        socket.close(linger=0)
        context.term()
