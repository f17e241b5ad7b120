"""The load of the engines this shard scrapes, as each router is told of it: their own figures, and the other routers'.

A load changes many times a second, so it is no part of the fleet: nothing is derived from it here, and a router is told
only of the engines whose load is another than it was told last.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import replace

from kvatlas_common.fleet import Load
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.in_flight import InFlightBook

NO_LOAD = Load()
CHANGES_MAX = 16_384
"""Engines whose last change is remembered, for routers that have not been told yet; many more than there are."""


class LoadBoard:
    """Not thread-safe."""

    def __init__(self, in_flight: InFlightBook) -> None:
        self.version = 0
        """Rises with every change."""
        self._in_flight = in_flight
        self._scraped: dict[EngineId, Load] = {}  # of all engines that this shard speaks of
        self._changed: OrderedDict[EngineId, int] = OrderedDict()  # version of its last change, the latest last

    def scraped(self, engine: EngineId, load: Load) -> bool:
        """Whether it is an engine this shard speaks of."""
        if engine not in self._scraped:
            return False
        self._scraped[engine] = load
        self._touch(engine)
        return True

    def in_flight_changed(self) -> bool:
        """What routers have in flight may have changed. Whether it has, on engines this shard speaks of."""
        changed = self._in_flight.take_changed() & self._scraped.keys()
        for engine in changed:
            self._touch(engine)
        return bool(changed)

    def speak_of(self, engines: Collection[EngineId]) -> None:
        """From now on of these and no others: the rest have other owners, or are gone."""
        for engine in self._scraped.keys() - set(engines):
            del self._scraped[engine]
            self._touch(engine)
        for engine in engines:
            self._scraped.setdefault(engine, NO_LOAD)

    def load(self, engine: EngineId, router: str = "") -> Load:
        """As that router is to see it."""
        scraped = self._scraped.get(engine)
        if scraped is None:
            return NO_LOAD
        others = self._in_flight.others(engine, router)
        if others == NO_LOAD.others:
            return scraped  # nobody's prompt but perhaps the router's own, of which that knows more
        return replace(scraped, others=others, head=self._in_flight.head(engine, router))

    def changed_since(self, version: int) -> Iterable[EngineId]:
        """Engines whose load may have changed after that version."""
        for engine, changed in reversed(self._changed.items()):
            if changed <= version:
                return
            yield engine

    def _touch(self, engine: EngineId) -> None:
        self.version += 1
        self._changed[engine] = self.version
        self._changed.move_to_end(engine)
        if len(self._changed) > CHANGES_MAX:
            self._changed.popitem(last=False)


class Telling:
    """One router, and what it has been told."""

    def __init__(self, board: LoadBoard, router: str) -> None:
        self._board = board
        self._router = router
        self._version = 0
        self._told: dict[EngineId, Load] = {}

    def news(self) -> tuple[tuple[EngineId, Load], ...]:
        """Loads that differ from those told before. One that nothing is known of any more is told as `Load()`."""
        news: list[tuple[EngineId, Load]] = []
        for engine in self._board.changed_since(self._version):
            load = self._board.load(engine, self._router)
            if load != self._told.get(engine, NO_LOAD):
                news.append((engine, load))
                self._told[engine] = load
                if load == NO_LOAD:
                    del self._told[engine]
        self._version = self._board.version
        return tuple(news)
