"""How much of its share an engine takes that is new to this router, or has just come back.

An engine that joins a fleet at work is the emptiest of all, so everything would go to it at once: to an empty cache,
cold kernels, perhaps weights still loading. Its *share* grows over `ramp_s` from `SHARE_MIN` to 1 in proportion to the
time passed; the choice divides its cost by it. A request whose prefix only that engine holds has next to no cost there
and still goes there.

It is about one engine among others: only one that finds another at work for at least `ramp_s` starts slowly. Where all
engines are new, or the router is, or an engine is alone, nobody does.
"""

from __future__ import annotations

from collections.abc import Collection

from kvatlas_common.words import EngineId

SHARE_MIN = 0.1


class SlowStart:
    """Times are seconds of one monotonic clock, given by the caller. `ramp_s` 0: off."""

    def __init__(self, ramp_s: float) -> None:
        self._ramp_s = ramp_s
        self._up_since: dict[EngineId, float] = {}
        self._began: dict[EngineId, float] = {}

    def see(self, up: Collection[EngineId], now: float) -> tuple[EngineId, ...]:
        """`up`: the engines that requests may go to now. Returns those that have just come up, in order."""
        for engine in self._up_since.keys() - frozenset(up):
            del self._up_since[engine]
            self._began.pop(engine, None)
        came = tuple(sorted(e for e in up if e not in self._up_since))
        at_work = self._at_work(now)
        for engine in came:
            self._up_since[engine] = now
            if at_work:
                self._began[engine] = now
        return came

    def begin(self, engine: EngineId, now: float) -> None:
        """It has come back from an ejection."""
        if self._at_work(now, engine):
            self._began[engine] = now

    def share(self, engine: EngineId, now: float) -> float:
        """Above 0, at most 1."""
        began = self._began.get(engine)
        if began is None:
            return 1.0
        if now - began >= self._ramp_s:
            del self._began[engine]
            return 1.0
        return max(SHARE_MIN, (now - began) / self._ramp_s)

    def _at_work(self, now: float, but: EngineId | None = None) -> bool:
        if not self._ramp_s:
            return False
        return any(now - since >= self._ramp_s for engine, since in self._up_since.items() if engine != but)
