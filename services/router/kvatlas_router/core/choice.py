"""Which engine a request goes to, and why: the values a choice is made from, and what it is.

A `Choice` carries its reason and the terms of every engine that was considered: the response headers, the log line,
`/debug/route` and the tests read this one object.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, overload

from kvatlas_common.fleet import EngineView
from kvatlas_common.words import EngineId, Medium
from kvatlas_router.core.candidates import Candidate, Candidates, EngineState, Standing
from kvatlas_router.core.cost import Ahead, Cost


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


@dataclass(frozen=True, slots=True)
class Reason:
    """`cause` says why the strategy is not a better one; written `affinity:index-unavailable`."""

    strategy: Strategy
    cause: str | None = None

    def __str__(self) -> str:
        return self.strategy if self.cause is None else f"{self.strategy}:{self.cause}"


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

    def __init__(self, candidates: Candidates, ranks: Sequence[Any], prompt_tokens: int) -> None:
        self._candidates = candidates
        self._standings = standings = candidates.standings
        self._ranks = ranks
        self._order: list[int] | None = None
        self._prompt_tokens = prompt_tokens
        self._made: dict[int, Term] = {}
        if standings.count(standings[0]) == len(standings):
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
        return self._candidates.states[number].last_used


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


def ordered(candidates: Candidates, prompt_tokens: int, reason: Reason, ranks: Iterable[object]) -> Choice:
    """See `Terms`; engines that are down are none of them. `prompt_tokens` known or estimated. Raises `NoEngine` when
    there is none.
    """
    ranks, up = list(ranks), candidates.up()
    if up is not candidates:
        standings = candidates.standings
        ranks = [rank for rank, standing in zip(ranks, standings, strict=True) if standing is not Standing.DOWN]
    if not up:
        raise NoEngine("no engine is up")
    return Choice(Terms(up, ranks, prompt_tokens), reason)
