"""Plays one scenario: steady load, the fault, its end, recovery; and takes down what happened."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator

from kvatlas_loadtest.chaos.books import Figures, cached_over_time
from kvatlas_loadtest.chaos.checker import Checker
from kvatlas_loadtest.chaos.deployment import Deployment
from kvatlas_loadtest.chaos.faults import PLAYS
from kvatlas_loadtest.chaos.load import Load
from kvatlas_loadtest.chaos.plan import Fault
from kvatlas_loadtest.chaos.report import TROUBLES_SHOWN, Recovery, Result
from kvatlas_loadtest.chaos.truth import Kept, Look
from kvatlas_loadtest.process import ProcessFailed

BEFORE_WITHIN_S = 10.0
STEADY_S = 2.0
TAIL_S = 2.0
GIVEN_UP_AFTER_S = 12.0  # beyond the bar, so that a table tells a slow recovery from none
WATCH_EVERY_S = 0.3


class Scene:
    """One scenario: `play` once. It is the `Stage` of its fault."""

    def __init__(self, deployment: Deployment, load: Load, checker: Checker, fault: Fault) -> None:
        self.deployment = deployment
        self.fault = fault
        self._load = load
        self._checker = checker
        self._kept: Kept | None = None
        self._recoveries: list[Recovery] = []
        self._notes: list[str] = []
        self._troubles: list[str] = []
        self._last: Look | None = None

    async def play(self, undisturbed: Figures, scale: float) -> Result:
        before = await self._checker.until(lambda look: look.exact, BEFORE_WITHIN_S)
        if before.seconds is None:
            self._troubles += [f"before the fault: {p}" for p in before.last.problems()[:TROUBLES_SHOWN]]
        begun = time.monotonic()
        await asyncio.sleep(STEADY_S * scale)
        async with self._watching():
            fault_at = time.monotonic()
            try:
                await PLAYS[self.fault.scenario.name](self)
            except (ProcessFailed, OSError, RuntimeError) as failure:
                self._troubles.append(f"{type(failure).__name__}: {failure}")
            await asyncio.sleep(TAIL_S * scale)
        exchanges = self._load.since(begun, time.monotonic())
        await self._load.settled(exchanges)
        disturbed = [
            e for e in exchanges if e.ended is not None and e.ended >= fault_at
        ]  # under way then, or begun since
        return Result(
            fault=self.fault,
            recoveries=tuple(self._recoveries),
            figures=Figures.of(disturbed),
            undisturbed=undisturbed,
            sync=self._last.sync() if self._last else {},
            kept=await self._share_kept(),
            cached_over_time=tuple(cached_over_time(disturbed, fault_at)),
            notes=tuple(self._notes),
            troubles=tuple(self._troubles),
        )

    # -- for the fault -------------------------------------------------------------------------------------------------

    async def recovered(self, ended: str) -> None:
        must_be_exact = self.fault.replay or not self.fault.scenario.loses_events
        found = await self._checker.until(lambda look: look.exact if must_be_exact else look.honest, GIVEN_UP_AFTER_S)
        self._last = found.last
        self._recoveries.append(Recovery(ended, found.seconds, found.wrong))

    def note(self, text: str) -> None:
        self._notes.append(text)

    def epoch_ended(self, engine: str) -> None:
        if self._kept is not None:
            self._kept.forget(engine)

    # -- what must not be wiped ----------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        """Without replay: follows which blocks the engines never ceased to hold."""
        if self.fault.replay or not self.deployment.options.redis:
            yield
            return
        self._kept = await self._checker.kept()
        watch = asyncio.create_task(self._watch(self._kept))
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def _watch(self, kept: Kept) -> None:
        while True:
            kept.saw(await self._checker.arrivals())
            await asyncio.sleep(WATCH_EVERY_S)

    async def _share_kept(self) -> float:
        if self._kept is None:
            return math.nan
        said = await self._checker.said({key for keys in self._kept.blocks.values() for key in keys})
        self._kept.saw(await self._checker.arrivals())
        return self._kept.share_said(said)
