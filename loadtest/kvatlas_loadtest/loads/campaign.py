"""Every policy on the same loads, over several seeds, in virtual time: a job per run, in as many processes as there are
cores.

Only what a run comes to leaves its process. The longest jobs begin first, so that no core waits for the last one alone.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context

from kvatlas_loadtest.loads.checks import PERFECT, STALE
from kvatlas_loadtest.loads.figures import Figures, figures
from kvatlas_loadtest.loads.report import REFERENCE
from kvatlas_loadtest.loads.simulation import Settings, Simulation
from kvatlas_loadtest.loads.workloads import WORKLOADS

VARIANTS: Mapping[str, Settings] = {
    PERFECT: Settings(routers=1, event_delay_s=0.0, scrape_s=0.02, share_s=0.0),
    STALE: Settings(routers=4, scrape_s=0.2, share_s=0.2),
}
"""`precise` where everything is known at once, and where four routers know what the others do, and loads, 200 ms late."""

VARIED = (REFERENCE, "hot-prefix", "bursts")
"""Workloads on which late knowledge costs most."""

QUICK: Mapping[str, float] = {"reference": 0.05, "reference-fresh": 0.05}
QUICK_OTHERS = 0.15
"""Scales at which everything fits into minutes, and still shows what it is about."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run. `policy` may name a variant."""

    policy: str
    workload: str
    seed: int
    scale: float

    def run(self) -> Figures:
        settings = replace(VARIANTS.get(self.policy, Settings()), seed=self.seed)
        arrivals = WORKLOADS[self.workload](self.seed, self.scale)
        run = Simulation(self.workload, arrivals, self.policy.partition("@")[0], settings).run()
        told = replace(run, policy=self.policy, settings={**run.settings, "scale": self.scale})
        return figures(told, stages=[arrival.stage for arrival in arrivals])


def jobs(
    policies: Sequence[str], workloads: Mapping[str, float], seeds: Sequence[int], variants: Sequence[str] = ()
) -> list[Job]:
    """All of them, in the order that reports show them in. `workloads`: scales by name."""
    return [
        Job(policy, workload, seed, scale)
        for workload, scale in workloads.items()
        for policy in (*policies, *(variants if workload in VARIED else ()))
        for seed in seeds
    ]


def run(wanted: Sequence[Job], processes: int) -> Iterator[tuple[Job, Figures]]:
    """Each job and what came of it, as they end. Closing the iterator ends the processes."""
    with get_context("spawn").Pool(processes, initializer=_begin) as pool:
        yield from pool.imap_unordered(_done, sorted(wanted, key=_cost, reverse=True))


def _cost(job: Job) -> float:
    return (10 if job.workload.startswith(REFERENCE) else 1) * job.scale


def _done(job: Job) -> tuple[Job, Figures]:
    return job, job.run()


def _begin() -> None:
    """Who interrupts is heard by the process that shows the report."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
