"""A load in virtual time: the project's own index, routers and simulated engines, and a clock that is only a number.

There is no wall clock and no chance but what the seed gives: the same settings give the same run, byte for byte.

Time moves from one thing that happens *to* the engines to the next: a request, a crash, a restart. Before that, every
engine does all steps it would have begun until then. Requests that follow an answer (closed loop) are sent at times
nobody knows before the answer is there: as long as such an answer is under way, engines only go as far as the earliest
time it might bring a new request. A step cannot be cut short, so what is seen of an engine (its scraped load, its
crash) is at the end of the step under way.
"""

from __future__ import annotations

import gc
import heapq
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

from kvatlas_common.engines.pages import CacheConfig
from kvatlas_common.fleet import Health, Load
from kvatlas_common.observations import Finished, FirstToken, Observation, Routed
from kvatlas_common.observations import Outcome as Ending
from kvatlas_common.words import EngineId
from kvatlas_loadtest.baselines.rules import Asked
from kvatlas_loadtest.kv_events import KvEvent
from kvatlas_loadtest.loads import oracle
from kvatlas_loadtest.loads.arrivals import Arrival, checked
from kvatlas_loadtest.loads.books import Books
from kvatlas_loadtest.loads.flights import Flight
from kvatlas_loadtest.loads.naming import BlockNames, Named
from kvatlas_loadtest.loads.outcomes import Outcome, Run, Sample
from kvatlas_loadtest.loads.presets import PROFILE
from kvatlas_loadtest.loads.routing import Decider, Flying, Known, decider
from kvatlas_loadtest.loads.settings import Settings
from kvatlas_loadtest.loads.virtual_engine import EngineLoad, VirtualEngine
from kvatlas_loadtest.loads.virtual_index import EPOCH_S, MODEL, VirtualIndex, Wires
from kvatlas_loadtest.scheduler import EngineFull, EngineRequest, PromptTooLong

ATTEMPTS = 3
PROBED_S = 1.0  # until the index knows that an engine is down, or up again


class Simulation:
    """One run. `on_progress(done, of)` is called now and then."""

    def __init__(
        self,
        workload: str,
        arrivals: Sequence[Arrival],
        policy: str,
        settings: Settings,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._arrivals = checked(arrivals)
        self._workload, self._policy, self._settings = workload, policy, settings
        self._on_progress = on_progress
        ids = [EngineId(f"10.0.{n // 250}.{n % 250 + 1}:8000") for n in range(settings.engines)]
        preset = settings.preset
        self.engines = {e: VirtualEngine(e, preset.limits, preset.time_model, self, settings.sample_s) for e in ids}
        chance = random.Random(f"{settings.seed} wires").random
        wires = Wires(chance, settings.event_delay_s, settings.share_s, settings.lost_share, settings.replay)
        cache = CacheConfig(preset.limits.block_size, preset.limits.num_blocks - 1)
        self.index = VirtualIndex(ids, cache, profile=PROFILE, wires=wires, routers=settings.routers)
        self._routers: list[Decider] = [
            decider(policy, random.Random(f"{settings.seed} router {n}").random) for n in range(settings.routers)
        ]
        self._needs_events = self._routers[0].needs_events
        self._reports = settings.routers > 1 or self._routers[0].needs_reports
        self._books = Books(settings.routers, ids, settings.share_s)
        self._names = BlockNames(PROFILE, arrivals)
        self._named: list[Named | None] = [None] * len(arrivals)
        self._followers: dict[int, list[int]] = {}
        self._think_s = min((a.think_s for a in arrivals if a.after is not None), default=0.0)
        for index, arrival in enumerate(arrivals):
            if arrival.after is not None:
                self._followers.setdefault(arrival.after, []).append(index)
        self._stages = sorted({a.stage for a in arrivals})
        self._stage_began = 0.0
        self._agenda: list[tuple[float, int, Callable[[float], None]]] = []
        self._notes: list[tuple[float, int, Callable[[float], None]]] = []
        self._counter = count()
        self._flights: dict[EngineRequest, Flight] = {}
        self._awaited = 0  # requests in flight that others follow
        self._loads: dict[EngineId, Load] = dict.fromkeys(ids, Load())
        self._scraped_at = 0.0
        self._outcomes: list[Outcome] = []
        self._samples: list[Sample] = []
        self._ended_s = 0.0

    def run(self) -> Run:
        with _no_collection():
            return self._run()

    def _run(self) -> Run:
        for crash in self._settings.crashes:
            engine = list(self.engines.values())[crash.engine]
            self._at(crash.at_s, lambda now, engine=engine: self._crash(engine, now))  # type: ignore[misc]
            self._at(crash.back_s, lambda now, engine=engine: self._restart(engine, now))  # type: ignore[misc]
        for stage in self._stages:
            self._begin(stage)
            done = len(self._outcomes) + sum(1 for a in self._arrivals if a.stage == stage)
            while len(self._outcomes) < done:
                self._go_on()
        named = [self._name(index) for index in range(len(self._arrivals))]
        outputs = [arrival.output_tokens for arrival in self._arrivals]
        return Run(
            policy=self._policy,
            workload=self._workload,
            seed=self._settings.seed,
            outcomes=tuple(sorted(self._outcomes, key=lambda outcome: outcome.arrival)),
            samples=tuple(self._samples),
            oracle_cached_tokens=oracle.cached_tokens(named, outputs, PROFILE.block_size),
            settings=self._settings.told(),
        )

    # -- time ---------------------------------------------------------------------------------------------------------

    def _at(self, at_s: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self._agenda, (at_s, next(self._counter), act))

    def _note(self, at_s: float, act: Callable[[float], None]) -> None:
        """Something a router learns at a time: applied before it decides anything later."""
        heapq.heappush(self._notes, (at_s, next(self._counter), act))

    def _begin(self, stage: int) -> None:
        self._stage_began = self._ended_s
        for index, arrival in enumerate(self._arrivals):
            if arrival.stage == stage and arrival.after is None:
                self._expect(index, self._stage_began + arrival.at_s)

    def _expect(self, index: int, at_s: float) -> None:
        self._at(at_s, lambda now: self._arrive(index, now))

    def _go_on(self) -> None:
        """To the next thing that happens, or as far as is safe."""
        due = self._agenda[0][0] if self._agenda else math.inf
        until = due
        if self._awaited:
            soonest = min(engine.now for engine in self.engines.values() if engine.busy)
            shortest = self._settings.preset.time_model.step_s / self._settings.preset.time_model.speed
            until = min(until, soonest + shortest + self._think_s)
        scrape = due // self._settings.scrape_s * self._settings.scrape_s if due < math.inf else 0.0
        scrapes = self._scraped_at < scrape <= until
        if scrapes:
            until = scrape
        for engine in self.engines.values():
            engine.advance(until)
        if scrapes:
            self._scraped_at = scrape
            self._loads = {e: _scraped(engine, until) for e, engine in self.engines.items()}
        if self._agenda and self._agenda[0][0] <= until:
            at_s, _, act = heapq.heappop(self._agenda)
            self._tell(at_s)
            act(at_s)
        if until < math.inf:
            self.index.catch_up(until)

    def _tell(self, now: float) -> None:
        while self._notes and self._notes[0][0] <= now:
            at_s, _, act = heapq.heappop(self._notes)
            act(at_s)

    # -- requests -----------------------------------------------------------------------------------------------------

    def _name(self, index: int) -> Named:
        named = self._named[index]
        if named is None:
            named = self._named[index] = self._names.of(index)
        return named

    def _arrive(self, index: int, now: float) -> None:
        named, arrival = self._name(index), self._arrivals[index]
        size, router = PROFILE.block_size, index % self._settings.routers
        prefix = f"{arrival.prompt[0]}{arrival.salt or ''}"
        asked = Asked(named.prompt_tokens, named.lookup(size), arrival.session, prefix, size)
        self.index.catch_up(now)
        known = Known(
            model=MODEL,
            profile=PROFILE.name,
            views=[view for view in self.index.views() if view.health is not Health.DOWN],
            loads=self._loads_for(router),
            flying=self._books.of(router, now),
            held=lambda: self.index.held(asked.keys),
            estimated=lambda: self.index.estimated(asked.keys, now),
        )
        flight = Flight(index, router, now, named, asked, self._routers[router].choose(asked, known, now))
        flight.left = list(flight.decision.engines[:ATTEMPTS]) if flight.decision else []
        self._send(flight, now)

    def _loads_for(self, router: int) -> Mapping[EngineId, Load]:
        if self._settings.routers == 1:
            return self._loads
        return {
            e: replace(load, others=self.index.others(e, router), head=self.index.head(e, router))
            for e, load in self._loads.items()
        }

    def _send(self, flight: Flight, now: float) -> None:
        """To the first engine left that takes it."""
        while flight.left:
            engine = self.engines[flight.left.pop(0)]
            flight.retries += 1
            if not engine.up:
                self._routers[flight.router].refused(engine.id, now)
                continue
            request = flight.new_request(self._arrivals[flight.index])
            try:
                engine.submit(request, now)
            except PromptTooLong:
                return self._end(flight, now, "prompt-too-long")
            except EngineFull:
                continue
            flight.engine, flight.request = engine.id, request
            self._flights[request] = flight
            self._awaited += flight.index in self._followers
            self._enter(flight, now)
            return None
        return self._end(flight, now, "no-engine")

    # -- what routers learn -------------------------------------------------------------------------------------------

    def _enter(self, flight: Flight, now: float) -> None:
        engine, decision, asked = flight.engine, flight.decision, flight.asked
        assert engine is not None
        assert decision is not None
        flight.ticket = self._routers[flight.router].sent(decision, engine, now)
        cached = decision.predicted(engine)
        flight.uncached = asked.prompt_tokens - cached
        self._books.change(flight.router, engine, Flying(1, flight.uncached, flight.blocks), now)
        if self._reports:
            keys = {PROFILE.name: asked.keys}
            computed = decision.to_compute(engine)
            routed = Routed(str(flight.index), engine, MODEL, asked.prompt_tokens, cached, keys, to_compute=computed)
            self._report(flight, routed, now)

    def _started(self, flight: Flight, now: float) -> None:
        """Its router has seen the first token."""
        assert flight.engine is not None
        assert flight.ticket is not None
        flight.ticket.started(now)
        flight.told = True
        self._books.change(flight.router, flight.engine, Flying(0, -flight.uncached), now)
        if self._reports:
            self._report(flight, FirstToken(str(flight.index), flight.engine, MODEL, now - flight.sent_s), now)

    def _leave(self, flight: Flight, now: float, ending: Ending) -> None:
        """It is no longer in flight where it was."""
        engine, ticket, request = flight.engine, flight.ticket, flight.request
        assert engine is not None
        assert ticket is not None
        assert request is not None
        cached, output = request.cached_tokens or 0, len(request.tokens) - len(request.prompt)
        if ending is Ending.OK:
            ticket.ended(now, cached, output)
        else:
            ticket.failed(now)
        ticket.close()
        change = Flying(-1, 0 if flight.told else -flight.uncached, -flight.blocks)
        self._books.change(flight.router, engine, change, now)
        if self._reports:
            self._report(flight, Finished(str(flight.index), engine, MODEL, cached, output, True, ending), now)

    def _report(self, flight: Flight, observation: Observation, now: float) -> None:
        self.index.report(flight.router, observation, now)

    def _end(self, flight: Flight, now: float, error: str = "") -> None:
        request = flight.request
        began = flight.first_s is not None
        self._outcomes.append(
            Outcome(
                arrival=flight.index,
                sent_s=round(flight.sent_s, 6),
                first_token_s=None if flight.first_s is None else round(flight.first_s, 6),
                finished_s=None if error and not began else round(now, 6),
                engine=str(flight.engine) if flight.engine and request else None,
                prompt_tokens=flight.asked.prompt_tokens,
                cached_tokens=(request.cached_tokens or 0) if request else 0,
                output_tokens=len(request.output) if request else 0,
                error=error,
                reason=flight.decision.reason if flight.decision else "",
                retries=max(flight.retries, 0),
                stage=self._arrivals[flight.index].stage,
            )
        )
        self._ended_s = max(self._ended_s, now)
        for follower in self._followers.get(flight.index, ()):
            after = self._arrivals[follower]
            self._expect(follower, max(now + after.think_s, self._stage_began + after.at_s))
        if self._on_progress is not None and len(self._outcomes) % 200 == 0:
            self._on_progress(len(self._outcomes), len(self._arrivals))

    # -- what engines report ------------------------------------------------------------------------------------------

    def published(self, engine: VirtualEngine, at_s: float, events: Sequence[KvEvent]) -> None:
        if self._needs_events:
            self.index.publish(engine.id, at_s, events)

    def first_token(self, request: EngineRequest, at_s: float) -> None:
        flight = self._flights[request]
        flight.first_s = at_s
        self._note(at_s, lambda now: self._started(flight, now))

    def finished(self, request: EngineRequest, at_s: float) -> None:
        flight = self._flights.pop(request)
        self._awaited -= flight.index in self._followers
        self._note(at_s, lambda now: self._leave(flight, now, Ending.OK))
        self._end(flight, at_s)

    def sampled(self, sample: Sample) -> None:
        self._samples.append(sample)

    # -- faults -------------------------------------------------------------------------------------------------------

    def _crash(self, engine: VirtualEngine, now: float) -> None:
        moment = max(now, engine.now)
        lost = engine.crash()
        self.index.crashed(engine.id)
        self._at(now + PROBED_S, lambda at: self._probe(engine, at))
        for request in lost:
            flight = self._flights.pop(request)
            self._awaited -= flight.index in self._followers
            self._at(moment, lambda at, flight=flight: self._cut(flight, at))  # type: ignore[misc]

    def _cut(self, flight: Flight, now: float) -> None:
        """Its engine has died: before the first token it is tried elsewhere, afterwards the answer is cut."""
        begun = flight.first_s is not None
        self._leave(flight, now, Ending.CUT if begun else Ending.ERROR)
        if begun:
            self._end(flight, now, "cut")
        else:
            self._send(flight, now)

    def _restart(self, engine: VirtualEngine, now: float) -> None:
        engine.restart(now)
        self._at(now + PROBED_S, lambda at: self._probe(engine, at))

    def _probe(self, engine: VirtualEngine, now: float) -> None:
        self.index.health(engine.id, Health.READY if engine.up else Health.DOWN, now)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Millions of small objects and no cycles: looking for cycles would take most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _scraped(engine: VirtualEngine, now: float) -> Load:
    load = engine.load if engine.up else EngineLoad(0, 0, 0.0)
    return Load(load.running, load.waiting, load.kv_usage, scraped_at=EPOCH_S + now)
