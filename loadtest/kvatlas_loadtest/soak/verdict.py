"""Whether something rises, read off a straight line through its samples. Pure.

The line is fitted to what came after a warm-up: caches fill then, pools of connections and arenas of memory grow to
what they are needed for. What it rises by over that time is the verdict's: more than is allowed, and more than three
standard errors of the fit (tasks go up and down with the requests in flight), is a leak.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvatlas_loadtest.bench.rows import Row
from kvatlas_loadtest.soak.samples import Sample

WARM_UP_SHARE = 0.2
MEMORY_SHARE, MEMORY_MB = 0.02, 5.0
FILES, THREADS, TASKS = 4.0, 4.0, 4.0
"""In ten minutes some leak leaves dozens; gRPC's pool takes a thread or two more when it once was short of them."""
SURE = 3.0  # standard errors
SAMPLES_MIN = 3


@dataclass(frozen=True, slots=True)
class Fit:
    """A least-squares line: `level` at its beginning, `rise` from there to its end, `error` of the rise (one sigma)."""

    level: float
    rise: float
    error: float
    seconds: float

    @property
    def per_hour(self) -> float:
        return self.rise / self.seconds * 3600

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> Fit:
        """(seconds, value) in order of time. Raises `ValueError` for fewer than three, or none of them later."""
        if len(points) < SAMPLES_MIN or any(after[0] <= before[0] for before, after in pairwise(points)):
            raise ValueError(f"no line through {len(points)} samples: let it run longer, or sample more often")
        count = len(points)
        x_mean = sum(x for x, _ in points) / count
        y_mean = sum(y for _, y in points) / count
        spread = sum((x - x_mean) ** 2 for x, _ in points)
        slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / spread
        left = sum((y - y_mean - slope * (x - x_mean)) ** 2 for x, y in points)
        seconds = points[-1][0] - points[0][0]
        error = math.sqrt(left / (count - 2) / spread) * seconds
        return cls(y_mean + slope * (points[0][0] - x_mean), slope * seconds, error, seconds)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one thing of one process. `allowed`: rise over the measured part."""

    process: str
    what: str
    unit: str
    fit: Fit
    allowed: float

    @property
    def leaks(self) -> bool:
        return self.fit.rise > self.allowed and self.fit.rise > SURE * self.fit.error

    @property
    def row(self) -> Row:
        """`value`: what it has risen by."""
        fit = self.fit
        unit = f"{self.unit} risen in {fit.seconds:.0f} s from {fit.level:,.1f} (error {fit.error:.2g})"
        return Row(
            name=f"soak_{self.process}_{self.what}".replace("-", "_"),
            value=round(fit.rise, 3),
            unit=unit,
            budget=round(self.allowed, 3),
            within=not self.leaks,
            peer=None,
            peer_value=None,
        )


def measured(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Those after the warm-up, which is the first fifth of the time."""
    if not samples:
        return samples
    begins = samples[0].at + WARM_UP_SHARE * (samples[-1].at - samples[0].at)
    return [each for each in samples if each.at >= begins]


def verdicts(samples: Mapping[str, Sequence[Sample]]) -> list[Verdict]:
    """Process -> samples in order. Raises `ValueError` where there are too few."""
    return [verdict for process, its in samples.items() for verdict in _of(process, measured(its))]


def _of(process: str, samples: Sequence[Sample]) -> list[Verdict]:
    memory = Fit.of([(s.at, s.resident_mb) for s in samples])
    found = [
        Verdict(process, "memory", "MB", memory, max(MEMORY_SHARE * memory.level, MEMORY_MB)),
        Verdict(process, "files", "open files", Fit.of([(s.at, s.files) for s in samples]), FILES),
        Verdict(process, "sockets", "sockets", Fit.of([(s.at, s.sockets) for s in samples]), FILES),
        Verdict(process, "threads", "threads", Fit.of([(s.at, s.threads) for s in samples]), THREADS),
    ]
    tasks = [(s.at, s.tasks) for s in samples if s.tasks is not None]
    if tasks:
        found.append(Verdict(process, "tasks", "asyncio tasks", Fit.of(tasks), TASKS))
    return found


def keys_most(samples: Mapping[str, Sequence[Sample]]) -> int:
    """The most block keys that all shards held together: they own different engines."""
    told = [its for its in samples.values() if its and its[0].keys is not None]
    return int(max((sum(s.keys or 0.0 for s in at) for at in zip(*told, strict=False)), default=0.0))
