"""What every wanted engine says about itself, asked again and again.

A busy engine is asked for its load many times a second, an idle one every few seconds, a dead one less often still;
jitter keeps the fleet from being asked in step. A page of metrics is a sign of life, so `/health` is asked seldom, and
at once when the metrics do not come. One lost answer proves nothing: an engine is down after `failures_to_down`
failures in a row, or when its connection was refused twice, and ready again with its first good answer. The rules are
in `ProbeState`, which does no I/O; `Prober` asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

import aiohttp

from kvatlas_common.engines.asking import METRICS_ALL, METRICS_FEW, AskFailed, ask, open_session, tokenize
from kvatlas_common.engines.facts import EngineFacts, Work
from kvatlas_common.engines.pages import (
    RUNNING,
    CacheConfig,
    EngineMetrics,
    MalformedPage,
    ServedModels,
    parse_metrics,
    parse_models,
    parse_version,
)
from kvatlas_common.engines.specs import EngineSpec
from kvatlas_common.fleet import Health, Load
from kvatlas_common.words import EngineId

__all__ = [
    "AskFailed", "CacheConfig", "EngineFacts", "EngineMetrics", "MalformedPage", "ProbePlan", "ProbeState", "Prober",
    "ServedModels", "Work", "open_session", "parse_metrics", "parse_models", "tokenize",
]  # fmt: skip

ERROR_CHARS_MAX = 300
_RUNNING = tuple(name.encode() for name in RUNNING)
_NO_MODELS = ServedModels()


@dataclass(frozen=True, slots=True)
class ProbePlan:
    """How often, how long, how many. The defaults find a hung engine in 13 s, within the default lease of 15 s."""

    interval_s: float = 0.1  # busy, or its figures changed
    idle_interval_s: float = 2.0  # reached step by step while nothing happens
    retry_s: float = 0.5  # after a failure, until it is down
    down_interval_s: float = 3.0  # reached step by step while it stays down
    models_interval_s: float = 10.0
    health_interval_s: float = 5.0  # while its metrics come
    timeout_s: float = 2.0
    failures_to_down: int = 3
    refusals_to_down: int = 2
    concurrent_max: int = 64
    jitter: float = 0.2  # share of a pause, either way
    versions: bool = False  # each life of an engine is asked for its version


@dataclass(slots=True)
class ProbeState:
    """The rules for one address, without I/O. Times in seconds of any one clock; `at` since the epoch."""

    spec: EngineSpec
    plan: ProbePlan = ProbePlan()
    whole_page: bool = False  # its metrics cannot be filtered
    _health: Health = Health.UNKNOWN
    _failures: int = 0
    _refusals: int = 0
    _pause_s: float = 0.0
    _health_due: float | None = None  # None: now
    _models_due: float | None = None
    _models: ServedModels = _NO_MODELS
    _process_start_s: float | None = None
    _version: str | None = None
    _version_due: bool = True
    _ranks_seen: int = 0
    _works: dict[int, Work] = field(default_factory=dict)
    _caches: dict[int, CacheConfig] = field(default_factory=dict)  # by rank, as are loads
    _loads: dict[int, Load] = field(default_factory=dict)
    _page: bytes = b""  # of metrics, the last one, and what was read in it: an idle engine's is always the same
    _seen: dict[int, EngineMetrics] = field(default_factory=dict)
    _errors: dict[str, str] = field(default_factory=dict)  # by what was asked: health, metrics, models

    def wants_health(self, now: float) -> bool:
        return self._health_due is None or now >= self._health_due

    def wants_models(self, now: float) -> bool:
        return self._models_due is None or now >= self._models_due

    def failed(self, why: str, *, refused: bool = False) -> None:
        """It did not answer, or said that it is not well."""
        self._failures += 1
        self._refusals += refused
        self._errors["health"] = why
        self._health_due = None
        self._models_due = None  # whoever comes back may be another
        self._version_due = True
        self.whole_page = False
        if self._failures >= self.plan.failures_to_down or self._refusals >= self.plan.refusals_to_down:
            grown = self._pause_s * 2 if self._health is Health.DOWN else self.plan.retry_s * 2
            self._health, self._pause_s = Health.DOWN, min(grown, self.plan.down_interval_s)
        else:
            self._pause_s = self.plan.retry_s

    def healthy(self, now: float) -> None:
        self._health_due = now + self.plan.health_interval_s
        if self._failures:
            self._pause_s = 0.0
        self._failures = self._refusals = 0
        self._errors.pop("health", None)
        self._health = Health.READY

    def measured(self, page: bytes, at: float) -> None:
        """A page of metrics, filtered or whole. What it does not say keeps its last value."""
        if page != self._page:
            self._page, self._seen = page, self._read(page)
        seen = self._seen
        silent = [rank for rank, metrics in seen.items() if metrics.running is None]
        if len(silent) == len(seen):
            self.unmeasured("/metrics does not say how many requests run")
            return
        self._errors.pop("metrics", None)
        if silent:
            self._errors["metrics"] = f"/metrics says nothing of rank {silent[0]}: is `ranks` right?"
        changed = [self._take(rank, metrics, at) for rank, metrics in seen.items()]
        busy = any(load.running or load.waiting for load in self._loads.values())
        self._ease(busy or any(changed))

    def _take(self, rank: int, seen: EngineMetrics, at: float) -> bool:
        """Whether the load of the rank has changed."""
        if seen.process_start_s is not None and seen.process_start_s != self._process_start_s:
            self._process_start_s = seen.process_start_s
            self._models_due, self._version_due = None, True
        if seen.cache is not None:
            self._caches[rank] = seen.cache
        self._ranks_seen = seen.ranks or self._ranks_seen
        self._works[rank] = Work(seen.computed_tokens, seen.finished)
        last = self._loads.get(rank)
        known = last or Load(scraped_at=at)
        load = Load(
            running=known.running if seen.running is None else seen.running,
            waiting=known.waiting if seen.waiting is None else seen.waiting,
            kv_usage=known.kv_usage if seen.kv_usage is None else seen.kv_usage,
            scraped_at=known.scraped_at,
            loras=known.loras if seen.loras is None else seen.loras,
        )
        changed = load != last
        if changed or load.running or load.waiting:
            self._loads[rank] = replace(load, scraped_at=at)
        return changed

    def unmeasured(self, why: str, *, alive: bool = True) -> None:
        """No page of metrics. `alive`: it answered something else."""
        self._errors["metrics"] = why
        self._ease(False)
        if not alive:
            self._health_due, self._pause_s = None, min(self._pause_s, self.plan.retry_s)

    def loads(self) -> Mapping[EngineId, Load]:
        """Of the ranks that have said. `scraped_at`: when a busy engine last said so, and when an idle one began to."""
        return {engine: self._loads[engine.rank] for engine in self.spec.ids if engine.rank in self._loads}

    def works(self) -> Mapping[EngineId, Work]:
        """Of the ranks that have said."""
        return {engine: self._works[engine.rank] for engine in self.spec.ids if engine.rank in self._works}

    def wants_version(self) -> bool:
        return self.plan.versions and self._version_due

    def versioned(self, version: str | None) -> None:
        """None: it does not say, which only vLLM does."""
        self._version, self._version_due = version, False

    def listed(self, models: ServedModels, now: float) -> None:
        self._errors.pop("models", None)
        self._models = models
        self._models_due = now + self.plan.models_interval_s

    def unlisted(self, why: str, now: float) -> None:
        self._errors["models"] = why
        self._models_due = now + self.plan.models_interval_s

    def pause_s(self, rng: random.Random) -> float:
        """How long to wait before asking again."""
        return self._pause_s * rng.uniform(1 - self.plan.jitter, 1 + self.plan.jitter)

    def facts(self) -> tuple[EngineFacts, ...]:
        """One for each rank."""
        error = "; ".join(self._errors.values())[:ERROR_CHARS_MAX]
        return tuple(
            EngineFacts(
                id=engine,
                health=self._health,
                models=self._models.names,
                adapters=self._models.adapters,
                root=self._models.root,
                max_model_len=self._models.max_model_len,
                process_start_s=self._process_start_s,
                cache=self._caches.get(engine.rank),
                error=error,
                version=self._version,
                ranks_seen=self._ranks_seen,
            )
            for engine in self.spec.ids
        )

    def _read(self, page: bytes) -> dict[int, EngineMetrics]:
        # An address with one rank may be any rank of a larger group (external load balancing): its page is all its own.
        ranks: tuple[int | None, ...] = tuple(range(self.spec.ranks)) if self.spec.ranks > 1 else (None,)
        return {rank or 0: parse_metrics(page, rank) for rank in ranks}

    def _ease(self, busy: bool) -> None:
        slower = max(self._pause_s * 1.5, self.plan.interval_s)
        self._pause_s = self.plan.interval_s if busy else min(slower, self.plan.idle_interval_s)


class Prober:
    """Keeps every wanted engine asked, and hands on its facts and its load when they change. An async context.

    `want` inside it. `on_facts`, `on_load` and `on_work` are called from the event loop: what they raise ends the
    context. `clock` is monotonic, `wall` gives seconds since the epoch.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        on_facts: Callable[[EngineFacts], None],
        on_load: Callable[[EngineId, Load], None] = lambda engine, load: None,
        on_work: Callable[[EngineId, Work], None] = lambda engine, work: None,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
        rng: random.Random,
        plan: ProbePlan = ProbePlan(),
    ) -> None:
        self._session = session
        self._on_facts = on_facts
        self._on_load = on_load
        self._on_work = on_work
        self._clock = clock
        self._wall = wall
        self._rng = rng
        self._plan = plan
        self._places = asyncio.Semaphore(plan.concurrent_max)
        self._tasks = asyncio.TaskGroup()
        self._following: dict[EngineSpec, asyncio.Task[None]] = {}
        self._hurried: dict[str, asyncio.Event] = {}  # by address, of those followed

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.want(())
        await self._tasks.__aexit__(kind, error, trace)

    def want(self, specs: Iterable[EngineSpec]) -> None:
        """From now on these and no others. Nothing is reported any more of an engine that is not wanted."""
        wanted = frozenset(specs)
        for gone in self._following.keys() - wanted:
            self._following.pop(gone).cancel()
        for spec in sorted(wanted - self._following.keys(), key=lambda spec: spec.address):
            self._following[spec] = self._tasks.create_task(self._follow(spec), name=f"probe {spec.address}")

    def hurry(self, address: str) -> None:
        """Something has happened there: it is asked as soon as can be, not when its turn comes."""
        if (hurried := self._hurried.get(address)) is not None:
            hurried.set()

    async def _follow(self, spec: EngineSpec) -> None:
        hurried = self._hurried[spec.address] = asyncio.Event()
        try:
            await self._ask_on(spec, hurried)
        finally:
            if self._hurried.get(spec.address) is hurried:  # it may be followed anew already, otherwise specified
                del self._hurried[spec.address]

    async def _ask_on(self, spec: EngineSpec, hurried: asyncio.Event) -> None:
        state = ProbeState(spec, self._plan)
        told: dict[EngineId, EngineFacts] = {}
        loads: Mapping[EngineId, Load] = {}
        works: Mapping[EngineId, Work] = {}
        while True:
            hurried.clear()
            async with self._places:
                await self._ask(state)
            for facts in state.facts():
                if told.get(facts.id) != facts:
                    told[facts.id] = facts
                    self._on_facts(facts)
            before, loads = loads, state.loads()
            for engine, load in loads.items():
                if before.get(engine) != load:
                    self._on_load(engine, load)
            earlier, works = works, state.works()
            for engine, work in works.items():
                if earlier.get(engine) != work:
                    self._on_work(engine, work)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(state.pause_s(self._rng)):
                    await hurried.wait()

    async def _ask(self, state: ProbeState) -> None:
        if state.wants_health(self._clock()):
            try:
                await self._get(state.spec, "/health")
            except AskFailed as failure:
                state.failed(str(failure), refused=failure.refused)
                return
            state.healthy(self._clock())
        if not await self._ask_metrics(state):
            return
        if state.wants_models(self._clock()):
            try:
                state.listed(parse_models(await self._get(state.spec, "/v1/models")), self._clock())
            except (AskFailed, MalformedPage) as failure:
                state.unlisted(str(failure), self._clock())
        if state.wants_version():
            try:
                state.versioned(parse_version(await self._get(state.spec, "/version")))
            except AskFailed:
                state.versioned(None)

    async def _ask_metrics(self, state: ProbeState) -> bool:
        """Whether it answered anything."""
        try:
            page = None if state.whole_page else await self._few_metrics(state.spec)
            if page is None:
                state.whole_page = True
                page = await self._get(state.spec, METRICS_ALL)
        except AskFailed as failure:
            if failure.refused:
                state.failed(str(failure), refused=True)
            else:
                state.unmeasured(str(failure), alive=failure.status is not None)
            return failure.status is not None
        state.measured(page, self._wall())
        return True

    async def _few_metrics(self, spec: EngineSpec) -> bytes | None:
        """None where the engine cannot filter, as with several API server processes (prometheus multiprocess mode)."""
        try:
            page = await self._get(spec, METRICS_FEW)
        except AskFailed as failure:
            if failure.status is None:
                raise
            return None
        return page if any(name in page for name in _RUNNING) else None

    async def _get(self, spec: EngineSpec, path: str) -> bytes:
        return await ask(self._session, spec.url, path, api_key=spec.api_key, timeout_s=self._plan.timeout_s)
