"""Which engine a request goes to, and why: the values a choice is made from, and what it is.

A `Choice` carries its reason and the terms of every engine that was considered: the response headers, the log line,
`/debug/route` and the tests read this one object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NamedTuple

from kvatlas_common.fleet import EngineView, Health
from kvatlas_common.matching import EngineMatch
from kvatlas_common.words import EngineId, Medium
from kvatlas_router.core.cost import NOTHING, WEIGHTS, Ahead, Cost, Weights, cost_of
from kvatlas_router.core.outliers import Trust
from kvatlas_router.core.rates import PRIOR, Speed


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


@dataclass(frozen=True, slots=True)
class Reason:
    """`cause` says why the strategy is not a better one; written `affinity:index-unavailable`."""

    strategy: Strategy
    cause: str | None = None

    def __str__(self) -> str:
        return self.strategy if self.cause is None else f"{self.strategy}:{self.cause}"


class Candidate(NamedTuple):
    """One engine a request may go to, and what is there: of this router, of the others, and of nobody we know.

    `known`: the index (or the history) can speak of it; then no `match` means it holds nothing. `block_size`: tokens in
    a block of `match`. `expected_blocks`: what it would hold once all that was sent there is computed. `share`: what it
    takes of its part of the load; an engine that starts slowly takes less than 1.

    A tuple, as all that a choice makes for every engine.
    """

    view: EngineView
    match: EngineMatch | None = None
    known: bool = False
    block_size: int = 0
    expected_blocks: int = 0
    ahead: Ahead = NOTHING
    last_used: float = float("-inf")
    speed: Speed = PRIOR
    share: float = 1.0
    trust: Trust = Trust.FULL

    @property
    def standing(self) -> Standing:
        if self.trust is not Trust.FULL:
            return Standing.EJECTED if self.trust is Trust.EJECTED else Standing.SUSPECT
        return Standing.READY if self.view.health is Health.READY else Standing.UNKNOWN


class Term(NamedTuple):
    """What one engine weighed in a choice. `cached_tokens` is the prediction; None: nothing is known of its cache."""

    candidate: Candidate
    cached_tokens: int | None
    to_compute: int  # prompt tokens it will neither hold nor be computing when their turn comes
    transferred: tuple[tuple[Medium, int], ...]  # cached tokens on slower media
    cost: Cost

    @property
    def view(self) -> EngineView:
        return self.candidate.view

    @property
    def engine(self) -> EngineId:
        return self.candidate.view.id

    @property
    def standing(self) -> Standing:
        return self.candidate.standing

    @property
    def ahead(self) -> Ahead:
        return self.candidate.ahead


@dataclass(frozen=True, slots=True)
class Choice:
    """The terms of all engines considered, in the order in which they are to be tried."""

    terms: tuple[Term, ...]
    reason: Reason

    @property
    def engine(self) -> EngineView:
        return self.terms[0].view

    @property
    def fallbacks(self) -> tuple[EngineView, ...]:
        return tuple(t.view for t in self.terms[1:])


class NoEngine(LookupError):
    """No engine that may be tried serves the model."""


Rank = Callable[[Candidate, Term], object]


def ordered(
    candidates: Sequence[Candidate],
    prompt_tokens: int,
    reason: Reason,
    rank: Rank,
    *,
    answer_tokens: float = 0.0,
    weights: Weights = WEIGHTS,
) -> Choice:
    """The lowest rank first within each standing; of those that rank alike, the least recently used.

    `prompt_tokens` known or estimated. Raises `NoEngine` when there is none.
    """
    ranked = []
    for number, candidate in enumerate(candidates):
        if candidate.view.health is not Health.DOWN:
            term = term_of(candidate, prompt_tokens, answer_tokens, weights)
            ranked.append((candidate.standing, rank(candidate, term), candidate.last_used, number, term))
    if not ranked:
        raise NoEngine("no engine is up")
    ranked.sort()
    return Choice(tuple(row[-1] for row in ranked), reason)


NOTHING_MOVED: tuple[tuple[Medium, int], ...] = ()


def term_of(candidate: Candidate, prompt_tokens: int, answer_tokens: float, weights: Weights) -> Term:
    match, size, held_blocks = candidate.match, candidate.block_size, candidate.expected_blocks
    blocks, transferred = 0, NOTHING_MOVED
    if match is not None:
        blocks = match.blocks
        held_blocks = max(held_blocks, blocks)
        if len(match.media) != (Medium.GPU in match.media):
            transferred = tuple((m, n * size) for m, n in match.media.items() if m is not Medium.GPU)
    to_compute = max(prompt_tokens - held_blocks * size, 0)
    cost = cost_of(
        candidate.speed,
        to_compute,
        candidate.ahead,
        transferred=transferred,
        answer_tokens=answer_tokens,
        weights=weights,
    )
    cached = min(blocks * size, prompt_tokens) if candidate.known else None
    return Term(candidate, cached, to_compute, transferred, cost)
