"""Engines that compute prompts and publish nothing: a stream that was never there, or has been cut.

An idle engine is silent too. What tells them apart is the engine's own count of prompt tokens that it did not find in
its cache: each block of them it stores, and says so. So an engine is *silent* when it has computed `SILENT_BLOCKS`
blocks' worth of them since its last event, and some time has passed, in which its event would have come. Prompts
shorter than a block are never stored; where an engine counts its requests, those are told by their mean length.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvatlas_common.engines.facts import Work
from kvatlas_common.words import EngineId

SILENT_BLOCKS = 4
SILENT_S = 2.0
"""An event comes a scheduler step after its block, and figures come at least so often."""
SETTLING_S = 2.0
"""What is counted so shortly after an event may be what that event told of: figures were asked for before they came."""
BLOCK_TOKENS = 64  # of an engine that has not said


@dataclass(slots=True)
class _Mark:
    """Where the engine's counts stood when it was last heard; `heard_at` None: it never was."""

    heard_at: float | None
    at: float
    work: Work
    latest: Work


@dataclass(frozen=True, slots=True)
class Silent:
    tokens: int
    seconds: float


class Silence:
    """Of all engines. `now` and `heard_at` in seconds of the same clock."""

    def __init__(self) -> None:
        self._marks: dict[EngineId, _Mark] = {}

    def worked(self, engine: EngineId, work: Work, heard_at: float | None, now: float) -> None:
        """The engine's counts, and when the last event of it came."""
        mark = self._marks.get(engine)
        settling = heard_at is not None and now - heard_at < SETTLING_S
        other = mark is None or mark.heard_at != heard_at or _less(work.computed_tokens, mark.latest.computed_tokens)
        if mark is None or other or settling:
            self._marks[engine] = _Mark(heard_at, now, work, work)
        else:
            mark.latest = work

    def of(self, engine: EngineId, heard_at: float | None, block_size: int | None, now: float) -> Silent | None:
        """None unless it should have been heard."""
        mark = self._marks.get(engine)
        if mark is None or mark.heard_at != heard_at or now - mark.at < SILENT_S:
            return None
        size, tokens = block_size or BLOCK_TOKENS, _since(mark.work.computed_tokens, mark.latest.computed_tokens)
        requests = _since(mark.work.finished, mark.latest.finished)
        if tokens < SILENT_BLOCKS * size or tokens < requests * size:
            return None
        return Silent(tokens, now - mark.at)

    def keep_only(self, engines: set[EngineId]) -> None:
        self._marks = {engine: mark for engine, mark in self._marks.items() if engine in engines}


def _less(now: int | None, before: int | None) -> bool:
    return now is not None and before is not None and now < before


def _since(before: int | None, now: int | None) -> int:
    return 0 if before is None or now is None else now - before
