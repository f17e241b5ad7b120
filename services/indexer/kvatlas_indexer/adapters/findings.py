"""Looks at the index again and again, and keeps what is wrong: for the log, `/metrics`, REST and the page."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator

from kvatlas_common.engines.facts import Work
from kvatlas_common.findings import Code, Finding, Found
from kvatlas_common.findings.keeper import Findings
from kvatlas_common.fleet import Fleet
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.accuracy import Accuracy
from kvatlas_indexer.core.diagnosis import Diagnosis
from kvatlas_indexer.core.differences import Repetitions
from kvatlas_indexer.core.index import KvIndex

log = logging.getLogger("kvatlas_indexer.findings")

LOOK_S = 1.0
ENGINES_A_TURN = 16
"""Looked at in one turn of the event loop, at less than 0.1 ms each."""
CHECKED = (
    "engines answer, and what they say can be read",
    "event streams are connected, and engines that compute are heard",
    "replays are answered",
    "hash settings: as configured, and as the other engines of the model",
    "the index is exact",
    "names and topics: one engine each",
    "cached tokens as predicted (of what routers report)",
    "versions with known traps",
    "the store answers, and drops nothing",
)
"""What is looked at, for whoever finds nothing wrong."""

Also = Callable[[], Iterator[Finding]]


class Watch:
    """`fleet`: of all shards. `also`: what is wrong with the shard itself. `attach` before anything is looked at."""

    def __init__(self, fleet: Callable[[], Fleet], also: Also) -> None:
        self._findings = Findings(log, clock=time.monotonic, wall=time.time)
        self._fleet = fleet
        self._also = also
        self._diagnosis: Diagnosis | None = None
        self._index: KvIndex | None = None

    def attach(self, index: KvIndex, accuracy: Accuracy, repetitions: Repetitions) -> None:
        self._index, self._diagnosis = index, Diagnosis(index, accuracy, repetitions)

    def note(self, engine: EngineId | None, finding: Finding) -> None:
        """Something has happened to an engine."""
        self._findings.note(engine, finding)

    def worked(self, engine: EngineId, work: Work) -> None:
        assert self._index is not None
        assert self._diagnosis is not None
        known = self._index.engine(engine)
        heard_at = known.heard_at if known else None
        self._diagnosis.silence.worked(engine, work, heard_at, time.time())

    def current(self) -> tuple[Found, ...]:
        return self._findings.current()

    def counts(self) -> dict[Code, int]:
        return self._findings.counts()

    async def look(self) -> None:
        """A large fleet takes longer than a lookup may wait: others have their turn in between."""
        assert self._diagnosis is not None
        found: list[tuple[object, Finding]] = [("", finding) for finding in self._also()]
        for number, about in enumerate(self._diagnosis.look(self._fleet(), time.time())):
            found += about
            if number % ENGINES_A_TURN == ENGINES_A_TURN - 1:
                await asyncio.sleep(0)
        self._findings.look(found)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()
