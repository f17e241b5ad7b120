"""Event messages that get lost, doubled and swapped, and engines that restart: the index says exact only when it is.

The truth is the simulated engine's own block table, asked for key by key.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

from kvatlas_indexer.adapters.metrics import COUNTED, counted_as
from kvatlas_loadtest.engine import EngineConfig, SimulatedEngine
from kvatlas_loadtest.publisher import ReplayFault
from kvatlas_loadtest.scheduler import EngineLimits
from kvatlas_loadtest.time_model import NO_TIME
from tests.integration.fault_kit import Index, client, fill, flags, simulated
from tests.integration.processes import POLL_S, Indexer, indexer, until

SMALL = EngineConfig(time_model=NO_TIME, limits=EngineLimits(num_blocks=120))
"""So few blocks that all of these requests evict: removals get lost as well."""

UNDER_WAY_S = 1.0


@dataclass
class Watched:
    """An engine and the index of it."""

    engine: SimulatedEngine
    index: Index
    indexing: Indexer
    session: aiohttp.ClientSession
    seed: int = 0
    lies: list[str] = field(default_factory=list)
    """What it said to be exact for longer than a message is under way, and was not."""

    async def asked(self, count: int = 4) -> None:
        """Requests nobody asked before, and their events published."""
        self.seed += 1
        await fill(self.session, self.engine, count, seed=self.seed)

    async def agrees(self) -> None:
        await self.index.agrees(self.engine.address, self.engine.block_table)

    async def reason(self) -> str:
        """Why it is not exact, once it says so."""
        await until(self._inexact, "the index to say that it is inexact")
        return str((await self.index.engine(self.engine.address))["inexact_reason"])

    async def counted(self, outcome: str) -> float:
        family, labels = counted_as(outcome)
        named = dict(zip(COUNTED[family][1], labels, strict=True))
        return await self.index.metric(f"{family}_total", engine=self.engine.address, **named)

    async def held(self) -> dict[int, int]:
        """What the index holds of what the engine holds."""
        return await self.index.held(self.engine.address, list(self.engine.block_table()))

    async def catch_lies(self) -> None:
        wrong_since: float | None = None
        while True:
            said = await self.index.engine(self.engine.address)
            if not self.engine.running or said["sync"] != "exact":
                wrong_since = None
            elif sum(said["blocks"].values()) != (true := len(self.engine.block_table())):
                now = time.monotonic()
                wrong_since = wrong_since or now
                if now - wrong_since > UNDER_WAY_S:
                    self.lies.append(f"exact with {said['blocks']} blocks, where there are {true}")
                    return
            else:
                wrong_since = None
            await asyncio.sleep(POLL_S)

    async def listened_to(self) -> None:
        """Until the index has subscribed to this life of the engine: what it publishes before that is lost."""
        await until(lambda: self.engine.publisher().subscribed, "the index to subscribe")

    async def _inexact(self) -> bool:
        return await self.index.sync(self.engine.address) == "inexact"


@asynccontextmanager
async def watched(folder: Path, *, replay: bool) -> AsyncIterator[Watched]:
    """An engine that the index knows exactly."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        session = await enter(client())
        (engine,) = await enter(simulated(SMALL))
        indexing = await enter(indexer(folder, "indexer", *flags(engine, replay=replay)))
        index = Index(session, indexing.rest)
        found = Watched(engine, index, indexing, session)
        await found.listened_to()
        await until(lambda: _ready(index, engine), "the engine to be ready")
        await found.asked()
        await found.agrees()
        watching = asyncio.create_task(found.catch_lies())
        try:
            yield found
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        assert found.lies == []
        indexing.assert_sound()


async def _ready(index: Index, engine: SimulatedEngine) -> bool:
    return bool((await index.engine(engine.address)).get("health") == "ready")


async def test_messages_that_go_wrong_are_made_good_by_replay(tmp_path: Path) -> None:
    async with watched(tmp_path, replay=True) as one:
        for fault in ("drop", "duplicate", "swap"):
            faults = one.engine.publisher().faults
            setattr(faults, fault, 2)
            await one.asked()
            assert getattr(faults, fault) == 0, f"{fault} has happened"
            await one.agrees()
            assert await one.counted("loss") == await one.counted("restart") == 0, fault
        assert await one.counted("duplicate") >= 2


async def test_without_replay_a_loss_is_said_and_what_was_known_stays(tmp_path: Path) -> None:
    async with watched(tmp_path, replay=False) as one:
        known = (await one.index.engine(one.engine.address))["blocks"]["gpu"]
        last = one.engine.publisher().next_seq - 1
        one.engine.publisher().faults.drop = 2
        await one.asked(1)
        assert f"messages {last + 1}..{last + 2} lost" in await one.reason()
        assert (await one.index.engine(one.engine.address))["blocks"]["gpu"] >= known
        assert await one.held(), "and is still found"

        await one.session.post(f"{one.engine.url}/reset_prefix_cache")
        await one.asked(1)
        await one.agrees()


async def test_a_replay_that_nobody_answers_is_asked_again(tmp_path: Path) -> None:
    async with watched(tmp_path, replay=True) as one:
        faults = one.engine.publisher().faults
        faults.drop, faults.replay = 1, ReplayFault.SILENT
        await one.asked()
        await until(lambda: one.counted("replay-refused"), "a replay to fail")
        assert await one.index.sync(one.engine.address) == "syncing"
        faults.replay = ReplayFault.NONE
        await one.agrees()
        assert await one.counted("loss") == 0


async def test_an_engine_that_restarts_is_known_anew(tmp_path: Path) -> None:
    """When messages are lost, the first one heard of its new life has a higher number than the last one of the old."""
    async with watched(tmp_path, replay=True) as one:
        for restarts, lost in enumerate((0, 3), 1):
            before = one.engine.publisher().next_seq
            await one.engine.restart()
            one.engine.publisher().faults.drop = before + lost if lost else 0
            while one.engine.publisher().next_seq < before + 2 * lost + 1:
                await one.asked(1)
            await one.agrees()
            assert await one.counted("restart") == restarts


@pytest.mark.parametrize("replay", [True, False])
async def test_a_new_life_numbered_above_the_old_is_never_taken_for_it(replay: bool, tmp_path: Path) -> None:
    """Its first messages are gone for good: the index cannot be exact, and says so, until everything is cleared."""
    async with watched(tmp_path, replay=replay) as one:
        old = one.engine.block_table()
        one.engine.clock = lambda: time.time() + 5.0  # `process_start_time_seconds` tells lives apart from a second on
        await one.engine.restart(first_seq=one.engine.publisher().next_seq + 7)
        await one.asked(2)
        await until(lambda: one.counted("restart"), "the new life to be known")
        await until(one.reason, "it to be said that its first messages are gone")
        gone = [key for key in old if key not in one.engine.block_table()]
        assert gone
        assert await one.index.held(one.engine.address, gone) == {}
        if replay:
            await one.index.agrees(one.engine.address, one.engine.block_table, sync="inexact")

        await one.listened_to()  # it may have known the new life by its metrics: what then is published nobody hears
        await one.session.post(f"{one.engine.url}/reset_prefix_cache")
        await one.asked(1)
        await one.agrees()


@pytest.mark.parametrize("replay", [True, False])
async def test_an_engine_whose_stream_is_cut_is_not_exact_until_it_is_heard_again(replay: bool, tmp_path: Path) -> None:
    async with watched(tmp_path, replay=replay) as one:
        await one.engine.crash()
        assert "not connected" in await one.reason()
        await one.engine.start()
        await one.listened_to()
        await one.asked()
        await one.agrees()
