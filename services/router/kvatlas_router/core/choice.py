"""Which engine a request goes to, and why.

The rule for now: the cheapest engine wins, where the cost is the prompt tokens it would have to compute plus the prompt
tokens this router has already queued there; a tie goes to the engine least recently used. Where the index cannot say
what the engines hold, a session keeps to its engine (rendezvous hashing), and where there is no session, the engine
with the least queued gets the request. A `Choice` carries its reason and the terms it was made from: the response
headers, the log line, `/debug/route` and the tests read this one object.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum

from kvatlas_common.fleet import EngineView, Health
from kvatlas_common.matching import EngineMatch
from kvatlas_common.words import EngineId
from kvatlas_router.core.outliers import Trust

OVERLOAD = 1.25
OVERLOAD_SLACK = 4  # requests: too few to be a load


class Strategy(StrEnum):
    """How a choice was made."""

    PRECISE = "precise"  # by what the index says each engine holds
    AFFINITY = "affinity"  # by the session
    LOAD = "load"  # by what this router has sent where
    RANDOM = "random"
    ROUND_ROBIN = "round-robin"


class Policy(StrEnum):
    """What the operator asked for."""

    PRECISE = "precise"
    RANDOM = "random"
    ROUND_ROBIN = "round-robin"
    LEAST_LOAD = "least-load"


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


@dataclass(frozen=True, slots=True)
class Candidate:
    """One engine a request may go to. `known`: the index can speak of it; then no `match` means it holds nothing."""

    view: EngineView
    match: EngineMatch | None = None
    known: bool = False
    queued_tokens: int = 0
    in_flight: int = 0
    last_used: float = float("-inf")
    trust: Trust = Trust.FULL
    share: float = 1.0  # what it takes of its part of the load; an engine that starts slowly takes less

    @property
    def standing(self) -> Standing:
        if self.trust is not Trust.FULL:
            return Standing.EJECTED if self.trust is Trust.EJECTED else Standing.SUSPECT
        return Standing.READY if self.view.health is Health.READY else Standing.UNKNOWN


@dataclass(frozen=True, slots=True)
class Term:
    """What one engine weighed in a choice. `cached_tokens` is the prediction; None: nothing is known of its cache."""

    view: EngineView
    standing: Standing
    cached_tokens: int | None
    queued_tokens: int
    in_flight: int
    to_compute: int  # prompt tokens it would not find in its cache

    @property
    def cost(self) -> int:
        return self.to_compute + self.queued_tokens

    @property
    def engine(self) -> EngineId:
        return self.view.id


@dataclass(frozen=True, slots=True)
class Choice:
    """The terms of all engines considered, in the order in which they are to be tried."""

    terms: tuple[Term, ...]
    reason: Reason

    @property
    def engine(self) -> EngineView:
        return self.terms[0].view

    @property
    def cost(self) -> int:
        return self.terms[0].cost

    @property
    def fallbacks(self) -> tuple[EngineView, ...]:
        return tuple(t.view for t in self.terms[1:])


class NoEngine(LookupError):
    """No engine that may be tried serves the model."""


def by_cost(candidates: Sequence[Candidate], prompt_tokens: int) -> Choice:
    """By what each engine would have to compute, engines whose cache is not known counting as empty.

    When the index knows none of them this is a choice by load, and says so.
    """
    if not any(c.known for c in candidates):
        return by_load(candidates, prompt_tokens, "unknown-engines")
    return _ordered(
        candidates,
        prompt_tokens,
        Reason(Strategy.PRECISE),
        lambda c, cost: (cost / c.share, c.last_used, str(c.view.id)),
    )


def by_affinity(
    candidates: Sequence[Candidate], prompt_tokens: int, session: bytes, *, cause: str, home: EngineId | None = None
) -> Choice:
    """The same session goes to the same engine, and when engines come or go only their own sessions move.

    A session that everybody shares (a common system prompt) must not bury one engine: engines with more requests in
    flight than `OVERLOAD` times the mean go last (consistent hashing with bounded loads, Mirrokni et al.). `home`: the
    engine that keeps what the request refers to; it goes first whatever its load.
    """
    mean = (sum(c.in_flight for c in candidates) + 1) / max(len(candidates), 1)
    limit = OVERLOAD * mean + OVERLOAD_SLACK
    return _ordered(
        candidates,
        prompt_tokens,
        Reason(Strategy.AFFINITY, cause),
        lambda c, _: (c.view.id != home, c.in_flight > limit, -rendezvous(session, c.view.id)),
    )


def by_load(candidates: Sequence[Candidate], prompt_tokens: int, cause: str | None) -> Choice:
    """Fewest prompt tokens queued by this router, then fewest requests in flight, then least recently used."""
    return _ordered(
        candidates,
        prompt_tokens,
        Reason(Strategy.LOAD, cause),
        lambda c, _: (c.queued_tokens / c.share, (c.in_flight + 1) / c.share, c.last_used, str(c.view.id)),
    )


def by_chance(candidates: Sequence[Candidate], prompt_tokens: int, chance: Callable[[], float]) -> Choice:
    """`chance`: draws from [0, 1); one per candidate, so that the fallbacks are random too."""
    return _ordered(candidates, prompt_tokens, Reason(Strategy.RANDOM), lambda c, _: chance())


def by_turn(candidates: Sequence[Candidate], prompt_tokens: int, turn: int) -> Choice:
    """`turn`: how many choices were made before."""
    places = {e: n for n, e in enumerate(sorted(c.view.id for c in candidates))}
    count = max(len(candidates), 1)
    return _ordered(
        candidates, prompt_tokens, Reason(Strategy.ROUND_ROBIN), lambda c, _: (places[c.view.id] - turn) % count
    )


def rendezvous(session: bytes, engine: EngineId) -> int:
    """The weight of an engine for a session: highest wins (Thaler and Ravishankar's highest random weight)."""
    digest = hashlib.blake2b(
        session, digest_size=8, salt=hashlib.blake2b(str(engine).encode(), digest_size=16).digest()
    )
    return int.from_bytes(digest.digest(), "big")


def _ordered(
    candidates: Sequence[Candidate], prompt_tokens: int, reason: Reason, rank: Callable[[Candidate, int], object]
) -> Choice:
    """`prompt_tokens` known or estimated. Raises `NoEngine` when there is no candidate."""
    usable = [c for c in candidates if c.view.health is not Health.DOWN]
    if not usable:
        raise NoEngine("no engine is up")
    terms = [(c, _term(c, prompt_tokens)) for c in usable]
    ranked = [(t.standing, rank(c, t.cost), t) for c, t in terms]
    ranked.sort(key=lambda r: r[:2])
    return Choice(tuple(t for _, _, t in ranked), reason)


def _term(candidate: Candidate, prompt_tokens: int) -> Term:
    cached = _cached_tokens(candidate, prompt_tokens)
    return Term(
        view=candidate.view,
        standing=candidate.standing,
        cached_tokens=cached,
        queued_tokens=candidate.queued_tokens,
        in_flight=candidate.in_flight,
        to_compute=max(prompt_tokens - (cached or 0), 0),
    )


def _cached_tokens(candidate: Candidate, prompt_tokens: int) -> int | None:
    if not candidate.known:
        return None
    if candidate.match is None or candidate.view.block_size is None:
        return 0
    return min(candidate.match.blocks * candidate.view.block_size, prompt_tokens)
