"""The engine on which the request costs least, see `cost.py`: by what each holds (`Precise`), or by what was sent to
each (`Estimate`).

Costs that differ by less than a millisecond are alike, and go to the engine least recently used. With a temperature,
engines are chosen with a probability that falls by e for every so many milliseconds of cost: exploration, for fleets
whose speeds change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvatlas_router.core.choice import Candidate, Choice, Reason, Strategy, Term, ordered
from kvatlas_router.core.cost import WEIGHTS, Weights
from kvatlas_router.core.policies.base import Needs, Situation


@dataclass(frozen=True, slots=True)
class Precise:
    temperature_ms: float = 0.0
    weights: Weights = WEIGHTS
    needs: Needs = Needs.INDEX

    def choose(self, situation: Situation) -> Choice | None:
        """None when nothing is known of any engine. One that is not known counts as empty."""
        if not any(candidate.known for candidate in situation.candidates):
            return None
        return _by_cost(situation, Strategy.PRECISE, self.temperature_ms, self.weights)


@dataclass(frozen=True, slots=True)
class Estimate:
    temperature_ms: float = 0.0
    weights: Weights = WEIGHTS
    needs: Needs = Needs.HISTORY

    def choose(self, situation: Situation) -> Choice | None:
        return _by_cost(situation, Strategy.ESTIMATE, self.temperature_ms, self.weights)


def _by_cost(situation: Situation, strategy: Strategy, temperature_ms: float, weights: Weights) -> Choice:
    def cost(candidate: Candidate, term: Term) -> int:
        return round(term.cost.total_ms / candidate.share)

    def noisy(candidate: Candidate, term: Term) -> float:
        # The Gumbel trick: the smallest of costs so shifted is a draw from their softmax.
        shift = temperature_ms * math.log(-math.log(max(situation.chance(), 1e-300)) or 1e-300)
        return term.cost.total_ms / candidate.share + shift

    rank = noisy if temperature_ms > 0 else cost
    return ordered(
        situation.candidates,
        situation.ask.prompt_tokens,
        Reason(strategy, situation.cause),
        rank,
        answer_tokens=situation.answer_tokens,
        weights=weights,
    )
