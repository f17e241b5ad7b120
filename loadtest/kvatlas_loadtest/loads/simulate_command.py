"""`simulate`: all policies on all workloads in virtual time, and the report."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvatlas_loadtest.loads.campaign import QUICK, QUICK_OTHERS, VARIANTS, Job, jobs, run
from kvatlas_loadtest.loads.document import Document, surroundings
from kvatlas_loadtest.loads.figures import Figures
from kvatlas_loadtest.loads.publish import publish
from kvatlas_loadtest.loads.report import REFERENCE
from kvatlas_loadtest.loads.routing import POLICIES
from kvatlas_loadtest.loads.workloads import WORKLOADS

EPILOG = """Every policy sees the same arrivals, which follow from the seed. Rows of what must hold go to --rows, what was
measured beside them (FILE with /runs.json instead of .json), which `report` makes the same report of again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--policies", type=_names(POLICIES), default=list(POLICIES), metavar="A,B", help=f"of {', '.join(POLICIES)}")
    add("--workloads", type=_names(WORKLOADS), default=list(WORKLOADS), metavar="A,B", help=f"of {', '.join(WORKLOADS)}")
    add("--scale", type=float, metavar="X", help="of the length of every workload; 1: whole (default: fit for minutes)")
    add("--seeds", type=int, default=1, metavar="N", help="how many (default: %(default)s)")
    add("--first-seed", type=int, default=1, metavar="SEED", help="the others follow it (default: %(default)s)")
    add("--no-variants", action="store_true", help="leave out several routers with late knowledge")
    add("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="(default: one per core)")
    add("--rows", type=Path, default=Path("build/loadtest.json"), metavar="FILE", help="(default: %(default)s)")
    add("--html", type=Path, metavar="FILE", help="write the page")


def execute(args: argparse.Namespace, console: Console) -> int:
    """Interrupted, it reports what it has."""
    scales = {w: args.scale or QUICK.get(w, QUICK_OTHERS) for w in args.workloads}
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    wanted = jobs(args.policies, scales, seeds, () if args.no_variants else tuple(VARIANTS))
    began = time.monotonic()
    found = _run(wanted, args.processes)
    runs = [found[job] for job in wanted if job in found]
    document = Document(
        figures=tuple(runs),
        whole=scales.get(REFERENCE) == 1.0,
        facts={
            "command": shlex.join(["python", "-m", "kvatlas_loadtest.loads", *sys.argv[1:]]),
            "seeds": ", ".join(map(str, seeds)),
            "scales": ", ".join(f"{workload} {scale:g}" for workload, scale in scales.items()),
            "runs": f"{len(runs)} of {len(wanted)}, {sum(r.requests for r in runs):,} requests in virtual time, "
            f"in {time.monotonic() - began:.0f} s",
            **_settings(runs),
            **surroundings(),
        },
    )
    document.save(args.rows.with_suffix("") / "runs.json")
    publish(document, console, rows_to=args.rows, page_to=args.html)
    print(f"{document.facts['runs']}; rows in {args.rows}" + (f", page in {args.html}" if args.html else ""))
    return 0


def _run(wanted: Sequence[Job], processes: int) -> dict[Job, Figures]:
    found: dict[Job, Figures] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    shown = Console(stderr=True)
    with (
        contextlib.suppress(KeyboardInterrupt),
        contextlib.closing(run(wanted, processes)) as ended,
        Progress(*columns, TimeRemainingColumn(), console=shown) as progress,
    ):
        task = progress.add_task("runs", total=len(wanted))
        for job, figures in ended:
            found[job] = figures
            progress.update(task, advance=1, description=f"{job.policy} on {job.workload}, seed {job.seed}")
    return found


def _settings(runs: Sequence[Figures]) -> dict[str, str]:
    """What the runs of no variant had in common."""
    if not runs:
        return {}
    told = {name: value for name, value in runs[0].settings.items() if name not in {"scale", "crashes"}}
    return {"simulated": ", ".join(f"{name} {value}" for name, value in told.items())}


class _names:  # noqa: N801 - a type of argparse
    """A list of known names, with commas."""

    def __init__(self, known: Sequence[str] | dict[str, object]) -> None:
        self._known = list(known)

    def __call__(self, text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        if unknown := [name for name in names if name not in self._known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: none of {', '.join(self._known)}")
        return names
