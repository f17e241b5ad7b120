"""What a policy is given and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from kvatlas_router.core.ask import Ask
from kvatlas_router.core.candidates import Candidates
from kvatlas_router.core.choice import Choice, Reason, Strategy, ordered


class Needs(StrEnum):
    """What has to be known of the engines' caches."""

    INDEX = "index"  # what they hold
    HISTORY = "history"  # what was sent to them
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Situation:
    """One request, and the engines as they stand. `cause`: why a better policy had no answer. `chance` draws from
    [0, 1).
    """

    ask: Ask
    candidates: Candidates
    cause: str | None
    chance: Callable[[], float]

    def up(self) -> Situation:
        """Without the engines that are down."""
        up = self.candidates.up()
        return self if up is self.candidates else replace(self, candidates=up)

    def ordered(self, strategy: Strategy, ranks: Iterable[object]) -> Choice:
        """`ranks`: one per candidate, the lowest first. Raises `NoEngine`."""
        return ordered(self.candidates, self.ask.prompt_tokens, Reason(strategy, self.cause), ranks)


class Policy(Protocol):
    """One way to choose. One object serves all requests; what it remembers is its own."""

    @property
    def needs(self) -> Needs: ...

    def choose(self, situation: Situation) -> Choice | None:
        """None: it has no answer here, and the next policy is asked. Raises `NoEngine`."""
        ...
