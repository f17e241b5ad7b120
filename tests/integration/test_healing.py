"""The first deployment: an indexer and a router come to an engine that has been at work for long, with no replay left.

All of it is real but the engine's arithmetic. What nobody heard being stored is learnt from what the engine reports,
until predictions come true; and an engine heard from its first message is left alone.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from kvatlas_indexer.core.ownership import winner
from kvatlas_loadtest.engine import EngineConfig, SimulatedEngine
from kvatlas_loadtest.scheduler import EngineLimits
from kvatlas_loadtest.texts import WORDS
from kvatlas_loadtest.time_model import NO_TIME
from kvatlas_loadtest.valkey import Valkey
from tests.integration.fault_kit import Exchange, Index, ask, chat, client, flags, ready_engines, simulated
from tests.integration.processes import Router, indexer, router, until

CONTEXTS = 5
LONG = "a question of more than one block, so that every answer brings a message of the engine's " * 2
ROOMY = EngineConfig(time_model=NO_TIME, limits=EngineLimits(num_blocks=2000))
SMALL = EngineConfig(time_model=NO_TIME, limits=EngineLimits(num_blocks=90))
"""Room for all contexts, until other requests come."""

PATIENT = ("--lookup-deadline-ms", "5000")  # machines are shared


@dataclass
class Deployment:
    engine: SimulatedEngine
    shards: Sequence[Index]
    router: Router
    session: aiohttp.ClientSession
    talks: Sequence[str]
    unheard: int  # messages the engine published and the indexer did not get
    questions: int = 0
    routed: int = 0

    @property
    def index(self) -> Index:
        """Any shard answers."""
        return self.shards[0]

    async def counted(self, name: str, **labels: str) -> float:
        """Over all shards: engines are counted by their owner."""
        return sum([await shard.metric(name, **labels) for shard in self.shards])

    async def round(self) -> list[Exchange]:
        """A question about every context, one after the other; the index has heard all about each before the next."""
        return [await self.asked(context) for context in self.talks]

    async def asked(self, context: str) -> Exchange:
        """A question through the router."""
        self.routed += 1
        reply = await self.question(self.router.url, context)
        await until(self._heard, "the indexer to hear of the answer, and of what was stored")
        return reply

    async def question(self, url: str, context: str) -> Exchange:
        self.questions += 1
        reply = await ask(self.session, url, chat(f"{self.questions} {LONG}", context, max_tokens=4))
        assert not reply.error, reply
        return reply

    async def _heard(self) -> bool:
        published = self.engine.publisher().next_seq - self.unheard
        ended = await self.counted("observations_total", kind="finished")
        told = self.routed * len(self.shards)
        return ended == told and await self.counted("messages_received_total") == published


def share(exchanges: Sequence[Exchange]) -> float:
    """Of the tokens that were cached, how many had been predicted to be."""
    right = sum(min(e.predicted or 0, e.cached or 0) for e in exchanges)
    return right / sum(e.cached or 0 for e in exchanges)


@asynccontextmanager
async def deployed(
    folder: Path, config: EngineConfig, *, warm: bool, stores: Sequence[str] = ("memory",)
) -> AsyncIterator[Deployment]:
    """`stores`: one per shard."""
    chance = random.Random(7)
    talks = [f"{n} " + " ".join(chance.choices(WORDS, k=150)) for n in range(CONTEXTS)]
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        session = await enter(client())
        (engine,) = await enter(simulated(config))
        for number, context in enumerate(talks if warm else ()):
            reply = await ask(session, engine.url, chat(f"before {number}", context, max_tokens=4))
            assert not reply.error, reply
        names = [f"indexer{n}" for n in range(len(stores))]
        listed = flags(engine, replay=False)
        indexing = [
            await enter(indexer(folder, name, "--shard", name, "--store", store, *listed))
            for name, store in zip(names, stores, strict=True)
        ]
        shards = [Index(session, one.rest) for one in indexing]
        index = shards[0]

        async def ready() -> bool:
            return (await index.engine(engine.address)).get("health") == "ready"

        numbers = itertools.count()

        async def profiled() -> bool:
            """What is asked before the stream is connected, nobody hears."""
            await ask(session, engine.url, chat(f"{next(numbers)} proves the profile " * 8))
            return bool((await index.engine(engine.address)).get("profile_verified"))

        async def all_heard() -> bool:
            """What is published while the engine goes from one shard to another is lost: there is no replay."""
            for _ in range(20):
                if await index.held(engine.address, list(engine.block_table())[-1:]):
                    return True
            await ask(session, engine.url, chat(f"{next(numbers)} is told once more " * 8))
            return False

        await until(ready, "the engine to be known")
        if len(stores) > 1:  # while it goes from one shard to another, both may hear it, or none
            owner = indexing[names.index(winner(engine.address, set(names)) or "")]
            await owner.says(
                lambda line: line.get("event") == "engines taken" and engine.address in line["engines"],
                "the engine to be its own",
            )
        await until(profiled, "the engine's profile, so that the router knows it from the start")
        await until(all_heard, "the last message")
        heard = sum([await shard.metric("messages_received_total") for shard in shards])
        unheard = engine.publisher().next_seq - int(heard)
        others = [flag for one in indexing[1:] for flag in ("--indexer", one.grpc)]
        routing = await enter(router(folder, "router", *PATIENT, *others, indexer=indexing[0].grpc))
        await ready_engines(session, routing, 1)
        yield Deployment(engine, shards, routing, session, talks, unheard)
        for process in (*indexing, routing):
            process.assert_sound()


async def test_predictions_about_an_engine_that_was_warm_before_come_true(tmp_path: Path) -> None:
    async with deployed(tmp_path, ROOMY, warm=True) as one:
        first, second, third = [await one.round() for _ in range(3)]
        assert all((e.cached or 0) > 100 for e in first), "the engine was warm"
        assert share(first) < 0.2, "and nobody had heard it"
        assert share(second) == share(third) == 1.0
        assert [e.predicted for e in second + third] == [e.cached for e in second + third]
        assert await one.counted("healed_blocks_total", how="added") > 0
        assert await one.counted("prediction_differences_total", cause="inexact") >= CONTEXTS - 1
        held = await one.index.held(one.engine.address, list(one.engine.block_table()))
        assert held == dict.fromkeys(held, 1)
        assert len(held) > 0.9 * len(one.engine.block_table())
        assert await one.index.sync(one.engine.address) == "inexact", "it has not become certain by that"


async def test_what_the_owner_heals_every_shard_answers(tmp_path: Path) -> None:
    with Valkey(tmp_path) as server:
        async with deployed(tmp_path, ROOMY, warm=True, stores=[server.url] * 2) as one:
            first, second, third = [await one.round() for _ in range(3)]
            assert share(first) < 0.2
            assert share(second) == share(third) == 1.0
            healed = [await shard.metric("healed_blocks_total", how="added") for shard in one.shards]
            assert sorted(map(bool, healed)) == [False, True], "by its owner alone"
            keys = list(one.engine.block_table())

            async def answered() -> bool:
                here, there = [await shard.held(one.engine.address, keys) for shard in one.shards]
                return here == there == dict.fromkeys(here, 1) and len(here) > 0.9 * len(keys)

            await until(answered, "both to answer what the last request has shown, too")


async def test_after_a_loss_answers_tell_what_is_still_there(tmp_path: Path) -> None:
    async with deployed(tmp_path, SMALL, warm=False) as one:
        for _ in range(2):
            await one.round()
        assert await one.index.sync(one.engine.address) == "exact"
        assert await one.counted("healed_blocks_total") == 0
        await one.index.agrees(one.engine.address, one.engine.block_table)

        one.engine.publisher().faults.drop = 1  # what comes evicts, and nobody hears it
        one.unheard += 1
        await one.question(one.engine.url, " ".join(reversed(one.talks[:3])))
        assert one.engine.publisher().faults.drop == 0
        first, second, third = [await one.round() for _ in range(3)]
        assert await one.index.sync(one.engine.address) == "inexact"
        assert any(e.predicted > e.cached for e in first if e.predicted and e.cached), "promised what was evicted"
        promised, cached = (sum(getattr(e, of) for e in second + third) for of in ("predicted", "cached"))
        assert share(second + third) == 1.0
        assert promised < 1.05 * cached
        assert await one.counted("healed_blocks_total", how="settled") > 20
        assert await one.counted("prediction_differences_total") >= 1
