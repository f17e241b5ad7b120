"""Requests at an engine that no router of ours sent: what its own figures say beyond what is known to be there.

An engine's figures are a moment old, and what was sent or answered since must not pass for somebody else's traffic. So
only what at least `STEADY` figures in a row agree on counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from kvatlas_common.fleet import Load
from kvatlas_common.words import EngineId

STEADY = 3


class Foreign(NamedTuple):
    """Requests."""

    running: int = 0
    waiting: int = 0


NOBODY = Foreign()


@dataclass(slots=True)
class _Seen:
    scraped_at: float = 0.0
    surplus: deque[int] = field(default_factory=lambda: deque(maxlen=STEADY))
    foreign: Foreign = NOBODY


class ForeignTraffic:
    """Of all engines."""

    def __init__(self) -> None:
        self._seen: dict[EngineId, _Seen] = {}

    def at(self, engine: EngineId, load: Load, known: int) -> Foreign:
        """`known`: requests that are in flight there by our books."""
        if not load.scraped_at:
            return NOBODY
        seen = self._seen.get(engine)
        if seen is not None and load.scraped_at == seen.scraped_at:
            return seen.foreign
        if seen is None:
            seen = self._seen[engine] = _Seen()
        seen.scraped_at = load.scraped_at
        seen.surplus.append(max(load.running + load.waiting - known, 0))
        steady = min(seen.surplus) if len(seen.surplus) == STEADY else 0
        waiting = min(load.waiting, steady)
        seen.foreign = Foreign(steady - waiting, waiting) if steady else NOBODY
        return seen.foreign

    def keep_only(self, engines: Collection[EngineId]) -> None:
        for engine in self._seen.keys() - set(engines):
            del self._seen[engine]
