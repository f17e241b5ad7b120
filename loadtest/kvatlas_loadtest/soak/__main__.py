"""`python -m kvatlas_loadtest.soak`: steady load on real processes, and whether anything grows that should not.

Two indexer shards over a Valkey of its own (`--store memory`: one indexer without it), two routers, four simulated
engines in one process. Every few seconds each process's resident memory, open files and sockets, threads and asyncio
tasks are read, and the block keys in the index. The first fifth of the time is warm-up; a straight line through the
rest says what has risen.

A process leaks where, over the measured part, its memory rises by more than 2 % or 5 MB, whichever is more, or its open
files, sockets, threads or asyncio tasks by more than 4; and by more than three standard errors of the line. The index
must never hold more keys than the engines have blocks. The engines are simulated, and keep their last 10,000 batches of
events for replay: what they use is only told.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from kvatlas_loadtest.bench.rows import Row
from kvatlas_loadtest.chaos.load import Shape
from kvatlas_loadtest.process import ProcessFailed
from kvatlas_loadtest.soak.run import Soaked, Wanted, run
from kvatlas_loadtest.soak.samples import Sample
from kvatlas_loadtest.soak.verdict import Verdict, keys_most, verdicts

EXIT_LEAKS, EXIT_UNUSABLE, EXIT_INTERRUPTED = 1, 2, 130
UNJUDGED = "engines"
WIDTH = 140  # where there is no terminal to ask
SAID_EVERY_S = 30.0  # where there is none to show it on
EPILOG = """examples:
  the soak of 10 minutes:              python -m kvatlas_loadtest.soak
  does it all work, in 2 minutes:      python -m kvatlas_loadtest.soak --minutes 2
  one indexer with the memory store:   python -m kvatlas_loadtest.soak --store memory

In two minutes processes are still growing into their work; a verdict wants ten. build/soak.json has a row per process
and thing (value: what it rose by), build/soak/samples.json every sample, build/soak/*.log what the processes said.

Exit status: 0 nothing leaks and no request failed, 1 otherwise, 2 it could not be run, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else WIDTH)
    folder: Path = args.json.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with _Teller(console) as teller, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            soaked = runner.run(_interruptible(_wanted(args), folder, teller))
        found = verdicts(soaked.samples)
    except (ValueError, OSError, ProcessFailed) as error:
        console.print(f"soak: {error}", markup=False)
        return EXIT_UNUSABLE
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("interrupted; every process has been ended")
        return EXIT_INTERRUPTED
    rows = [_row(verdict) for verdict in found]
    args.json.write_text(json.dumps(rows, indent=1) + "\n")
    samples = {name: [asdict(each) for each in its] for name, its in soaked.samples.items()}
    (folder / "samples.json").write_text(json.dumps(samples) + "\n")
    return _show(Console(width=None if sys.stdout.isatty() else WIDTH), args, soaked, found)


def _parser() -> argparse.ArgumentParser:
    wanted = Wanted()
    parser = argparse.ArgumentParser(
        prog="python -m kvatlas_loadtest.soak",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=_minutes, default=wanted.minutes, help="of load, warm-up included (default: %(default)g)")
    add("--store", choices=("redis", "memory"), default="redis", help="(default: %(default)s)")
    add("--rate", type=float, default=wanted.shape.rate_per_s, help="requests a second (default: %(default)g)")
    add("--every", type=float, default=wanted.every_s, metavar="S", help="between samples (default: %(default)g)")
    add(
        "--prompts",
        type=int,
        default=wanted.prompts,
        metavar="N",
        help="distinct prompts, more than the engines have room for, asked in turn so that all sizes are steady "
        "(default: %(default)s); 0: every prompt is new, and caches fill up to their bounds first",
    )
    add("--blocks", type=int, default=wanted.blocks, help="of each engine's pool (default: %(default)s)")
    add("--seed", type=int, default=wanted.seed, help="of the load (default: %(default)s)")
    add("--json", type=Path, default=Path("build/soak.json"), metavar="FILE", help="(default: %(default)s)")
    return parser


def _minutes(text: str) -> float:
    minutes = float(text)
    if not minutes > 0:
        raise argparse.ArgumentTypeError("more than 0")
    return minutes


def _wanted(args: argparse.Namespace) -> Wanted:
    return Wanted(
        minutes=args.minutes,
        redis=args.store == "redis",
        every_s=args.every,
        prompts=args.prompts,
        blocks=args.blocks,
        seed=args.seed,
        shape=replace(Shape(), rate_per_s=args.rate),
    )


async def _interruptible(wanted: Wanted, folder: Path, teller: _Teller) -> Soaked:
    """SIGINT and SIGTERM cancel the run, which ends every process on its way out."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await run(wanted, folder, teller)


class _Teller:
    """Shows a run on the terminal; without one, a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("starting")
        self._said_at = -SAID_EVERY_S

    def __enter__(self) -> _Teller:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def doing(self, text: str) -> None:
        self._status.update(text)

    def sampled(self, at: float, of: float, requests: int, samples: dict[str, Sample]) -> None:
        memory = ", ".join(f"{name} {its.resident_mb:.0f} MB" for name, its in samples.items())
        text = f"{_clock(at)} of {_clock(of)}, {requests:,} requests; {memory}"
        self._status.update(text)
        if not self._console.is_terminal and at >= self._said_at + SAID_EVERY_S:
            self._said_at = at
            self._console.print(text, markup=False)


def _clock(seconds: float) -> str:
    return time.strftime("%M:%S", time.gmtime(seconds))


def _row(verdict: Verdict) -> Row:
    """Engines are told without a budget."""
    row = verdict.row
    if verdict.process == UNJUDGED:
        row["budget"] = row["within"] = None
    return row


def _show(console: Console, args: argparse.Namespace, soaked: Soaked, found: Sequence[Verdict]) -> int:
    table = Table()
    for heading in ("process", "what", "at the beginning", "rise", "allowed", "per hour", ""):
        table.add_column(heading, justify="left" if heading in ("process", "what", "") else "right")
    judged = [verdict for verdict in found if verdict.process != UNJUDGED]
    leaks = [verdict for verdict in judged if verdict.leaks]
    for verdict in found:
        fit, ours = verdict.fit, verdict.process != UNJUDGED
        table.add_row(
            verdict.process,
            verdict.unit if verdict.what != "memory" else "memory, MB",
            f"{fit.level:,.1f}",
            f"{fit.rise:+.2f} ± {fit.error:.2f}",
            f"{verdict.allowed:.1f}" if ours else "",
            f"{fit.per_hour:+,.1f}",
            "" if not ours else "[red]leaks" if verdict.leaks else "flat",
        )
    console.print(table)
    figures = soaked.figures
    console.print(
        f"{figures.requests:,} requests in {soaked.seconds:.0f} s, {figures.failed} failed, {figures.cut} cut, "
        f"{figures.precise:.1%} precise, {figures.cached:.1%} of prompt tokens cached; "
        f"at most {keys_most(soaked.samples):,} block keys in the index; "
        f"load {', '.join(f'{load:.1f}' for load in os.getloadavg())}",
        markup=False,
    )
    for trouble in soaked.troubles:
        console.print(trouble, style="red", markup=False)
    names = ", ".join(f"{verdict.process}'s {verdict.what}" for verdict in leaks)
    console.print(f"leaks: {names}" if leaks else "nothing leaks", style="red" if leaks else "green")
    console.print(f"rows in {args.json}, samples and logs in {args.json.with_suffix('')}/")
    return EXIT_LEAKS if leaks or soaked.troubles else 0


if __name__ == "__main__":
    sys.exit(main())
