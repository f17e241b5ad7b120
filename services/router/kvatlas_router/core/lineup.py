"""The states of the engines, kept from one choice to the next.

A state is made anew after `STATE_S`, and when something has happened at its engine, or another load is told of it, or
it has another view. Of a hundred engines that is a few at every choice; so what may have changed is compared for all at
once, in the order in which the engines were asked for last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

from kvatlas_common.fleet import EngineView, Load
from kvatlas_common.words import EngineId
from kvatlas_router.core.candidates import EngineState, Line

STATE_S = 0.05
"""How long an engine's state is used, if nothing happens there but that it computes on."""
NO_LOAD = Load()
_OVER = float("-inf")


@dataclass(slots=True)
class _Kept:
    """A state, of what it was made, and until when it is used."""

    state: EngineState
    load: Load
    until: float


class Lineup:
    """`make` makes a state. Not bounded in engines: `clear` when they leave."""

    def __init__(self, make: Callable[[EngineView, Load, float], EngineState]) -> None:
        self._make = make
        self._kept: dict[EngineId, _Kept] = {}
        self._views: tuple[EngineView, ...] = ()
        self._loads: list[Load] = []
        self._line: list[_Kept] = []
        self._given = Line.of(())

    def of(self, views: Sequence[EngineView], loads: Mapping[EngineId, Load], now: float) -> Line:
        """As they stand `now`, in this order."""
        views = tuple(views)
        if views != self._views:
            self._line_up(views, loads, now)
        told = list(map(loads.get, self._given.places, repeat(NO_LOAD)))
        if told != self._loads:
            self._told(told)
        over = [kept for kept in self._line if kept.until <= now]
        for kept in over:
            kept.state, kept.until = self._make(kept.state.view, kept.load, now), now + STATE_S
        if over:
            self._given = Line.of([kept.state for kept in self._line], self._given.places)
        return self._given

    def changed(self, engine: EngineId) -> None:
        """Something has happened there."""
        kept = self._kept.get(engine)
        if kept is not None:
            kept.until = _OVER

    def clear(self) -> None:
        self._kept.clear()
        self._views = ()

    def _line_up(self, views: tuple[EngineView, ...], loads: Mapping[EngineId, Load], now: float) -> None:
        for view in views:
            kept = self._kept.get(view.id)
            if kept is None or kept.state.view != view:
                load = loads.get(view.id, NO_LOAD)
                self._kept[view.id] = _Kept(self._make(view, load, now), load, now + STATE_S)
        self._views = views
        self._line = [self._kept[view.id] for view in views]
        self._loads = [kept.load for kept in self._line]
        self._given = Line.of([kept.state for kept in self._line])

    def _told(self, loads: list[Load]) -> None:
        for kept, load in zip(self._line, loads, strict=True):
            if load != kept.load:
                kept.load, kept.until = load, _OVER
        self._loads = loads
