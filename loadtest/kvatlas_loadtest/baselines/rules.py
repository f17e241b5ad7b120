"""What a routing rule is asked and what it sees: the same for all of them, so that only the rule differs.

A rule ranks engines, best first. What it sees of an engine is what a router can know: the index's match, the load as
last scraped, and what routers have sent there and not yet seen answered (their own at once, that of other routers a
little later). It draws chance from what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from kvatlas_common.words import EngineId

Chance = Callable[[], float]
"""Draws from [0, 1)."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as routers see it. `keys`: of the prompt's blocks, as far as a cache may serve them.

    `prefix`: how the conversation begins, the same for all that begin alike.
    """

    prompt_tokens: int
    keys: Sequence[int]
    session: str | None
    prefix: str
    block_size: int


@dataclass(frozen=True, slots=True)
class Seen:
    """One engine. `cached_tokens` by the index; `running`, `waiting` and `kv_usage` (0..1) as last scraped.

    In flight, by the routers' own books: `requests`, `prefill_tokens` they have to compute before their first token,
    and the `blocks` their prompts take.
    """

    engine: EngineId
    cached_tokens: int = 0
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    requests: int = 0
    prefill_tokens: int = 0
    blocks: int = 0

    def uncached(self, asked: Asked) -> int:
        return asked.prompt_tokens - self.cached_tokens


class Rule(Protocol):
    """`needs_index`: whether `cached_tokens` is of any interest to it."""

    needs_index: ClassVar[bool]

    def rank(self, asked: Asked, seen: Sequence[Seen], chance: Chance) -> list[EngineId]:
        """All engines of `seen`, best first."""
        ...


def by(score: Callable[[Seen], float], seen: Sequence[Seen], chance: Chance) -> list[EngineId]:
    """Lowest score first; equal ones in random order."""
    return [s.engine for _, _, s in sorted(((score(s), chance(), s) for s in seen), key=lambda each: each[:2])]
