"""The engine on which the request costs least, see `cost.py`: by what each holds (`Precise`), or by what was sent to
each (`Estimate`).

Costs that differ by less than a millisecond are alike, and go to the engine least recently used. With a temperature,
engines are chosen with a probability that falls by e for every so many milliseconds of cost: exploration, for fleets
whose speeds change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvatlas_router.core.choice import Candidate, Choice, Strategy, cost_of
from kvatlas_router.core.policies.base import Needs, Situation


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
    tokens = situation.ask.prompt_tokens

    def cost(candidate: Candidate) -> int:
        return round(cost_of(candidate, tokens).total_ms / candidate.state.share)

    def noisy(candidate: Candidate) -> float:
        # The Gumbel trick: the smallest of costs so shifted is a draw from their softmax.
        shift = temperature_ms * math.log(-math.log(max(situation.chance(), 1e-300)) or 1e-300)
        return cost_of(candidate, tokens).total_ms / candidate.state.share + shift

    return situation.ordered(strategy, noisy if temperature_ms > 0 else cost)
