"""The engine on which the request costs least, see `cost.py`: by what each holds (`Precise`), or by what was sent to
each (`Estimate`).

Costs that differ by less than a tenth or a millisecond are alike, and go to the engine least recently used. With a
temperature, engines are chosen with a probability that falls by e for every so many milliseconds of cost: exploration,
for fleets whose speeds change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvatlas_router.core.choice import Choice, Strategy
from kvatlas_router.core.policies.base import Needs, Situation

ALIKE = 0.1
"""Costs that differ by no more than this share of the least are alike: no more is known of engines than that, and
routers that all took the very least would meet there."""


@dataclass(frozen=True, slots=True)
class Precise:
    temperature_ms: float = 0.0
    needs: Needs = Needs.INDEX

    def choose(self, situation: Situation) -> Choice | None:
        """None when nothing is known of any engine. One that is not known counts as empty."""
        if not any(candidate.known for candidate in situation.candidates):
            return None
        return _by_cost(situation, Strategy.PRECISE, self.temperature_ms)


@dataclass(frozen=True, slots=True)
class Estimate:
    temperature_ms: float = 0.0
    needs: Needs = Needs.HISTORY

    def choose(self, situation: Situation) -> Choice | None:
        return _by_cost(situation, Strategy.ESTIMATE, self.temperature_ms)


def _by_cost(situation: Situation, strategy: Strategy, temperature_ms: float) -> Choice:
    situation = situation.up()
    costs = situation.candidates.costs_ms(situation.ask.prompt_tokens)
    if temperature_ms <= 0:
        steps = 1 / max(costs.min(initial=math.inf) * ALIKE, 1.0)
        return situation.ordered(strategy, (costs * steps + 0.5).astype(int).tolist())
    # The Gumbel trick: the smallest of costs so shifted is a draw from their softmax.
    return situation.ordered(strategy, [cost + temperature_ms * _gumbel(situation.chance()) for cost in costs.tolist()])


def _gumbel(drawn: float) -> float:
    return math.log(-math.log(min(max(drawn, 1e-300), 1 - 1e-16)))
