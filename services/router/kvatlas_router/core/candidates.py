"""The engines a request may go to, as they stand when it comes: what a policy weighs.

What an engine is like whatever the request, its `EngineState`, is kept from one choice to the next. What it is to one
request, a `Candidate`, is made when it is looked at: of a large fleet most engines hold nothing of the prompt and are
over no bound, so that what the request costs there follows from their states, for all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple, overload

import numpy as np

from kvatlas_common.fleet import EngineView, Health
from kvatlas_common.matching import EngineMatch
from kvatlas_common.words import EngineId, Medium
from kvatlas_router.core.cost import NOTHING, Ahead, Bound, Figures, Floats, Quote
from kvatlas_router.core.outliers import Trust
from kvatlas_router.core.rates import PRIOR


class Standing(IntEnum):
    """Engines of a better standing always go first; one that is down does not go at all."""

    READY = 0
    UNKNOWN = 1
    SUSPECT = 2  # it has just failed a request of ours
    EJECTED = 3  # it has failed too many
    DOWN = 4


class EngineState(NamedTuple):
    """One engine as it stands, whatever the request. A tuple, as all of which a choice has one for every engine."""

    view: EngineView
    standing: Standing
    ahead: Ahead
    last_used: float
    quote: Quote
    figures: bytes  # of the quote

    @classmethod
    def of(
        cls,
        view: EngineView,
        ahead: Ahead = NOTHING,
        quote: Quote | None = None,
        last_used: float = float("-inf"),
        trust: Trust = Trust.FULL,
    ) -> EngineState:
        quote = quote or Quote(PRIOR, ahead)
        return cls(view, _standing(view, trust), ahead, last_used, quote, quote.figures)

    @property
    def share(self) -> float:
        """What it takes of its part of the load; an engine that starts slowly takes less than 1."""
        return self.quote.share


def _standing(view: EngineView, trust: Trust) -> Standing:
    if view.health is Health.DOWN:
        return Standing.DOWN
    if trust is not Trust.FULL:
        return Standing.EJECTED if trust is Trust.EJECTED else Standing.SUSPECT
    return Standing.READY if view.health is Health.READY else Standing.UNKNOWN


class Candidate(NamedTuple):
    """One engine a request may go to.

    `known`: the index (or the history) can speak of it; then no `match` means it holds nothing. `block_size`: tokens in
    a block of `match`. `expected_blocks`: what it would hold once all that was sent there is computed. `crowding`: by
    how much it is over its bound, see `cost.Bound`.
    """

    state: EngineState
    match: EngineMatch | None = None
    known: bool = False
    block_size: int = 0
    expected_blocks: int = 0
    crowding: float = 0.0

    @property
    def view(self) -> EngineView:
        return self.state.view

    @property
    def ahead(self) -> Ahead:
        return self.state.ahead

    @property
    def cached_tokens(self) -> int:
        """What it will hold, or be computing, when the turn of the prompt comes."""
        blocks, match = self.expected_blocks, self.match
        if match is not None and match.blocks > blocks:
            blocks = match.blocks
        return blocks * self.block_size

    def to_compute(self, prompt_tokens: int) -> int:
        """Tokens of the prompt that are left."""
        return max(prompt_tokens - self.cached_tokens, 0)

    def transferred(self) -> tuple[tuple[Medium, int], ...]:
        """Cached tokens on slower media."""
        match, size = self.match, self.block_size
        if match is None:
            return ()
        return tuple((m, n * size) for m, n in match.media.items() if m is not Medium.GPU)

    @property
    def moved_s(self) -> float:
        """How long these take to bring."""
        return self.state.quote.moved_s(self.transferred())


class Line(NamedTuple):
    """The states of engines, and what follows from all of them: an element of each for every engine. `places`: where
    among them each is; `busy`: which share of them is computing prompts; `crowding`: see `Candidate`, None: 0 for all.
    """

    states: Sequence[EngineState]
    places: Mapping[EngineId, int]
    standings: Sequence[Standing]
    figures: Figures
    busy: float
    crowding: Floats | None

    @classmethod
    def of(cls, states: Sequence[EngineState], places: Mapping[EngineId, int] | None = None) -> Line:
        """`places`, where it is known already."""
        if places is None:
            places = {state.view.id: place for place, state in enumerate(states)}
        aheads = [state.ahead for state in states]
        in_flight = [ahead.pending + ahead.decoding for ahead in aheads]
        bound, crowding = Bound.of(in_flight), None
        if max(in_flight, default=0) > bound.requests:
            crowding = np.array([bound.crowding(requests) for requests in in_flight])
        return cls(
            states,
            places,
            [state.standing for state in states],
            Figures.of([state.figures for state in states]),
            sum([ahead.pending > 0 for ahead in aheads]) / max(len(states), 1),
            crowding,
        )


class Candidates(Sequence[Candidate]):
    """One for each state; `make` makes the one of a place. The arrays have an element for each, see `Candidate`; None:
    0 for all.
    """

    def __init__(
        self, line: Line, make: Callable[[int], Candidate], *, cached_tokens: Floats, moved_s: Floats | None
    ) -> None:
        self.states = line.states
        self.standings = line.standings
        self._line = line
        self._make = make
        self._cached_tokens = cached_tokens
        self._moved_s = moved_s

    @classmethod
    def of(cls, candidates: Sequence[Candidate]) -> Candidates:
        """Of some that are made already."""
        line = Line.of([candidate.state for candidate in candidates])
        return cls(
            line._replace(crowding=np.array([candidate.crowding for candidate in candidates], float)),
            candidates.__getitem__,
            cached_tokens=np.array([candidate.cached_tokens for candidate in candidates], float),
            moved_s=np.array([candidate.moved_s for candidate in candidates], float),
        )

    @overload
    def __getitem__(self, index: int) -> Candidate: ...
    @overload
    def __getitem__(self, index: slice) -> list[Candidate]: ...
    def __getitem__(self, index: int | slice) -> Candidate | list[Candidate]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        if not 0 <= index < len(self.states):
            raise IndexError(index)
        return self._make(index)

    def __len__(self) -> int:
        return len(self.states)

    def up(self) -> Candidates:
        """Without the engines that are down."""
        if Standing.DOWN not in self.standings:
            return self
        kept = [place for place, standing in enumerate(self.standings) if standing is not Standing.DOWN]
        line = Line.of([self.states[place] for place in kept])
        return Candidates(
            line._replace(crowding=None if self._line.crowding is None else self._line.crowding[kept]),
            lambda place: self._make(kept[place]),
            cached_tokens=self._cached_tokens[kept],
            moved_s=None if self._moved_s is None else self._moved_s[kept],
        )

    def costs_ms(self, prompt_tokens: int) -> Floats:
        """What the request comes to on each, in all; a lesser share makes it dearer."""
        crowding = self._line.crowding
        return self._line.figures.totals_ms(
            to_compute=np.maximum(prompt_tokens - self._cached_tokens, 0.0),
            voided=None if crowding is None else crowding * prompt_tokens,
            moved_s=self._moved_s,
        )
