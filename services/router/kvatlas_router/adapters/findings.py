"""Looks again and again at what is wrong, and keeps it for the log, `/metrics` and `/debug/findings`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from kvatlas_common.findings import Found
from kvatlas_common.findings.keeper import Findings
from kvatlas_router.adapters import background
from kvatlas_router.adapters.metrics import Metrics
from kvatlas_router.core.diagnosis import Seen, diagnose

log = logging.getLogger("kvatlas_router.findings")

LOOK_S = 1.0
SETTLING_S = 3.0
"""After a start, indexers and engines are not missing yet."""
CHECKED = (
    "indexers are reached",
    "engines are up",
    "tokens made here are those of the engines: chat template, tokenizer files",
    "requests are routed by their policy",
    "settings with known traps",
)


class Watch:
    """An async context. `see` gathers what is looked at."""

    def __init__(self, see: Callable[[], Seen], metrics: Metrics) -> None:
        self._see = see
        self._metrics = metrics
        self._findings = Findings(log, clock=time.monotonic, wall=time.time)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = background.start(self._keep_looking(), "findings")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, tb: TracebackType | None) -> None:
        if self._task is not None:
            await background.stop(self._task)

    def current(self) -> tuple[Found, ...]:
        return self._findings.current()

    async def _keep_looking(self) -> None:
        await asyncio.sleep(SETTLING_S)
        while True:
            self._findings.look(diagnose(self._see()))
            for code, about in self._findings.counts().items():
                self._metrics.findings.labels(code).set(about)
            await asyncio.sleep(LOOK_S)
