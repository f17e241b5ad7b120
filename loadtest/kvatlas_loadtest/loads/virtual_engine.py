"""A simulated engine in virtual time: the scheduler of `CoastingCore`, and a clock that is only a number.

It runs when it is told to: `advance(until)` does every step that begins before `until`. What a step brings is reported
with the time it ends, which may be a little later than `until`; whoever drives the engine lets nothing happen to it
that depends on times it has passed already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvatlas_common.words import EngineId
from kvatlas_loadtest.coasting import CoastingCore
from kvatlas_loadtest.kv_events import KvEvent
from kvatlas_loadtest.loads.outcomes import Sample
from kvatlas_loadtest.scheduler import EngineLimits, EngineRequest
from kvatlas_loadtest.time_model import TimeModel


class Listener(Protocol):
    """Who is told what an engine's steps bring. `at_s`: when the step ends."""

    def published(self, engine: VirtualEngine, at_s: float, events: Sequence[KvEvent]) -> None: ...

    def first_token(self, request: EngineRequest, at_s: float) -> None: ...

    def finished(self, request: EngineRequest, at_s: float) -> None: ...

    def sampled(self, sample: Sample) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What its metrics page would say."""

    running: int
    waiting: int
    kv_usage: float


class VirtualEngine:
    """One life after another: after `crash` it is down until `restart`."""

    def __init__(
        self, engine: EngineId, limits: EngineLimits, time_model: TimeModel, listener: Listener, sample_s: float
    ) -> None:
        self.id = engine
        self.number = str(engine)
        self.lives = 0
        self.up = True
        self.now = 0.0  # when the step under way ends
        self.preemptions = 0
        self._limits = limits
        self._time_model = time_model
        self._listener = listener
        self._sample_s = sample_s
        self._sample_at = 0.0
        self._core = CoastingCore(limits)
        self._requests: dict[EngineRequest, None] = {}

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(self._core.running, self._core.waiting, self._core.usage)

    @property
    def busy(self) -> bool:
        return bool(self._requests)

    @property
    def requests(self) -> Sequence[EngineRequest]:
        """Those here, in the order they came."""
        return tuple(self._requests)

    def copies(self) -> dict[int, int]:
        return self._core.copies()

    def submit(self, request: EngineRequest, at_s: float) -> None:
        """It has been advanced up to `at_s`. Raises `EngineFull`, `PromptTooLong`."""
        self._core.add(request)
        if not self._requests:
            self.now = max(self.now, at_s)
        self._requests[request] = None

    def crash(self) -> Sequence[EngineRequest]:
        """Everything it held and was working on is lost; returns the requests."""
        lost = self.requests
        self._requests.clear()
        self.preemptions += self._core.counters.preemptions
        self._core = CoastingCore(self._limits)
        self.up = False
        return lost

    def restart(self, at_s: float) -> None:
        self.up, self.now = True, max(self.now, at_s)
        self.lives += 1

    def advance(self, until: float) -> None:
        """Does every step that begins before `until`."""
        core, seconds, listener = self._core, self._time_model.seconds, self._listener
        while self._requests and self.now < until:
            if self.now >= self._sample_at:
                self._sample()
            step = core.step()
            assert step is not None, "requests are here and nothing is computed"
            self.now += seconds(step.work)
            if step.events:
                listener.published(self, self.now, step.events)
            for request in step.began:
                listener.first_token(request, self.now)
            for request in step.ended:
                self._finish(request)
        if not self._requests and self.now >= self._sample_at:
            self._sample()

    def _finish(self, request: EngineRequest) -> None:
        del self._requests[request]
        self._listener.finished(request, self.now)

    def _sample(self) -> None:
        load = self.load
        at_s = round(self._sample_at, 6)
        self._listener.sampled(Sample(at_s, self.number, load.running, load.waiting, round(load.kv_usage, 4)))
        self._sample_at = (self.now // self._sample_s + 1) * self._sample_s
