"""A shared index to break: several indexers on one real store, simulated engines, and what they say against the truth.

All in one process, each indexer with its own way to the store (a relay that can be cut): who is cut off, or dies, is as
silent towards the others as a process that was stopped or killed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from kvatlas_common.engines.specs import EngineSpec
from kvatlas_common.words import EngineId
from kvatlas_indexer.adapters.redis_leases import RedisLeases
from kvatlas_indexer.adapters.redis_store import RedisStore
from kvatlas_indexer.app import Indexer
from kvatlas_indexer.core.known import Known
from kvatlas_indexer.core.ownership import winner
from kvatlas_indexer.core.records import EngineRecord, decode_record
from kvatlas_indexer.settings import IndexerSettings
from kvatlas_loadtest.chaos.wires import TcpRelay
from kvatlas_loadtest.engine import EngineConfig, SimulatedEngine
from kvatlas_loadtest.scheduler import EngineLimits
from kvatlas_loadtest.time_model import NO_TIME
from tests.integration.engine_kit import simulated_engine
from tests.integration.processes import until
from tests.integration.redis_kit import fresh_prefix, stored

DEADLINE_S = 20.0
BLOCK = 16
SMALL = EngineLimits(num_blocks=120, block_size=BLOCK)  # so few that blocks are evicted all the time

Table = dict[int, int]  # block key -> copies
Truth = Callable[[SimulatedEngine], Mapping[int, int]]


def config(number: int, **options: Any) -> EngineConfig:
    return EngineConfig(seed=number, **{"limits": SMALL, "time_model": NO_TIME, **options})


def no_lease_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while a test waits for something: what happens then was not waiting for that."""
    defaults = RedisLeases.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "lease_s", 10 * DEADLINE_S)


def spec(engine: SimulatedEngine, *, dialled: bool = True) -> EngineSpec:
    events = engine.events_endpoint if dialled else None
    return EngineSpec(engine.address, engine.url, events, engine.replay_endpoint)


@dataclass
class Shards:
    """`engines` are known to every shard added from then on, if they are `listed`.
    `truth`: what an engine holds, as lookups name it.
    """

    url: str
    stack: AsyncExitStack
    http: aiohttp.ClientSession
    engines: list[SimulatedEngine]
    prefix: str = field(default_factory=fresh_prefix)
    dialled: bool = True
    listed: bool = True
    truth: Truth = SimulatedEngine.block_table
    asked: list[tuple[SimulatedEngine, list[int]]] = field(default_factory=list)  # every prompt sent
    running: dict[str, Indexer] = field(default_factory=dict)
    relays: dict[str, TcpRelay] = field(default_factory=dict)
    _going: list[asyncio.Task[None]] = field(default_factory=list)
    _rng: random.Random = field(default_factory=lambda: random.Random(1))

    # -- shards that come and go ---------------------------------------------------------------------------------------

    async def add(self, name: str, **options: Any) -> Indexer:
        url = self.url
        if url.startswith("redis://"):  # a cluster tells its own addresses
            address = url.removeprefix("redis://").partition("/")[0]
            relay = self.relays[name] = TcpRelay(lambda: [address])
            await relay.start()
            url = url.replace(address, relay.address)
        listening = () if self.dialled else ("tcp://127.0.0.1:*",)
        wanted = {"store": url, "store_prefix": self.prefix, "shard": name, "drain_s": 0.2, "zmq_listen": listening}
        ports = {"grpc_listen": "127.0.0.1:0", "rest_listen": "127.0.0.1:0"}
        settings = IndexerSettings.model_validate(wanted | ports | options)
        specs = tuple(spec(engine, dialled=self.dialled) for engine in self.engines if self.listed)
        shard = Indexer(settings.model_copy(update={"engines": specs}), environ={})
        await shard.start()
        self.running[name] = shard
        return shard

    def crash(self, name: str) -> None:
        """Not one word of it reaches the store any more, and it answers nobody."""
        shard, relay = self.running.pop(name), self.relays.pop(name)

        async def die() -> None:
            await relay.close()
            await shard.stop()

        self._going.append(asyncio.create_task(die()))

    async def leave(self, name: str) -> None:
        """As on SIGTERM."""
        await self.running.pop(name).stop()

    async def aclose(self) -> None:
        for name in list(self.running):
            await self.leave(name)
        await asyncio.gather(*self._going)
        for relay in self.relays.values():
            await relay.close()

    async def replace(self, number: int, options: EngineConfig) -> SimulatedEngine:
        """The engine dies, and another begins under its name and with its replay endpoint."""
        old = self.engines[number]
        await old.crash()
        port = int(old.address.rpartition(":")[2])
        same = dataclasses.replace(options, port=port, replay_endpoint=old.replay_endpoint)
        new = simulated_engine(same)
        self.engines[number] = await self.stack.enter_async_context(new)
        return new

    # -- load ----------------------------------------------------------------------------------------------------------

    async def load(self, requests: int = 24) -> None:
        """Prompts that begin alike, and some twice: hits, evictions, and copies (of a last block that is full, which an
        engine computes again to have the last token).
        """
        contexts = [[self._rng.randrange(1000) for _ in range(BLOCK * 12)] for _ in range(3)]
        sends = []
        for number in range(requests):
            engine = self.engines[number % len(self.engines)]
            tail = [self._rng.randrange(1000) for _ in range(BLOCK * self._rng.randrange(1, 8))]
            prompt = self._rng.choice(contexts) + tail
            sends += [self.ask(engine, prompt) for _ in range(1 + (number % 3 == 0))]
        await asyncio.gather(*sends)

    async def ask(self, engine: SimulatedEngine, prompt: list[int]) -> int:
        """Cached tokens, as the engine says."""
        self.asked.append((engine, prompt))
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 1}
        async with self.http.post(f"{engine.url}/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            usage = (await response.json())["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    # -- what is said --------------------------------------------------------------------------------------------------

    def owners(self) -> dict[str, set[str]]:
        """Engine -> the shards that index it."""
        found: dict[str, set[str]] = {engine.address: set() for engine in self.engines}
        for name, shard in self.running.items():
            for known in shard.index.known():
                found.setdefault(known.id.address, set()).add(name)
        return found

    def unowned(self) -> set[str]:
        """Engines that none of the shards in this process indexes."""
        return {engine for engine, shards in self.owners().items() if not shards}

    def owner(self, engine: SimulatedEngine) -> str:
        """Its only one. Raises `ValueError` if there is none, or more than one."""
        (name,) = self.owners()[engine.address]
        return name

    async def spread(self) -> dict[str, set[str]]:
        """Waits until each engine that is dialled has the owner it falls to."""
        due = {engine.address: {winner(engine.address, set(self.running)) or ""} for engine in self.engines}
        await until(lambda: self.owners() == due, f"each engine to be owned by one of {sorted(self.running)}", 20.0)
        return due

    async def agree(self, what: str, within_s: float = DEADLINE_S) -> None:
        """Waits until every shard calls every engine exact and is right about all it holds, copies too, and the store
        holds that and nothing else.
        """
        last = ""

        async def look() -> bool:
            nonlocal last
            last = await self.wrong()
            return not last

        try:
            await until(look, what, within_s)
        except AssertionError:
            raise AssertionError(f"{what}: {last}; owners: {self.owners()}") from None

    async def wrong(self) -> str:
        """What is not right; empty if all is."""
        for engine in self.engines:
            table = dict(self.truth(engine))
            for name, shard in self.running.items():
                base = f"http://{shard.rest_address}"
                view = (await self._get(f"{base}/v1/engines")).get(engine.address, {})
                if view.get("sync") != "exact":
                    return f"{engine.address} by {name}: {view.get('sync')} {view.get('inexact_reason')}"
                said = await self._held(base, engine.address, list(table))
                if said != table:
                    return f"{engine.address} by {name}: {len(said.items() ^ table.items())} blocks differ"
            if (kept := await self.kept(engine)) != table:
                return f"{engine.address} in the store: {len(kept.items() ^ table.items())} blocks differ"
        return ""

    async def health(self, name: str) -> dict[str, str]:
        """Engine -> its health, as this shard tells it."""
        views = await self._get(f"http://{self.running[name].rest_address}/v1/engines")
        return {engine: view["health"] for engine, view in views.items()}

    def known(self, engine: SimulatedEngine) -> Known:
        """As its owner has it."""
        return next(k for k in self.running[self.owner(engine)].index.known() if k.id.address == engine.address)

    def profile(self, engine: SimulatedEngine) -> str:
        """Its name; empty while it is not known."""
        profile = self.known(engine).engine.naming.profile
        return profile.name if profile else ""

    def doubtful(self, engine: SimulatedEngine) -> bool:
        shard = self.running[self.owner(engine)]
        return shard.index.residency.in_doubt(EngineId(engine.address))

    async def record(self, engine: SimulatedEngine) -> EngineRecord | None:
        async with stored(self.url, self.prefix) as store:
            data = (await store.records())[1].get(str(EngineId(engine.address)))
        return decode_record(data) if data else None

    async def written(self, engine: SimulatedEngine) -> Table:
        """Waits until its owner has applied all it published and has it in the store: what that is."""
        table: Table = {}

        async def look() -> bool:
            nonlocal table
            known = self.known(engine)
            held = self.running[self.owner(engine)].index.residency.table(known.id)
            table = {key: copies for (_, _, key), copies in held.items()}
            return known.engine.stream.last == engine.publisher().next_seq - 1 and await self.kept(engine) == table

        await until(look, f"all of {engine.address} to be in the store", DEADLINE_S)
        return table

    async def kept(self, engine: SimulatedEngine) -> Table:
        """All that the store holds under the slots of this engine's record."""
        table: Counter[int] = Counter()
        record = await self.record(engine)
        async with stored(self.url, self.prefix) as store:
            await _read(store, record.slot_numbers() if record else set(), table)
        return dict(table)

    async def _get(self, url: str) -> dict[str, dict[str, Any]]:
        async with self.http.get(url) as response:
            return {engine["id"]: engine for engine in (await response.json())["engines"]}

    async def _held(self, base: str, engine: str, keys: list[int]) -> Table:
        body = {"model": "tiny", "keys": [str(key) for key in keys]}
        async with self.http.post(f"{base}/v1/blocks", json=body) as response:
            answer = await response.json()
        if response.status != 200:
            return {}
        return {
            int(block["key"]): holder["copies"]
            for block in answer["blocks"]
            for holder in block["holders"]
            if holder["engine"] == engine
        }


async def _read(store: RedisStore, numbers: set[int], table: Counter[int]) -> None:
    seen: set[tuple[int, int]] = set()
    async for batch in store.scan(numbers):
        for key, number, copies in batch:
            if (key, number) not in seen:
                seen.add((key, number))
                table[key] += copies


@asynccontextmanager
async def shards(url: str, *names: str, engines: list[EngineConfig], **options: Any) -> AsyncIterator[Shards]:
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        served: list[SimulatedEngine] = []
        for each in engines:
            served.append(await stack.enter_async_context(simulated_engine(each)))
        made = Shards(url, stack, session, served, **options)
        stack.push_async_callback(made.aclose)
        await asyncio.gather(*(made.add(name) for name in names))
        yield made
