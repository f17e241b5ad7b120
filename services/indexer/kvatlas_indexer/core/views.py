"""What the fleet is told of each engine: views, made anew when somebody asks and something may have changed."""

from __future__ import annotations

from collections.abc import Callable

from kvatlas_common.fleet import EngineView, Fleet, Health
from kvatlas_common.words import EngineId
from kvatlas_indexer.core.contracts import UnknownModel
from kvatlas_indexer.core.plans import matters


class Views:
    """`make`: an engine's view as it is now, None of one that is not known."""

    def __init__(self, make: Callable[[EngineId], EngineView | None]) -> None:
        self.version = 0
        """Rises when a view changes in what matching rests on."""
        self._make = make
        self._views: dict[EngineId, EngineView] = {}
        self._changed: set[EngineId] = set()
        self._fleet: Fleet | None = Fleet()

    def changed(self, engine: EngineId) -> None:
        """Its view may be another now."""
        self._changed.add(engine)

    @property
    def stale(self) -> bool:
        """Whether `fleet` may differ from what it last was."""
        return bool(self._changed) or self._fleet is None

    def fleet(self) -> Fleet:
        self.freshen()
        if self._fleet is None:
            self._fleet = Fleet.of(self._views.values())
        return self._fleet

    def serving(self, model: str) -> list[EngineView]:
        """Those that are not down. Raises `UnknownModel`."""
        self.freshen()
        named = [view for view in self._views.values() if view.serves(model)]
        if not named:
            raise UnknownModel(model)
        return [view for view in named if view.health is not Health.DOWN]

    def freshen(self) -> None:
        """What does not matter to matching leaves `version` as it is."""
        for engine in self._changed:
            before, after = self._views.pop(engine, None), self._make(engine)
            if after is not None:
                self._views[engine] = after
            if after != before:
                self._fleet = None
            if matters(before) != matters(after):
                self.version += 1
        self._changed.clear()
