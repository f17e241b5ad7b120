"""Engines by chance or by turns: what other policies are held against."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvatlas_router.core.choice import Choice, Strategy
from kvatlas_router.core.policies.base import Needs, Situation
from kvatlas_router.core.policies.by_load import load_of


@dataclass(frozen=True, slots=True)
class Random:
    needs: Needs = Needs.NOTHING

    def choose(self, situation: Situation) -> Choice | None:
        """One draw per engine, so that the fallbacks are random too."""
        return situation.ordered(Strategy.RANDOM, (situation.chance() for _ in situation.candidates))


@dataclass(frozen=True, slots=True)
class RoundRobin:
    needs: Needs = Needs.NOTHING
    _turns: Iterator[int] = field(default_factory=itertools.count)

    def choose(self, situation: Situation) -> Choice | None:
        turn, count = next(self._turns), max(len(situation.candidates), 1)
        places = {e: n for n, e in enumerate(sorted(c.view.id for c in situation.candidates))}
        return situation.ordered(
            Strategy.ROUND_ROBIN, ((places[c.view.id] - turn) % count for c in situation.candidates)
        )


@dataclass(frozen=True, slots=True)
class PowerOfTwo:
    """The less loaded of two drawn at random (Mitzenmacher 2001): needs no common view of the load to spread well."""

    needs: Needs = Needs.NOTHING

    def choose(self, situation: Situation) -> Choice | None:
        order = sorted(range(len(situation.candidates)), key=lambda _: situation.chance())
        drawn = {situation.candidates[n].view.id for n in order[:2]}
        places = {situation.candidates[n].view.id: place for place, n in enumerate(order)}
        return situation.ordered(
            Strategy.TWO,
            ((0, *load_of(c)) if c.view.id in drawn else (1, places[c.view.id], 0) for c in situation.candidates),
        )
