"""Keeps the router's one picture of the fleet: who is told, listed, remembered, and how each is probed.

The merging rules are in `core/knowledge.py`. The router probes only engines of whose health no indexer speaks, so with
indexers up it asks nobody. The fleet as last told goes to disk whenever it changes in what is worth remembering, so
that a router that starts with every indexer down knows whom to ask.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import msgspec
from pydantic import SecretStr

from kvatlas_common.engines.discovery import watch
from kvatlas_common.engines.probe import EngineFacts, Prober, open_session
from kvatlas_common.engines.specs import EngineDefaults, EngineSource, EngineSpec
from kvatlas_common.fleet import EngineView, Fleet, Load
from kvatlas_common.words import EngineId
from kvatlas_router.adapters import background
from kvatlas_router.core.knowledge import as_remembered, merged, needing_probes, told

log = logging.getLogger(__name__)

GRACE_S = 15.0  # an indexer that has just come up may not have found all its engines
REFRESH_EVERY_S = 0.02
STATE_FILE = "fleet.json"
STATE_BYTES_MAX = 64 * 1024 * 1024


class Indexers(Protocol):
    def fleets(self) -> list[Fleet]: ...
    def measured(self, engine: EngineId, load: Load) -> None: ...
    async def changed(self) -> None: ...


class FleetKeeper:
    """An async context; inside it `fleet` is always the latest picture."""

    def __init__(
        self,
        indexers: Indexers,
        sources: Sequence[EngineSource],
        *,
        defaults: EngineDefaults,
        environ: Mapping[str, str],
        refresh_s: float,
        state_dir: Path | None,
        rng: random.Random,
    ) -> None:
        self.fleet = Fleet()
        self.on_change: list[Callable[[Fleet], None]] = []
        self._indexers = indexers
        self._sources = sources
        self._defaults = defaults
        self._environ = environ
        self._refresh_s = refresh_s
        self._state_file = state_dir / STATE_FILE if state_dir else None
        self._rng = rng
        self._specs: dict[EngineId, EngineSpec] = {}
        self._facts: dict[EngineId, EngineFacts] = {}
        self._measured: set[EngineId] = set()  # engines whose load was scraped here
        self._remembered = Fleet()
        self._grace_until = float("-inf")
        self._grace_end: asyncio.TimerHandle | None = None
        self._indexer_was_up = False
        self._to_save = asyncio.Event()
        self._news = asyncio.Event()
        self._stack = AsyncExitStack()
        self._prober: Prober | None = None

    async def __aenter__(self) -> Self:
        self._remembered = await asyncio.to_thread(_load, self._state_file)
        session = await self._stack.enter_async_context(open_session())
        prober = Prober(session, self._on_facts, self._on_load, clock=time.monotonic, wall=time.time, rng=self._rng)
        self._prober = await self._stack.enter_async_context(prober)
        for job in (self._follow_list(), self._follow_indexers(), self._keep_saved(), self._keep_fresh()):
            self._stack.push_async_callback(background.stop, background.start(job, "fleet"))
        self._specs = {i: s for s in self._sources if isinstance(s, EngineSpec) for i in s.ids}
        self._refresh()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, tb: TracebackType | None) -> None:
        if self._grace_end is not None:
            self._grace_end.cancel()
        await self._stack.aclose()

    def api_key(self, view: EngineView) -> SecretStr | None:
        """What to show the engine instead of the client's own key."""
        spec = self._specs.get(view.id)
        return spec.api_key if spec else self._defaults.api_key

    async def _keep_fresh(self) -> None:
        """News come in bursts (a hundred engines at once): one new picture for all that came meanwhile."""
        while True:
            await self._news.wait()
            self._news.clear()
            self._refresh()
            await asyncio.sleep(REFRESH_EVERY_S)

    async def _follow_list(self) -> None:
        watching = watch(self._sources, defaults=self._defaults, environ=self._environ, refresh_s=self._refresh_s)
        async with aclosing(watching) as wanted:
            async for specs in wanted:
                self._specs = {i: s for s in specs for i in s.ids}
                self._news.set()

    async def _follow_indexers(self) -> None:
        while True:
            await self._indexers.changed()
            self._news.set()

    def _on_facts(self, facts: EngineFacts) -> None:
        self._facts[facts.id] = facts
        self._news.set()

    def _on_load(self, engine: EngineId, load: Load) -> None:
        self._measured.add(engine)
        self._indexers.measured(engine, load)

    def _refresh(self) -> None:
        indexed = told(self._indexers.fleets())
        now = time.monotonic()
        up = bool(indexed.engines)
        if up and not self._indexer_was_up:
            self._grace_until = now + GRACE_S
            self._grace_end = asyncio.get_running_loop().call_later(GRACE_S + 0.1, self._news.set)
        self._indexer_was_up = up
        in_grace = up and now < self._grace_until
        if up:
            before = self._remembered.engines if in_grace else {}
            self._remember({**before, **indexed.engines})
        listed = {i: EngineView(i, s.url, labels=s.labels) for i, s in self._specs.items()}
        probed = {f.id: _probed(f) for f in self._facts.values()}
        fleet = merged(indexed, listed, probed, Fleet() if up and not in_grace else self._remembered)
        self._probe(fleet, indexed)
        if fleet != self.fleet:
            self.fleet = fleet
            for listener in self.on_change:
                listener(fleet)

    def _remember(self, engines: Mapping[EngineId, EngineView]) -> None:
        remembered = Fleet.of(map(as_remembered, engines.values()))
        if remembered != self._remembered:
            self._remembered = remembered
            self._to_save.set()

    def _probe(self, fleet: Fleet, indexed: Fleet) -> None:
        wanted: dict[str, EngineSpec] = {}
        ids = needing_probes(fleet, indexed)
        for engine in ids:
            view = fleet.engines[engine]
            ranks = 1 + max(e.rank for e in fleet.engines if e.address == engine.address)
            bare = EngineSpec(engine.address, view.url, api_key=self.api_key(view), ranks=ranks)
            wanted.setdefault(engine.address, self._specs.get(engine, bare))
        probed = {i for s in wanted.values() for i in s.ids}
        self._facts = {i: f for i, f in self._facts.items() if i in probed}
        for engine in self._measured - probed:
            self._indexers.measured(engine, Load())
        self._measured &= probed
        assert self._prober is not None
        self._prober.want(wanted.values())

    async def _keep_saved(self) -> None:
        while True:
            await self._to_save.wait()
            self._to_save.clear()
            if self._state_file is not None:
                await asyncio.to_thread(_save, self._state_file, self._remembered)


def _probed(facts: EngineFacts) -> EngineView:
    return EngineView(
        id=facts.id,
        url="",
        models=facts.models,
        adapters=facts.adapters,
        root=facts.root,
        health=facts.health,
        block_size=facts.cache.block_size if facts.cache else None,
        max_model_len=facts.max_model_len,
        kv_tokens=facts.cache.gpu_tokens if facts.cache else None,
    )


def _load(path: Path | None) -> Fleet:
    """The fleet as last saved; what cannot be read counts as never saved, and is logged."""
    if path is None or not path.exists():
        return Fleet()
    try:
        if path.stat().st_size > STATE_BYTES_MAX:
            raise ValueError(f"larger than {STATE_BYTES_MAX} bytes")
        views = msgspec.json.decode(path.read_bytes(), type=list[EngineView])
    except (OSError, ValueError) as error:
        log.warning("last known fleet unreadable", extra={"file": str(path), "why": str(error)})
        return Fleet()
    log.info("last known fleet read", extra={"file": str(path), "engines": len(views)})
    return Fleet.of(map(as_remembered, views))


def _save(path: Path, fleet: Fleet) -> None:
    """Whole or not at all: a router killed while saving leaves the last file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(msgspec.json.encode(list(fleet.engines.values())))
        part.replace(path)
    except OSError as error:
        log.warning("last known fleet not saved", extra={"file": str(path), "why": str(error)})
