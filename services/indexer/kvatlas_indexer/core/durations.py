"""How long something took, counted by size: what a Prometheus histogram is made of, for paths where one is too slow."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

FINE_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0, 300.0)
SANE_S = 3600.0
"""Two clocks that are further apart than this, or in the wrong order, tell nothing."""


class Durations:
    """`bounds` in seconds, rising; what is longer than the last counts too."""

    def __init__(self, bounds: Sequence[float] = FINE_S) -> None:
        self.bounds = tuple(bounds)
        self.sum_s = 0.0
        self._counts = [0] * (len(self.bounds) + 1)

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(self.bounds, seconds)] += 1
        self.sum_s += seconds

    def add_between(self, then: float, now: float) -> None:
        """By the clocks of two machines: where they cannot both be right, nothing is counted."""
        seconds = now - then
        if 0 <= seconds < SANE_S:
            self.add(seconds)

    def cumulative(self) -> list[tuple[float, int]]:
        """(upper bound, how many took at most so long); the last bound is infinite."""
        total, found = 0, []
        for bound, count in zip((*self.bounds, float("inf")), self._counts, strict=True):
            total += count
            found.append((bound, total))
        return found
