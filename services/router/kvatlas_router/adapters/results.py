"""How requests fare at the engines, told to those who judge engines by it; what they decide is logged and counted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Final

from kvatlas_common.fleet import Fleet, Health
from kvatlas_common.logs import LimitedLog
from kvatlas_common.words import EngineId
from kvatlas_router.adapters.metrics import Metrics
from kvatlas_router.core.outliers import Attempt, Fault, Outliers
from kvatlas_router.core.slow_start import SlowStart

LOG_INTERVAL_S = 10.0

log = logging.getLogger(__name__)


class Results:
    """`on_change`: called, often, when an engine may have got a place."""

    def __init__(self, outliers: Outliers, slow_start: SlowStart, metrics: Metrics, clock: Callable[[], float]) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self.clock: Final = clock
        self._outliers = outliers
        self._slow_start = slow_start
        self._metrics = metrics
        self._log = LimitedLog(log, LOG_INTERVAL_S, clock)
        metrics.ejected.set_function(lambda: outliers.ejected)

    def sent(self, engine: EngineId) -> Watch:
        return Watch(self, engine, self._outliers.sent(engine, self.clock()))

    def fleet_changed(self, fleet: Fleet) -> None:
        self._outliers.keep_only(fleet.engines.keys())
        up = [v.id for v in fleet.engines.values() if v.health is not Health.DOWN]
        for engine in self._slow_start.see(up, self.clock()):
            self._outliers.restarted(engine)

    def began(self, engine: EngineId, attempt: Attempt) -> None:
        now = self.clock()
        if attempt.began(now):
            self._slow_start.begin(engine, now)
            self._log.info(f"back {engine}", "engine is back", engine=str(engine))

    def failed(self, engine: EngineId, attempt: Attempt, fault: Fault, text: str) -> None:
        ejection = attempt.failed(fault, self.clock())
        self._log.warning(f"failed {engine}", "engine failed", engine=str(engine), why=str(fault), error=text)
        if ejection is not None:
            self._metrics.ejections.labels(ejection.cause).inc()
            self._log.warning(
                f"ejected {engine}",
                "engine ejected",
                engine=str(engine),
                cause=str(ejection.cause),
                why=str(fault),
                for_s=ejection.for_s,
            )


class Watch:
    """One request at one engine; a context manager, so that nothing stays open."""

    __slots__ = ("_attempt", "_engine", "_results")

    def __init__(self, results: Results, engine: EngineId, attempt: Attempt) -> None:
        self._results = results
        self._engine = engine
        self._attempt = attempt

    def began(self) -> None:
        """The first byte came."""
        self._results.began(self._engine, self._attempt)
        self._results.on_change()

    def answered(self) -> None:
        self._attempt.answered(self._results.clock())

    def failed(self, fault: Fault, text: str) -> None:
        self._results.failed(self._engine, self._attempt, fault, text)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._attempt.close()
        self._results.on_change()
