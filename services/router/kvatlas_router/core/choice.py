"""Which engine a request goes to, and why: the values a choice is made from, and what it is.

A `Choice` carries its reason and the terms of every engine that was considered: the response headers, the log line,
`/debug/route` and the tests read this one object.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any, NamedTuple, overload

from kvatlas_common.fleet import EngineView, Health
from kvatlas_common.matching import EngineMatch
from kvatlas_common.words import EngineId, Medium
from kvatlas_router.core.cost import NOTHING, Ahead, Cost, Quote
from kvatlas_router.core.outliers import Trust
from kvatlas_router.core.rates import PRIOR


class Strategy(StrEnum):
    """How a choice was made."""

    PRECISE = "precise"  # by what the index says each engine holds
    ESTIMATE = "estimate"  # by where prompts that begin alike were sent
    AFFINITY = "affinity"  # by the session
    HASH = "consistent-hash"  # by how the prompt begins
    LOAD = "load"  # by what is queued where
    TWO = "power-of-two"  # the less loaded of two at random
    ROUND_ROBIN = "round-robin"
    RANDOM = "random"


BY_COST = frozenset({Strategy.PRECISE, Strategy.ESTIMATE})
"""Choices whose reason is the cost of their terms."""


class Standing(IntEnum):
    """Engines of a better standing always go first; one that is down does not go at all."""

    READY = 0
    UNKNOWN = 1
    SUSPECT = 2  # it has just failed a request of ours
    EJECTED = 3  # it has failed too many
    DOWN = 4


@dataclass(frozen=True, slots=True)
class Reason:
    """`cause` says why the strategy is not a better one; written `affinity:index-unavailable`."""

    strategy: Strategy
    cause: str | None = None

    def __str__(self) -> str:
        return self.strategy if self.cause is None else f"{self.strategy}:{self.cause}"


class EngineState(NamedTuple):
    """One engine as it stands, whatever the request. `share`: what it takes of its part of the load; an engine that
    starts slowly takes less than 1. A tuple, as all of which a choice has one for every engine.
    """

    view: EngineView
    standing: Standing
    ahead: Ahead
    last_used: float
    quote: Quote
    share: float = 1.0
    in_flight: int = 0

    @classmethod
    def of(
        cls,
        view: EngineView,
        ahead: Ahead = NOTHING,
        quote: Quote | None = None,
        *,
        last_used: float = float("-inf"),
        share: float = 1.0,
        trust: Trust = Trust.FULL,
    ) -> EngineState:
        quote = quote or Quote(PRIOR, ahead)
        return cls(view, _standing(view, trust), ahead, last_used, quote, share, ahead.in_flight)


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

    def to_compute(self, prompt_tokens: int) -> int:
        """Tokens of the prompt it will neither hold nor be computing when their turn comes."""
        blocks, match = self.expected_blocks, self.match
        if match is not None and match.blocks > blocks:
            blocks = match.blocks
        computed = prompt_tokens - blocks * self.block_size
        return computed if computed > 0 else 0

    def cost_ms(self, prompt_tokens: int) -> float:
        """What it comes to in all; a lesser share makes it dearer. In one piece: for every engine of every choice."""
        state, match, _, size, blocks, crowding = self
        transferred: tuple[tuple[Medium, int], ...] = ()
        if match is not None:
            transferred = self.transferred()
            blocks = max(blocks, match.blocks)
        elif not blocks and not crowding:
            return state.quote.total_ms(prompt_tokens) / state.share
        computed = prompt_tokens - blocks * size
        return (
            state.quote.total_ms(computed if computed > 0 else 0, transferred, crowding * prompt_tokens) / state.share
        )

    def transferred(self) -> tuple[tuple[Medium, int], ...]:
        """Cached tokens on slower media."""
        match, size = self.match, self.block_size
        if match is None or len(match.media) == (Medium.GPU in match.media):
            return ()
        return tuple((m, n * size) for m, n in match.media.items() if m is not Medium.GPU)


class Term(NamedTuple):
    """What one engine weighed in a choice. `cached_tokens` is the prediction; None: nothing is known of its cache."""

    state: EngineState
    cached_tokens: int | None
    to_compute: int
    transferred: tuple[tuple[Medium, int], ...]
    cost: Cost

    @property
    def view(self) -> EngineView:
        return self.state.view

    @property
    def engine(self) -> EngineId:
        return self.state.view.id

    @property
    def ahead(self) -> Ahead:
        return self.state.ahead


def term_of(candidate: Candidate, prompt_tokens: int) -> Term:
    """`prompt_tokens` known or estimated."""
    held = candidate.match.blocks * candidate.block_size if candidate.match else 0
    to_compute, transferred = candidate.to_compute(prompt_tokens), candidate.transferred()
    return Term(
        candidate.state,
        min(held, prompt_tokens) if candidate.known else None,
        to_compute,
        transferred,
        candidate.state.quote.cost(to_compute, transferred, candidate.crowding * prompt_tokens),
    )


class Terms(Sequence[Term]):
    """Of all engines considered, in the order in which they are to be tried; each is made when it is looked at.

    That order is by standing, then by `ranks`, one per candidate, the lowest first; then the least recently used first.
    Nearly always only the first is looked at: the others are put in order for whoever looks at a second one. There is
    at least one.
    """

    def __init__(
        self, candidates: Sequence[Candidate], standings: Sequence[Standing], ranks: Sequence[Any], prompt_tokens: int
    ) -> None:
        self._candidates = candidates
        self._standings = standings
        self._ranks = ranks
        self._order: list[int] | None = None
        self._prompt_tokens = prompt_tokens
        self._made: dict[int, Term] = {}
        best = min(standings)
        if max(standings) is best:
            least = min(ranks)
            alike = [number for number, rank in enumerate(ranks) if rank == least]
        else:
            least = min(zip(standings, ranks, strict=True))
            alike = [number for number, rank in enumerate(zip(standings, ranks, strict=True)) if rank == least]
        self._first = alike[0] if len(alike) == 1 else min(alike, key=self._last_used)

    @overload
    def __getitem__(self, index: int) -> Term: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Term, ...]: ...
    def __getitem__(self, index: int | slice) -> Term | tuple[Term, ...]:
        if isinstance(index, slice):
            return tuple(self[n] for n in range(*index.indices(len(self))))
        if index not in self._made:
            self._made[index] = term_of(self._candidate(index), self._prompt_tokens)
        return self._made[index]

    def __len__(self) -> int:
        return len(self._candidates)

    def _candidate(self, index: int) -> Candidate:
        if index == 0:
            return self._candidates[self._first]
        if self._order is None:
            standings, ranks = self._standings, self._ranks
            self._order = sorted(range(len(ranks)), key=lambda n: (standings[n], ranks[n], self._last_used(n)))
        return self._candidates[self._order[index]]

    def _last_used(self, number: int) -> float:
        return self._candidates[number].state.last_used


@dataclass(frozen=True, slots=True)
class Choice:
    """Which engine, which if that one fails, and why."""

    terms: Terms
    reason: Reason

    @property
    def engine(self) -> EngineView:
        return self.terms[0].view


class NoEngine(LookupError):
    """No engine that may be tried serves the model."""


def ordered(candidates: Sequence[Candidate], prompt_tokens: int, reason: Reason, ranks: Iterable[object]) -> Choice:
    """See `Terms`; engines that are down are none of them. `prompt_tokens` known or estimated. Raises `NoEngine` when
    there is none.
    """
    standings, ranks = [candidate.state.standing for candidate in candidates], list(ranks)
    if Standing.DOWN in standings:
        up = [number for number, standing in enumerate(standings) if standing is not Standing.DOWN]
        candidates = [candidates[number] for number in up]
        standings, ranks = [standings[number] for number in up], [ranks[number] for number in up]
    if not candidates:
        raise NoEngine("no engine is up")
    return Choice(Terms(candidates, standings, ranks, prompt_tokens), reason)
