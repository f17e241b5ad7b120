"""`simulate`: policies on workloads in virtual time, and the report."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import resource
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvatlas_loadtest.baselines.grids import GRIDS
from kvatlas_loadtest.loads.campaign import Job, jobs, run
from kvatlas_loadtest.loads.document import Document, surroundings
from kvatlas_loadtest.loads.figures import Figures
from kvatlas_loadtest.loads.publish import publish
from kvatlas_loadtest.loads.report import REFERENCE
from kvatlas_loadtest.loads.routing import POLICIES, decider
from kvatlas_loadtest.loads.settings import Crash, Settings
from kvatlas_loadtest.loads.workloads import WORKLOADS, workload

EPILOG = f"""workloads: {", ".join(WORKLOADS)}, or trace:FILE (Mooncake's JSONL)
policies: {", ".join(POLICIES)}
  a baseline's parameters may be given: llm-d:prefix=5:queue=1:kv=1, dynamo:weight=2, smg:absolute=32

examples:
  the published comparison, a fifth of it, medians over three seeds:
    python -m kvatlas_loadtest.loads simulate --workload reference --policy precise,random --scale 0.2 --seeds 1,2,3
  four routers that see load 200 ms late, on every workload:
    python -m kvatlas_loadtest.loads simulate --workload all --policy precise,least-load --routers 4 --scrape-ms 200 \\
      --scale 0.2 --json build/runs.json --html build/runs.html
  engine 0 dies after 30 s and is back, cold, 20 s later; one event message in a hundred is lost:
    python -m kvatlas_loadtest.loads simulate --workload agents --policy precise --crash 0@30-50 --lost-share 0.01

Interrupted, it reports what it has."""


def add_to(commands: Any) -> None:
    """`commands`: what `ArgumentParser.add_subparsers` returns."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "simulate",
        help="run loads on a simulated fleet, in virtual time",
        description="Runs each workload with each policy on simulated engines, through the project's own index and "
        "router cores. No sockets, no clock: the same options give the same figures. Every policy sees identical "
        "arrivals.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_execute)
    _fleet_options(parser)
    add = parser.add_argument
    add(
        "--workload",
        default=REFERENCE,
        metavar="NAMES",
        help="comma-separated, NAME@SCALE; or all (default: %(default)s)",
    )
    add("--policy", default="precise,random", metavar="NAMES", help="comma-separated, or all (default: %(default)s)")
    add("--seeds", default="1", metavar="N,N", help="figures are medians over them (default: %(default)s)")
    add("--scale", type=float, default=1.0, help="share of each load that is run, above 0 to 1 (default: 1)")
    add("--grid", action="store_true", help="also a few settings of each baseline, of which the best is compared")
    add("--variants", action="store_true", help="also precise with perfect, and with four routers' late knowledge")
    add("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="(default: one per core)")
    add("--rows", type=Path, metavar="FILE", help="write what must hold, as JSON")
    add("--json", type=Path, metavar="FILE", help="write what was measured, for `report`")
    add("--html", type=Path, metavar="FILE", help="write the page")
    add("--runs", type=Path, metavar="FOLDER", help="write every run whole, request by request")
    add("--quiet", action="store_true", help="no progress")


def _fleet_options(parser: argparse.ArgumentParser) -> None:
    add, of = parser.add_argument, Settings()
    add("--engines", type=int, default=of.engines, help="(default: %(default)s)")
    add("--routers", type=int, default=of.routers, help="requests take turns among them (default: %(default)s)")
    add("--event-delay-ms", type=float, default=5.0, help="from published to visible in lookups (default: %(default)s)")
    add("--scrape-ms", type=float, default=200.0, help="how old the load routers see may be (default: %(default)s)")
    add("--share-ms", type=float, default=5.0, help="until routers hear of each other's requests (default: 5)")
    add("--lost-share", type=float, default=0.0, help="share of event messages that are lost (default: 0)")
    add("--no-replay", action="store_true", help="engines cannot be asked for lost messages")
    add("--crash", action="append", default=[], metavar="ENGINE@FROM-TO", help="seconds; may be given several times")


def _execute(args: argparse.Namespace, console: Console) -> int:
    named = POLICIES if args.policy == "all" else args.policy.split(",")
    policies = [setting for policy in named for setting in (GRIDS.get(policy, (policy,)) if args.grid else (policy,))]
    for policy in policies:
        decider(policy, lambda: 0.0)  # a wrong name shows before an hour has passed
    scales = _scales(list(WORKLOADS) if args.workload == "all" else args.workload.split(","), args.scale)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    if args.runs is not None:
        args.runs.mkdir(parents=True, exist_ok=True)
    wanted = jobs(policies, scales, seeds, _settings(args), varied=args.variants, runs_to=args.runs)
    began = time.monotonic()
    found = _run(wanted, args.processes, quiet=args.quiet)
    runs = [found[job] for job in wanted if job in found]
    told = (
        f"{len(runs)} of {len(wanted)} runs, {sum(r.requests for r in runs):,} requests in virtual time, "
        f"in {time.monotonic() - began:.0f} s, {_cpu_s():.0f} CPU seconds"
    )
    facts = {
        "command": shlex.join(["python", "-m", "kvatlas_loadtest.loads", *sys.argv[1:]]),
        "seeds": ", ".join(map(str, seeds)),
        "scales": ", ".join(f"{name} {scale:g}" for name, scale in scales.items()),
        "runs": told,
        "fleet": ", ".join(f"{name} {value}" for name, value in _settings(args).told().items() if value != ""),
        **surroundings(),
    }
    document = Document(tuple(runs), simulated=True, whole=scales.get(REFERENCE) == 1.0, facts=facts)
    if args.json is not None:
        document.save(args.json)
    publish(document, console, rows_to=args.rows, page_to=args.html)
    console.print(told)
    return 0


def _run(wanted: Sequence[Job], processes: int, *, quiet: bool) -> dict[Job, Figures]:
    found: dict[Job, Figures] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        contextlib.suppress(KeyboardInterrupt),
        contextlib.closing(run(wanted, processes)) as ended,
        Progress(*columns, console=Console(stderr=True), disable=quiet) as progress,
    ):
        task = progress.add_task("runs", total=len(wanted))
        for job, figures in ended:
            found[job] = figures
            progress.update(task, advance=1, description=f"{job.workload}, {job.policy}, seed {job.settings.seed}")
    return found


def _cpu_s() -> float:
    """Of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _scales(names: Sequence[str], scale: float) -> dict[str, float]:
    """By workload; `NAME@SCALE` has its own."""
    scales = {}
    for given in names:
        name, at, own = given.rpartition("@")
        name, its_scale = (name, float(own)) if at else (given, scale)
        if not 0 < its_scale <= 1:
            raise ValueError(f"scale {its_scale:g} of {name} is not above 0 and at most 1")
        workload(name, 0, 0.001)  # a wrong name shows before an hour has passed
        scales[name] = its_scale
    return scales


def _settings(args: argparse.Namespace) -> Settings:
    if args.engines < 1 or args.routers < 1 or args.processes < 1:
        raise ValueError("at least one engine, one router and one process are needed")
    if args.scrape_ms <= 0 or min(args.event_delay_ms, args.share_ms) < 0 or not 0 <= args.lost_share <= 1:
        raise ValueError("--scrape-ms is above 0, other times are not below 0, --lost-share is within 0..1")
    return Settings(
        engines=args.engines,
        routers=args.routers,
        event_delay_s=args.event_delay_ms / 1000,
        scrape_s=args.scrape_ms / 1000,
        share_s=args.share_ms / 1000,
        lost_share=args.lost_share,
        replay=not args.no_replay,
        crashes=tuple(_crash(text, args.engines) for text in args.crash),
    )


def _crash(text: str, engines: int) -> Crash:
    found = re.fullmatch(r"(\d+)@([\d.]+)-([\d.]+)", text)
    if found is None:
        raise ValueError(f"--crash {text!r} is not ENGINE@FROM-TO, e.g. 0@30-50")
    crash = Crash(int(found[1]), float(found[2]), float(found[3]))
    if crash.engine >= engines or crash.back_s <= crash.at_s:
        raise ValueError(f"--crash {text!r}: there are engines 0 to {engines - 1}, and it ends after it begins")
    return crash
