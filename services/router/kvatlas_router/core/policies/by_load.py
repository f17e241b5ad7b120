"""The engine with the least to do. It always has an answer: every chain of policies ends with it."""

from __future__ import annotations

from dataclasses import dataclass

from kvatlas_router.core.candidates import Candidate
from kvatlas_router.core.choice import Choice, Strategy
from kvatlas_router.core.policies.base import Needs, Situation


@dataclass(frozen=True, slots=True)
class LeastLoad:
    """Fewest requests in flight, then fewest prompt tokens queued; engines to be loaded slowly look busier."""

    needs: Needs = Needs.NOTHING

    def choose(self, situation: Situation) -> Choice | None:
        return situation.ordered(Strategy.LOAD, map(load_of, situation.candidates))


def load_of(candidate: Candidate) -> tuple[float, int]:
    ahead = candidate.ahead
    return (ahead.in_flight + 1) / candidate.state.share, ahead.queued_tokens
