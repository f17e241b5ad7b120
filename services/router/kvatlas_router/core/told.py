"""What is known of the engines' caches, for one request: what a lookup answered, and what was sent to them lately."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count

import numpy as np

from kvatlas_common.fleet import EngineView
from kvatlas_common.history import ESTIMATE_PROFILE
from kvatlas_common.matching import EngineMatch, MatchAnswer
from kvatlas_common.words import EngineId
from kvatlas_router.core.ask import Ask
from kvatlas_router.core.candidates import Candidate, Candidates, EngineState, Line
from kvatlas_router.core.cost import Floats

_BLOCK_OF_GUESSES = ESTIMATE_PROFILE.block_size


class Told:
    """`answer`: None where nobody was asked. `lately`: blocks that engines were sent in the last moments, where there
    are any. `guessed`: that nothing is said of an engine is not to say that it holds nothing.
    """

    def __init__(
        self, ask: Ask, answer: MatchAnswer | None, lately: Mapping[EngineId, int], *, guessed: bool = False
    ) -> None:
        self._keys = ask.keys
        answer, asked = answer or MatchAnswer(), answer is not None
        self._plain = answer.plain
        self._places = dict(zip(self._plain.engines, count()))
        self._listed = {match.engine: match for match in answer.listed}
        self._unknown = frozenset(answer.unknown)
        self._lately = lately
        self._asked = asked and not guessed

    def candidates(self, line: Line) -> Candidates:
        """Those of these engines."""
        cached_tokens, moved_s = self.held(line)

        def make(place: int) -> Candidate:
            return self.candidate(line.states[place], 0.0 if line.crowding is None else float(line.crowding[place]))

        return Candidates(line, make, cached_tokens=cached_tokens, moved_s=moved_s)

    def candidate(self, state: EngineState, crowding: float) -> Candidate:
        view = state.view
        match = self._match(view.id)
        if self._asked:  # about each with its own profile
            known = view.id not in self._unknown if view.profile in self._keys else view.known_empty
        else:
            known = match is not None
        return Candidate(state, match, known, self._block_size(view), self._expected(view.id, match), crowding)

    def held(self, line: Line) -> tuple[Floats, Floats | None]:
        """`Candidate.cached_tokens` and `moved_s` of all: of most engines nothing is said, so that both are 0."""
        cached_tokens, moved_s = np.zeros(len(line.states)), None
        where, states = line.places.get, line.states
        for engine, blocks in zip(self._plain.engines, self._plain.blocks, strict=True):
            place = where(engine)
            if place is not None:
                cached_tokens[place] = blocks * self._block_size(states[place].view)
        for engine in (*self._listed, *self._lately):
            place = where(engine)
            if place is not None:
                candidate = self.candidate(states[place], 0.0)
                cached_tokens[place] = candidate.cached_tokens
                if candidate.transferred():
                    moved_s = np.zeros(len(states)) if moved_s is None else moved_s
                    moved_s[place] = candidate.moved_s
        return cached_tokens, moved_s

    def _match(self, engine: EngineId) -> EngineMatch | None:
        place = self._places.get(engine)
        return self._listed.get(engine) if place is None else self._plain.at(place)

    def _expected(self, engine: EngineId, match: EngineMatch | None) -> int:
        """Blocks."""
        lately = self._lately.get(engine, 0) if self._lately else 0
        return max(lately, match.expected) if match is not None else lately

    def _block_size(self, view: EngineView) -> int:
        return (view.block_size if view.profile in self._keys else None) or _BLOCK_OF_GUESSES
