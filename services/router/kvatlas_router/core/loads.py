"""The load of each engine, from all who tell: of two that know its figures, the one who scraped it last is right.

Each indexer shard tells of the engines it scrapes. While an engine changes hands two may tell of it, one of them as it
was a moment ago; with shards that share nothing, all tell of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from kvatlas_common.fleet import Load
from kvatlas_common.words import EngineId

_NOTHING = Load()


def _nobody(engine: EngineId, load: Load) -> None:
    """Is told."""


class MergedLoads:
    """`latest` is always the same mapping, which changes as loads are told: to look at it costs nothing.

    `on_change` is told of every change, as it comes.
    """

    def __init__(self, on_change: Callable[[EngineId, Load], None] = _nobody) -> None:
        self._on_change = on_change
        self._told: dict[str, dict[EngineId, Load]] = {}  # by who tells
        self._latest: dict[EngineId, Load] = {}
        self.latest: Mapping[EngineId, Load] = MappingProxyType(self._latest)

    def told(self, source: str, loads: Iterable[tuple[EngineId, Load]], *, snapshot: bool = False) -> None:
        """`snapshot`: these are all it tells of. `Load()` says that it knows nothing of the engine any more."""
        if snapshot:
            self.lost(source)
        known = self._told.setdefault(source, {})
        for engine, load in loads:
            if load == _NOTHING:
                known.pop(engine, None)
            else:
                known[engine] = load
            self._choose(engine)

    def lost(self, source: str) -> None:
        """What it told counts no longer."""
        for engine in self._told.pop(source, {}):
            self._choose(engine)

    def _choose(self, engine: EngineId) -> None:
        loads = [load for known in self._told.values() if (load := known.get(engine)) is not None]
        if loads:
            self._latest[engine] = latest = max(loads, key=lambda load: load.scraped_at)
            self._on_change(engine, latest)
        else:
            self._latest.pop(engine, None)
