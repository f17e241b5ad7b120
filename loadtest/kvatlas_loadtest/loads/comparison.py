"""Policies beside each other: the median over seeds, and the geometric mean over workloads. Pure.

Every policy sees the same arrivals, so what differs between two cells of a row is the policy. A policy is compared over
all workloads only if it was run on all of them. Whoever fails more than `FAILED_SHARE_MAX` of a workload's requests is
the best of nobody: the times of those it answered say too little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, log
from statistics import median

from kvatlas_loadtest.loads.figures import Figures

FAILED_SHARE_MAX = 0.01


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of a run. `unit`: as it is shown; the figure itself is in seconds, or a share 0..1."""

    name: str
    heading: str
    unit: str
    of: Callable[[Figures], float | None]
    less_is_better: bool = True

    def better(self, one: float, other: float) -> bool:
        return one < other if self.less_is_better else one > other


TTFT_MEAN = Measure("ttft_mean_s", "TTFT mean", "s", lambda f: f.ttft.mean if f.ttft else None)
TTFT_P50 = Measure("ttft_p50_s", "TTFT P50", "s", lambda f: f.ttft.p50 if f.ttft else None)
TTFT_P90 = Measure("ttft_p90_s", "TTFT P90", "s", lambda f: f.ttft.p90 if f.ttft else None)
TTFT_P99 = Measure("ttft_p99_s", "TTFT P99", "s", lambda f: f.ttft.p99 if f.ttft else None)
ITL_P50 = Measure("itl_p50_s", "ITL P50", "ms", lambda f: f.itl.p50 if f.itl else None)
ITL_P90 = Measure("itl_p90_s", "ITL P90", "ms", lambda f: f.itl.p90 if f.itl else None)
OUTPUT = Measure("output_tokens_per_s", "output", "tokens/s", lambda f: f.output_tokens_per_s, less_is_better=False)
CACHED = Measure("cached_share", "cached", "share", lambda f: f.cached_share, less_is_better=False)
OF_ORACLE = Measure("cached_of_oracle", "of the oracle's", "share", lambda f: f.of_oracle, less_is_better=False)
IMBALANCE = Measure("load_max_over_mean", "load max/mean", "ratio", lambda f: f.imbalance)
PILED_UP = Measure("piled_up", "piled up", "share", lambda f: f.piled_up)
QUEUE = Measure("queue_mean", "queue mean", "requests", lambda f: f.queue_mean)
FAILED = Measure("failed_share", "failed", "share", lambda f: f.failed / f.requests if f.requests else 0.0)
SHED = Measure("shed_share", "shed", "share", lambda f: f.shed / f.requests if f.requests else 0.0)
MEASURES = (
    TTFT_P90, TTFT_MEAN, TTFT_P50, TTFT_P99, ITL_P50, ITL_P90, OUTPUT,
    CACHED, OF_ORACLE, IMBALANCE, PILED_UP, QUEUE, FAILED, SHED,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Median:
    """Over seeds."""

    value: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Median | None:
        return cls(median(values), min(values), max(values), len(values)) if values else None


@dataclass(frozen=True)
class Comparison:
    """Of runs; `policies` and `workloads` in the order they first appear."""

    runs: Sequence[Figures]

    @cached_property
    def policies(self) -> list[str]:
        return list(dict.fromkeys(f.policy for f in self.runs))

    @cached_property
    def workloads(self) -> list[str]:
        return list(dict.fromkeys(f.workload for f in self.runs))

    @cached_property
    def _cells(self) -> dict[tuple[str, str], list[Figures]]:
        cells: dict[tuple[str, str], list[Figures]] = {}
        for run in self.runs:
            cells.setdefault((run.policy, run.workload), []).append(run)
        return {key: sorted(those, key=lambda f: f.seed) for key, those in cells.items()}

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    def cell(self, policy: str, workload: str) -> Sequence[Figures]:
        """Runs of one policy on one workload, by seed."""
        return self._cells.get((policy, workload), [])

    def median(self, policy: str, workload: str, measure: Measure) -> Median | None:
        """None where there was no such run, or it has no such figure."""
        return Median.of([value for f in self.cell(policy, workload) if (value := measure.of(f)) is not None])

    def overall(self, policy: str, measure: Measure, workloads: Iterable[str] | None = None) -> float | None:
        """The geometric mean of the medians; None where one is missing or not above 0."""
        cells = [self.median(policy, workload, measure) for workload in workloads or self.workloads]
        values = [cell.value for cell in cells if cell is not None and cell.value > 0]
        return exp(sum(map(log, values)) / len(values)) if cells and len(values) == len(cells) else None

    def sound(self, policy: str, workload: str) -> bool:
        """Whether its times can be compared with those of others."""
        failed = [self.median(policy, workload, measure) for measure in (FAILED, SHED)]
        return sum(cell.value for cell in failed if cell is not None) <= FAILED_SHARE_MAX

    def best(self, workload: str, measure: Measure, among: Iterable[str] | None = None) -> tuple[str, float] | None:
        """Who has the best median, and which."""
        found: tuple[str, float] | None = None
        for policy in among if among is not None else self.policies:
            cell = self.median(policy, workload, measure)
            if cell is None or not self.sound(policy, workload):
                continue
            if found is None or measure.better(cell.value, found[1]):
                found = policy, cell.value
        return found

    def best_overall(self, measure: Measure, among: Iterable[str] | None = None) -> tuple[str, float] | None:
        """Who has the best geometric mean, and which."""
        found: tuple[str, float] | None = None
        for policy in among if among is not None else self.policies:
            value = self.overall(policy, measure)
            if value is None or not all(self.sound(policy, workload) for workload in self.workloads):
                continue
            if found is None or measure.better(value, found[1]):
                found = policy, value
        return found
