"""Whether a new request would only queue at an engine, and how many more it should be sent.

What an engine says waits in it is as old as its last scrape. Since then requests were sent there and others got their
first byte, and routers know of both: *waiting now* is what was scraped, plus what has gone there since, less what was
answered since. An engine takes `waiting_max` waiting requests, enough never to run dry between two looks at it; a
quarter of that while its KV cache is full, because what is started then pushes out what runs.

Unknown is not saturated: without figures, or with figures older than `fresh_s`, only `in_flight_max` limits an engine.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from kvatlas_common.fleet import Load
from kvatlas_common.words import EngineId

UNLIMITED = 1 << 30
FULL_CACHE_PART = 4


@dataclass(frozen=True, slots=True)
class PressureRules:
    """`waiting_max` 0: no engine is ever saturated by what waits there; `in_flight_max` 0: nor by what is in flight."""

    waiting_max: int = 32
    kv_usage_max: float = 0.97
    in_flight_max: int = 0
    fresh_s: float = 5.0


@dataclass(frozen=True, slots=True)
class _Seen:
    load: Load
    unanswered: int  # when the load was told
    at: float


class Pressure:
    """Times are seconds of one monotonic clock, given by the caller; `unanswered` counts those of all routers."""

    def __init__(self, rules: PressureRules = PressureRules()) -> None:
        self.rules: Final = rules
        self._seen: dict[EngineId, _Seen] = {}

    def told(self, engine: EngineId, load: Load, unanswered: int, now: float) -> None:
        """A load that was never scraped tells nothing, nor does one that differs only in what others have there."""
        seen = self._seen.get(engine)
        if load.scraped_at and (seen is None or seen.load.scraped_at != load.scraped_at):
            self._seen[engine] = _Seen(load, unanswered, now)

    def waiting(self, engine: EngineId, unanswered: int, now: float) -> int | None:
        """Requests that wait there now. None: not known."""
        seen = self._seen.get(engine)
        if seen is None or now - seen.at > self.rules.fresh_s:
            return None
        return max(0, seen.load.waiting + unanswered - seen.unanswered)

    def places(self, engine: EngineId, unanswered: int, in_flight: int, now: float) -> int:
        """How many more requests the engine should be sent. `in_flight`: this router's."""
        rules = self.rules
        room = rules.in_flight_max - in_flight if rules.in_flight_max else UNLIMITED
        if rules.waiting_max and (waiting := self.waiting(engine, unanswered, now)) is not None:
            full = self._seen[engine].load.kv_usage >= rules.kv_usage_max
            limit = max(1, rules.waiting_max // FULL_CACHE_PART) if full else rules.waiting_max
            room = min(room, limit - waiting)
        return max(0, room)

    def keep_only(self, engines: Collection[EngineId]) -> None:
        for engine in [e for e in self._seen if e not in engines]:
            del self._seen[engine]
