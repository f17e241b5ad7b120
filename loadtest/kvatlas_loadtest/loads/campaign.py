"""Policies on the same loads, over several seeds, in virtual time: a job per run, in as many processes as there are
cores.

Only what a run comes to leaves its process. The longest jobs begin first, so that no core waits for the last one alone.
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from kvatlas_loadtest.loads.checks import DEAF, PERFECT, STALE
from kvatlas_loadtest.loads.figures import Figures, figures
from kvatlas_loadtest.loads.outcomes import to_json
from kvatlas_loadtest.loads.report import REFERENCE
from kvatlas_loadtest.loads.settings import Settings
from kvatlas_loadtest.loads.simulation import Simulation
from kvatlas_loadtest.loads.workloads import workload


@dataclass(frozen=True, slots=True)
class Job:
    """One run. `policy` with what follows an @ is how the report calls it. `runs_to`: folder the whole run goes to."""

    policy: str
    workload: str
    scale: float
    settings: Settings
    runs_to: Path | None = None

    def run(self) -> Figures:
        arrivals = workload(self.workload, self.settings.seed, self.scale)
        run = Simulation(self.workload, arrivals, self.policy.partition("@")[0], self.settings).run()
        run = replace(run, policy=self.policy, settings={**run.settings, "scale": self.scale})
        if self.runs_to is not None:
            name = f"{self.workload}-{self.policy}-{self.settings.seed}".replace("/", "_")
            (self.runs_to / f"{name}.json").write_bytes(to_json(run))
        return figures(run)


def variants(settings: Settings) -> Mapping[str, Settings]:
    """`precise` where everything is known at once, where four routers choose by loads 200 ms old, and where
    they hear of each other's requests as late, too.
    """
    return {
        PERFECT: replace(settings, routers=1, event_delay_s=0.0, scrape_s=0.02, share_s=0.0),
        STALE: replace(settings, routers=4, scrape_s=0.2),
        DEAF: replace(settings, routers=4, scrape_s=0.2, share_s=0.2),
    }


def jobs(
    policies: Sequence[str],
    workloads: Mapping[str, float],
    seeds: Sequence[int],
    settings: Settings,
    *,
    varied: bool = False,
    runs_to: Path | None = None,
) -> list[Job]:
    """All of them, in the order that reports show them in. `workloads`: scales by name."""
    others = variants(settings) if varied else {}
    return [
        Job(policy, name, scale, replace(others.get(policy, settings), seed=seed), runs_to)
        for name, scale in workloads.items()
        for policy in (*policies, *others)
        for seed in seeds
    ]


def run(wanted: Sequence[Job], processes: int) -> Generator[tuple[Job, Figures]]:
    """Each job and what came of it, as they end. Closing the iterator ends the processes."""
    with get_context("spawn").Pool(processes, initializer=_begin) as pool:
        yield from pool.imap_unordered(_done, sorted(wanted, key=_cost, reverse=True))


def _cost(job: Job) -> float:
    return (10 if job.workload.startswith(REFERENCE) else 1) * job.scale


def _done(job: Job) -> tuple[Job, Figures]:
    figures_of_it = job.run()
    gc.collect()  # a run is full of cycles, and makes them with the collector off: gigabytes, if it comes to ten
    return job, figures_of_it


def _begin() -> None:
    """Who interrupts is heard by the process that shows the report."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
