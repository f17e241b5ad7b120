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
from kvatlas_router.core.cost import WEIGHTS, Ahead, Cost, Weights, cost_of
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
    SUSPECT = 2  # it has failed requests of ours


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
    a block of `match`. `expected_blocks`: what it would hold once all that was sent there is computed. `pending`
    requests have no first token yet, `queued_tokens` are what their prompts have still to compute; `late_s`, how much
    longer than expected the oldest takes. `kv_usage` 0..1 of `kv_tokens`; 0 tokens: not known. `caution`: 1, or more
    for an engine that is to be loaded slowly.

    A tuple, as `Term` is, because a choice makes one of each per engine.
    """

    view: EngineView
    match: EngineMatch | None = None
    known: bool = False
    block_size: int = 0
    expected_blocks: int = 0
    queued_tokens: int = 0
    pending: int = 0
    decoding: int = 0
    late_s: float = 0.0
    last_used: float = float("-inf")
    kv_usage: float = 0.0
    kv_tokens: int = 0
    speed: Speed = PRIOR
    caution: float = 1.0
    suspect: bool = False

    @property
    def in_flight(self) -> int:
        return self.pending + self.decoding

    @property
    def standing(self) -> Standing:
        if self.suspect:
            return Standing.SUSPECT
        return Standing.READY if self.view.health is Health.READY else Standing.UNKNOWN


class Term(NamedTuple):
    """What one engine weighed in a choice. `cached_tokens` is the prediction; None: nothing is known of its cache."""

    view: EngineView
    standing: Standing
    cached_tokens: int | None
    to_compute: int  # prompt tokens it will neither hold nor be computing when their turn comes
    queued_tokens: int
    pending: int
    decoding: int
    cost: Cost
    transferred: tuple[tuple[Medium, int], ...] = ()  # cached tokens on slower media

    @property
    def engine(self) -> EngineId:
        return self.view.id

    @property
    def in_flight(self) -> int:
        return self.pending + self.decoding


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
            ranked.append((term.standing, rank(candidate, term), candidate.last_used, number, term))
    if not ranked:
        raise NoEngine("no engine is up")
    ranked.sort()
    return Choice(tuple(row[-1] for row in ranked), reason)


def term_of(candidate: Candidate, prompt_tokens: int, answer_tokens: float, weights: Weights) -> Term:
    match, size = candidate.match, candidate.block_size
    blocks = match.blocks if match else 0
    held = min(max(candidate.expected_blocks, blocks) * size, prompt_tokens)
    transferred = () if match is None or len(match.media) == (Medium.GPU in match.media) else _slower(match, size)
    cost = cost_of(
        candidate.speed,
        prompt_tokens - held,
        Ahead(
            candidate.queued_tokens,
            candidate.pending,
            candidate.decoding,
            candidate.late_s,
            candidate.kv_usage,
            candidate.kv_tokens,
        ),
        transferred=transferred,
        answer_tokens=answer_tokens,
        weights=weights,
    )
    return Term(
        candidate.view,
        candidate.standing,
        min(blocks * size, prompt_tokens) if candidate.known else None,
        prompt_tokens - held,
        candidate.queued_tokens,
        candidate.pending,
        candidate.decoding,
        cost,
        transferred,
    )


def _slower(match: EngineMatch, block_size: int) -> tuple[tuple[Medium, int], ...]:
    return tuple((medium, blocks * block_size) for medium, blocks in match.media.items() if medium is not Medium.GPU)
