"""A whole run: the deployment once with replay endpoints and once without, every fault on it, one after the other."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import aiohttp

from kvatlas_loadtest.chaos.books import Figures
from kvatlas_loadtest.chaos.checker import Checker
from kvatlas_loadtest.chaos.deployment import Deployment, Options, deployed
from kvatlas_loadtest.chaos.load import CHAT, Load, Shape, warm_up_bodies
from kvatlas_loadtest.chaos.plan import Fault, schedule
from kvatlas_loadtest.chaos.report import TROUBLES_SHOWN, Result
from kvatlas_loadtest.chaos.stage import Scene
from kvatlas_loadtest.process import ProcessFailed

READY_WITHIN_S = 30.0
WARM_S = 4.0
UNDISTURBED_S = 15.0
ONCE = {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "time and again " * 30}]}


class Teller(Protocol):
    """Who is told how the run goes."""

    def doing(self, text: str) -> None: ...
    def undisturbed(self, replay: bool, figures: Figures) -> None: ...
    def played(self, result: Result) -> None: ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """`modes`: with replay endpoints (True), without. `scale` of the durations that are not part of a fault."""

    seed: int = 0
    only: Collection[str] = ()
    modes: Sequence[bool] = (True, False)
    scale: float = 1.0
    options: Options = field(default_factory=Options)
    shape: Shape = field(default_factory=Shape)


@dataclass(slots=True)
class Outcome:
    """`troubles`: bars broken by no scenario in particular."""

    results: list[Result] = field(default_factory=list)
    undisturbed: dict[bool, Figures] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def held(self) -> bool:
        return not self.troubles and not any(result.broken() for result in self.results)


async def run(wanted: Wanted, folder: Path, teller: Teller) -> Outcome:
    """Raises `ValueError` for a scenario that is none; `ProcessFailed` where the deployment cannot be started."""
    outcome, begun = Outcome(), time.monotonic()
    for replay in wanted.modes:
        faults = schedule(wanted.seed, replay=replay, redis=wanted.options.redis, only=wanted.only, scale=wanted.scale)
        options = replace(wanted.options, replay=replay, seed=wanted.seed)
        where = folder / ("replay" if replay else "noreplay")
        async with deployed(options, where, teller.doing) as deployment:
            await _play_all(wanted, deployment, faults, outcome, teller)
        outcome.troubles += deployment.unsound()
    outcome.seconds = time.monotonic() - begun
    return outcome


async def _play_all(
    wanted: Wanted, deployment: Deployment, faults: Sequence[Fault], outcome: Outcome, teller: Teller
) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        load = Load(session, lambda: [router.url for router in deployment.routers], wanted.shape, wanted.seed)
        checker = Checker(
            session,
            lambda: {engine.address: engine.url for engine in deployment.engines if engine.running},
            lambda: {shard.name: shard.url for shard in deployment.shards if shard.running},
            wanted.seed,
        )
        house = _House(session, deployment, load, checker, wanted)
        try:
            teller.doing("waiting for the fleet")
            await house.ready()
            load.start()
            teller.doing("undisturbed load, to compare with")
            undisturbed = await house.undisturbed(outcome)
            outcome.undisturbed[deployment.options.replay] = undisturbed
            teller.undisturbed(deployment.options.replay, undisturbed)
            for fault in faults:
                teller.doing(f"{fault.scenario.name}: {fault.scenario.text}")
                await (house.warm_up() if fault.replay else house.begin_anew())
                result = await Scene(deployment, load, checker, fault).play(undisturbed, wanted.scale)
                outcome.results.append(result)
                teller.played(result)
        finally:
            await load.stop()


@dataclass(frozen=True, slots=True)
class _House:
    """Brings a deployment to where a scenario can begin."""

    session: aiohttp.ClientSession
    deployment: Deployment
    load: Load
    checker: Checker
    wanted: Wanted

    async def ready(self) -> None:
        """Every engine has been heard by every shard. Raises `ProcessFailed`."""
        for engine in self.deployment.engines:
            await self._ask(engine.url)
        found = await self.checker.until(lambda look: look.exact, READY_WITHIN_S)
        if found.seconds is None:
            # Messages from before anybody was there are lost without replay: a clear is where the index can begin.
            await self.begin_anew(loaded=False)
            found = await self.checker.until(lambda look: look.exact, READY_WITHIN_S)
        if found.seconds is None:
            raise ProcessFailed(
                f"the fleet is not exact from the start: {'; '.join(found.last.problems()[:TROUBLES_SHOWN])}"
            )
        await self.warm_up()

    async def undisturbed(self, outcome: Outcome) -> Figures:
        await asyncio.sleep(WARM_S * self.wanted.scale)
        begun = time.monotonic()
        await asyncio.sleep(UNDISTURBED_S * self.wanted.scale)
        exchanges = self.load.since(begun, time.monotonic())
        await self.load.settled(exchanges)
        figures = Figures.of(exchanges)
        if figures.failed or figures.cut:
            outcome.troubles.append(f"undisturbed: {figures.failed} failed, {figures.cut} cut: {figures.failures}")
        return figures

    async def begin_anew(self, *, loaded: bool = True) -> None:
        """Without replay an engine that is inexact stays so: its cache is cleared, and the index with it."""
        if loaded:
            await self.load.pause()
        for engine in self.deployment.engines:
            await self._post(f"{engine.url}/reset_prefix_cache")
            await self._ask(engine.url)  # a clear is published with the next step
        await self.warm_up()
        if loaded:
            self.load.resume()
            await asyncio.sleep(self.wanted.scale)

    async def warm_up(self) -> None:
        """Every context is in some cache, whatever the last fault has done to it."""
        routers = itertools.cycle(router.url for router in self.deployment.routers)
        room = asyncio.Semaphore(8)

        async def one(body: object, router: str) -> None:
            async with room:
                await self._post(router + CHAT, body)

        bodies = warm_up_bodies(self.wanted.shape, self.wanted.seed)
        await asyncio.gather(*(one(body, next(routers)) for body in bodies))

    async def _ask(self, engine: str) -> None:
        await self._post(engine + CHAT, ONCE)

    async def _post(self, url: str, body: object = None) -> None:
        async with self.session.post(url, json=body, timeout=aiohttp.ClientTimeout(total=30)) as response:
            await response.read()
