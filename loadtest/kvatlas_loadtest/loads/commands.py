"""The commands of `python -m kvatlas_loadtest.loads` and their options."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
from rich.console import Console
from rich.status import Status
from rich.table import Table

from kvatlas_loadtest.baselines.grids import GRIDS
from kvatlas_loadtest.loads.figures import Figures, figures, medians
from kvatlas_loadtest.loads.outcomes import Run
from kvatlas_loadtest.loads.routing import POLICIES, decider
from kvatlas_loadtest.loads.settings import Crash, Settings
from kvatlas_loadtest.loads.simulation import Simulation
from kvatlas_loadtest.loads.workloads import WORKLOADS, workload

EXIT_UNUSABLE, EXIT_INTERRUPTED = 2, 130
WIDTH = 140  # where there is no terminal to ask

EPILOG = f"""workloads: {", ".join(WORKLOADS)}, or trace:FILE (Mooncake's JSONL)
policies: {", ".join(POLICIES)}
  a baseline's parameters may be given: llm-d:prefix=5:queue=1:kv=1, dynamo:weight=2, bounded-hash:bound=1.5

examples:
  the published comparison, a fifth of it, medians over three seeds:
    python -m kvatlas_loadtest.loads simulate --workload reference --policy precise,random --scale 0.2 --seeds 1,2,3
  four routers that see load 200 ms late, on every workload, with the runs written down:
    python -m kvatlas_loadtest.loads simulate --workload all --policy precise,least-load --routers 4 --scrape-ms 200 \\
      --scale 0.2 --json build/runs.json
  engine 0 dies after 30 s and is back, cold, 20 s later; one event message in a hundred is lost:
    python -m kvatlas_loadtest.loads simulate --workload agents --policy precise --crash 0@30-50 --lost-share 0.01

Columns: output tokens per second; time to the first token; time between tokens; prompt tokens served from caches, of
all and of what one infinite cache of the whole fleet would have served; work of the busiest engine over the mean.
"""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else WIDTH)
    try:
        return int(args.run(args, console))
    except (ValueError, OSError) as error:
        console.print(f"{args.command}: {error}", markup=False)
        return EXIT_UNUSABLE
    except KeyboardInterrupt:
        console.print("interrupted")
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvatlas_loadtest.loads", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    simulate = commands.add_parser(
        "simulate",
        help="run loads on a simulated fleet, in virtual time",
        description="Runs each workload with each policy on simulated engines, through the project's own index and "
        "router cores. No sockets, no clock: the same options give the same figures. Every policy sees identical "
        "arrivals.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _options(simulate)
    simulate.set_defaults(run=_simulate)
    return parser


def _options(parser: argparse.ArgumentParser) -> None:
    add, of = parser.add_argument, Settings()
    add("--workload", default="reference", metavar="NAMES", help="comma-separated, or all (default: %(default)s)")
    add("--policy", default="precise,random", metavar="NAMES", help="comma-separated, or all (default: %(default)s)")
    add("--seeds", default="1", metavar="N,N", help="figures are medians over them (default: %(default)s)")
    add("--scale", type=float, default=1.0, help="share of each load that is run, above 0 to 1 (default: 1)")
    add("--grid", action="store_true", help="a line more for the baselines: the best by p90 of a few settings")
    add("--engines", type=int, default=of.engines, help="(default: %(default)s)")
    add("--routers", type=int, default=of.routers, help="requests take turns among them (default: %(default)s)")
    add("--event-delay-ms", type=float, default=5.0, help="from published to visible in lookups (default: %(default)s)")
    add("--scrape-ms", type=float, default=200.0, help="how old the load routers see may be (default: %(default)s)")
    add("--share-ms", type=float, default=50.0, help="until routers hear of each other's requests (default: 50)")
    add("--lost-share", type=float, default=0.0, help="share of event messages that are lost (default: 0)")
    add("--no-replay", action="store_true", help="engines cannot be asked for lost messages")
    add("--crash", action="append", default=[], metavar="ENGINE@FROM-TO", help="seconds; may be given several times")
    add("--json", type=Path, metavar="FILE", help="write figures and all runs there")
    add("--quiet", action="store_true", help="no progress")


def _simulate(args: argparse.Namespace, console: Console) -> int:
    wanted = WORKLOADS if args.workload == "all" else args.workload.split(",")
    policies = POLICIES if args.policy == "all" else args.policy.split(",")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    settings = _settings(args)
    for policy in policies:
        decider(policy, lambda: 0.0)  # a wrong name shows before an hour has passed
    runs: list[Run] = []
    lines: list[Figures] = []
    began, cpu = time.monotonic(), time.process_time()
    with Status("", console=console) as status:
        for name in wanted:
            for policy in policies:
                tried: list[Figures] = []
                for variant in GRIDS.get(policy, (policy,)) if args.grid else (policy,):
                    told = None if args.quiet else status
                    of_policy = list(_runs(name, variant, seeds, args.scale, settings=settings, status=told))
                    tried.append(medians([figures(run) for run in of_policy]))
                    runs += of_policy
                lines.append(tried[0])
                best = min(tried, key=lambda line: line.ttft_p90_s)
                if best is not tried[0]:
                    lines.append(best)
    requests = sum(len(run.outcomes) for run in runs)
    spent, cpu = time.monotonic() - began, time.process_time() - cpu
    Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH).print(_table(lines))
    console.print(
        f"{requests} requests in {spent:.1f} s ({requests / spent:.0f}/s; {requests / cpu:.0f} per CPU second)"
    )
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_bytes(msgspec.json.encode({"figures": lines, "runs": runs}, order="deterministic"))
    return 0


def _runs(
    name: str, policy: str, seeds: Sequence[int], scale: float, *, settings: Settings, status: Status | None
) -> Iterator[Run]:
    for seed in seeds:
        arrivals = workload(name, seed, scale)

        def tell(done: int, of: int, seed: int = seed) -> None:
            if status is not None:
                status.update(f"{name}, {policy}, seed {seed}: {done} of {of} requests")

        tell(0, len(arrivals))
        yield Simulation(name, arrivals, policy, replace(settings, seed=seed), on_progress=tell).run()


def _settings(args: argparse.Namespace) -> Settings:
    if not 0 < args.scale <= 1:
        raise ValueError(f"--scale {args.scale} is not above 0 and at most 1")
    if args.engines < 1 or args.routers < 1:
        raise ValueError("at least one engine and one router are needed")
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


def _table(lines: Sequence[Figures]) -> Table:
    table = Table()
    for heading in ("workload", "policy"):
        table.add_column(heading)
    for heading in (
        "out tok/s",
        "TTFT mean",
        "p50",
        "p90",
        "p99 s",
        "ITL ms",
        "cached",
        "of oracle",
        "balance",
        "errors",
    ):
        table.add_column(heading, justify="right")
    for n, line in enumerate(lines):
        if n and lines[n - 1].workload != line.workload:
            table.add_section()
        table.add_row(
            line.workload,
            line.policy,
            f"{line.output_tokens_per_s:,.0f}",
            f"{line.ttft_mean_s:.3f}",
            f"{line.ttft_p50_s:.3f}",
            f"{line.ttft_p90_s:.3f}",
            f"{line.ttft_p99_s:.3f}",
            f"{line.itl_mean_s * 1000:.1f}",
            f"{line.cached_share:.1%}",
            f"{line.of_oracle:.1%}",
            f"{line.balance:.2f}",
            str(line.errors),
        )
    return table
