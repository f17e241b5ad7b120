"""The gate before the choice: a request passes when an engine has a place for it, waits its turn, or is turned away.

Rules and order are those of core/admission.py and core/pressure.py; here requests are parked and woken. Places free
when an engine answers, when a request ends, when it is shown to be sent, and with every new load: whoever sees that
happen calls `poke`. While somebody waits the gate also looks by itself: nothing hangs on one forgotten call.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from kvatlas_common.fleet import EngineView, Fleet, Load
from kvatlas_common.logs import LimitedLog
from kvatlas_common.words import EngineId
from kvatlas_router.adapters.asgi import HttpError, Receive, while_connected
from kvatlas_router.adapters.decide import Asked, Decider, Lookup
from kvatlas_router.adapters.metrics import Metrics
from kvatlas_router.core.admission import Admission, Cause, Line, Place, Shed, Waiter
from kvatlas_router.core.chooser import Chooser
from kvatlas_router.core.outliers import Trust
from kvatlas_router.core.pressure import Pressure

LOOK_EVERY_S = 0.1
LOOK_PAUSE_S = 0.005  # a look at a large fleet costs a tenth of that
NO_LOAD = Load()
LOG_INTERVAL_S = 10.0
ELSEWHERE_RETRY_S = 1

log = logging.getLogger(__name__)


class Gate:
    """`loads` and `clock` are asked whenever somebody comes, or a place may have come free."""

    def __init__(
        self,
        admission: Admission,
        pressure: Pressure,
        *,
        decider: Decider,
        chooser: Chooser,
        loads: Callable[[], Mapping[EngineId, Load]],
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._admission: Final = admission
        self._pressure: Final = pressure
        self._decider = decider
        self._loads = loads
        self._chooser = chooser
        self._metrics = metrics
        self._clock = clock
        self._log = LimitedLog(log, LOG_INTERVAL_S, clock)
        self._parked: dict[Waiter, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._poked = False
        self._looked_at = float("-inf")
        self._closed = False
        metrics.queued.set_function(lambda: admission.waiting)

    async def enter(self, asked: Asked, receive: Receive) -> Place:
        """The place to send it. Raises `HttpError` (429, 503) and `ClientGone`."""
        if asked.lookup is not Lookup.PROMPT:
            return Place()
        try:
            model, labels, views = self._decider.eligible(asked)
        except LookupError:
            return Place()  # the choice will say what is wrong
        came_at = self._clock()
        line = Line(model, labels)
        found = self._admission.ask(line, self._trusted(views), self._free, came_at)
        if isinstance(found, Waiter):
            self._log.info(f"waits {model[:128]}", "requests wait: all engines are saturated", model=model[:128])
            found = await self._turn(found, receive)
            self._metrics.queue_wait.observe(self._clock() - came_at)
        if isinstance(found, Shed):
            raise self._refused(model, found)
        return found

    def poke(self) -> None:
        """A place may have come free."""
        if not self._poked and not self._admission.idle:
            self._poked = True
            pause_s = max(0.0, self._looked_at + LOOK_PAUSE_S - self._clock())
            asyncio.get_running_loop().call_later(pause_s, self._look)

    def release(self, place: Place) -> None:
        """Its request was sent, or came to nothing."""
        place.release()
        self.poke()

    def fleet_changed(self, fleet: Fleet) -> None:
        self._pressure.keep_only(fleet.engines.keys())
        self.poke()

    def load_told(self, engine: EngineId, load: Load) -> None:
        """As it comes, so that what goes there from now on is known to have gone there since."""
        now = self._clock()
        unanswered = self._chooser.books.of(engine, now).pending + load.others.prefilling
        self._pressure.told(engine, load, unanswered, now)
        self.poke()

    def close(self) -> None:
        """The router goes: who still waits, and who would have to, is sent elsewhere."""
        self._closed = True
        now = self._clock()
        for waiter in self._admission.waiters():
            if not self._parked[waiter].done():
                shed = self._admission.give_up(waiter, Cause.DRAINING, now)
                self._parked[waiter].set_exception(self._refused(waiter.line.model, shed))

    def _free(self, engine: EngineId) -> int:
        now = self._clock()
        ours, load = self._chooser.books.of(engine, now), self._loads().get(engine, NO_LOAD)
        return self._pressure.places(engine, ours.pending + load.others.prefilling, ours.in_flight, now)

    def _trusted(self, views: Sequence[EngineView]) -> Iterator[EngineId]:
        """Places at an engine that is set aside are none, unless all are."""
        now, found = self._clock(), False
        for view in views:
            if self._chooser.outliers.trust(view.id, now) is Trust.FULL:
                found = True
                yield view.id
        if not found:
            yield from (view.id for view in views)

    def _serving(self, line: Line) -> Sequence[EngineId]:
        views = self._decider.fleet().serving(line.model)
        return list(self._trusted([v for v in views if v.labelled(line.labels)] if line.labels else views))

    async def _turn(self, waiter: Waiter, receive: Receive) -> Place | Shed:
        if self._closed:
            return self._admission.give_up(waiter, Cause.DRAINING, self._clock())
        loop = asyncio.get_running_loop()
        self._parked[waiter] = turn = loop.create_future()
        deadline = loop.time() + waiter.deadline - self._clock()
        try:
            self.poke()
            async with while_connected(receive), asyncio.timeout_at(deadline):
                await turn
        except TimeoutError:
            if waiter.place is None:
                return self._admission.give_up(waiter, Cause.DEADLINE, self._clock())
        except BaseException:
            self._admission.leave(waiter)
            self.poke()
            raise
        finally:
            del self._parked[waiter]
        assert waiter.place is not None
        return waiter.place

    def _look(self) -> None:
        """Wakes those whose turn has come, and looks again soon while others wait."""
        self._poked, self._looked_at = False, self._clock()
        for waiter in self._admission.pump(self._serving, self._free, self._looked_at):
            if not self._parked[waiter].done():
                self._parked[waiter].set_result(None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._admission.idle:
            self._timer = asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look)

    def _refused(self, model: str, shed: Shed) -> HttpError:
        self._metrics.shed.labels(shed.cause).inc()
        self._log.warning(
            f"{shed.cause} {model[:128]}",
            "request turned away",
            cause=str(shed.cause),
            model=model[:128],
            waiting=shed.waiting,
        )
        if shed.cause is Cause.DRAINING:
            return HttpError(503, "overloaded", "this router is shutting down", _retry_after(ELSEWHERE_RETRY_S))
        rules = self._admission.rules
        what = (
            f"{shed.waiting} requests wait already, the most that may (--queue-max)"
            if shed.cause is Cause.FULL
            else f"none came free within {rules.deadline_s:g} s (--queue-deadline-s)"
        )
        why = f"Every engine that serves `{model[:128]}` is saturated: {what}. Try again in {shed.retry_after_s} s"
        return HttpError(429, "rate_limit_exceeded", why, _retry_after(shed.retry_after_s))


def _retry_after(seconds: int) -> tuple[tuple[bytes, bytes], ...]:
    return ((b"retry-after", str(seconds).encode()),)
