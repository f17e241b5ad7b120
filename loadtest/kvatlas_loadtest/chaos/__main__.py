"""`python -m kvatlas_loadtest.chaos`: faults on a deployment of real processes, and what must hold after each."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.status import Status
from rich.table import Table

from kvatlas_loadtest.chaos.books import Figures
from kvatlas_loadtest.chaos.deployment import Options
from kvatlas_loadtest.chaos.load import Shape
from kvatlas_loadtest.chaos.plan import SCENARIOS
from kvatlas_loadtest.chaos.report import HEADINGS, SECTION, Result, cells, markdown, rows
from kvatlas_loadtest.chaos.run import Outcome, Wanted, run
from kvatlas_loadtest.process import ProcessFailed
from kvatlas_loadtest.sections import inserted

EXIT_BROKEN, EXIT_UNUSABLE, EXIT_INTERRUPTED = 1, 2, 130
WRONG_SHOWN = 6  # looks at the index, the latest
WIDTH = 140  # where there is no terminal to ask
DOCUMENT = Path("docs/reliability.md")
EPILOG = "Exit status: 0 all bars held, 1 some did not, 2 it could not be run, 130 interrupted."


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else WIDTH)
    if args.list:
        for scenario in SCENARIOS:
            print(f"{scenario.name:16} {scenario.text}")
        return 0
    folder: Path = args.json.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with _Teller(console) as teller, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            outcome = runner.run(_interruptible(_wanted(args), folder, teller))
    except (ValueError, OSError, ProcessFailed) as error:
        console.print(f"chaos: {error}", markup=False)
        return EXIT_UNUSABLE
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("interrupted; every process has been ended")
        return EXIT_INTERRUPTED
    _write(args, folder, outcome)
    _show(console, outcome, folder)
    return 0 if outcome.held else EXIT_BROKEN


async def _interruptible(wanted: Wanted, folder: Path, teller: _Teller) -> Outcome:
    """SIGINT and SIGTERM cancel the run, which ends every process on its way out."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await run(wanted, folder, teller)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvatlas_loadtest.chaos", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the faults and the load (default: 0)")
    add("--only", default="", metavar="NAME,...", help="only these scenarios")
    add("--list", action="store_true", help="name the scenarios and end")
    add(
        "--replay",
        choices=("with", "without", "both"),
        default="both",
        help="replay endpoints (default: both, in turn)",
    )
    add("--store", choices=("redis", "memory"), default="redis", help="memory: one indexer, what it can stand")
    add("--rate", type=float, default=Shape().rate_per_s, help="requests a second (default: %(default)s)")
    add(
        "--duration-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="of all that is not the fault itself (default: 1)",
    )
    add("--json", type=Path, default=Path("build/chaos.json"), metavar="FILE", help="(default: %(default)s)")
    add("--write-docs", action="store_true", help=f"put the tables into {DOCUMENT}")
    return parser


def _wanted(args: argparse.Namespace) -> Wanted:
    modes = {"with": (True,), "without": (False,), "both": (True, False)}
    return Wanted(
        seed=args.seed,
        only=tuple(name for name in args.only.split(",") if name),
        modes=modes[args.replay],
        scale=args.duration_scale,
        options=Options(redis=args.store == "redis"),
        shape=replace(Shape(), rate_per_s=args.rate),
    )


class _Teller(contextlib.AbstractContextManager["_Teller"]):
    """Shows a run on the terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status = console.status("starting")

    def __enter__(self) -> _Teller:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def doing(self, text: str) -> None:
        self._status.update(text)

    def undisturbed(self, replay: bool, figures: Figures) -> None:
        self._console.print(
            f"[bold]{'with' if replay else 'without'} replay endpoints[/bold]: undisturbed, "
            f"{figures.requests} requests, {figures.precise:.1%} precise, "
            f"{figures.cached:.1%} of prompt tokens cached, first byte after {figures.first_byte_p50_s * 1000:.0f} ms"
        )

    def played(self, result: Result) -> None:
        broken = result.broken()
        named = dict(zip(HEADINGS, cells(result), strict=True))
        mark = "[red]✗[/red]" if broken else "[green]✓[/green]"
        told = ", ".join(f"{v} {k}" for k, v in named.items() if k in ("failed", "cut", "precise", "cached"))
        self._console.print(f"{mark} {named['fault']:16} {named['right again after']:>6}  {told}; {named['engines']}")
        for line in (*broken, *(w for r in result.recoveries if r.late for w in r.wrong[-WRONG_SHOWN:])):
            self._console.print(f"    {line}"[:1000], style="red", markup=False)
        for note in result.notes:
            self._console.print(f"    {note}", style="dim", markup=False)


def _write(args: argparse.Namespace, folder: Path, outcome: Outcome) -> None:
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(rows(outcome.results, outcome.troubles), indent=1) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps([_detail(r) for r in outcome.results], indent=1) + "\n")
    if args.write_docs:
        shape = Shape()
        facts = (
            f"`python -m kvatlas_loadtest.chaos --seed {args.seed}`: {outcome.seconds:.0f} s on "
            f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}; "
            f"{args.rate:g} requests a second, {shape.contexts} shared contexts."
        )
        DOCUMENT.write_text(inserted(DOCUMENT.read_text(), SECTION, markdown(outcome.results, facts)))


def _detail(result: Result) -> dict[str, Any]:
    return asdict(result) | {"broken": result.broken(), "exact_after_s": result.exact_after_s}


def _show(console: Console, outcome: Outcome, folder: Path) -> None:
    for replay in dict.fromkeys(result.fault.replay for result in outcome.results):
        table = Table(title=f"{'with' if replay else 'without'} replay endpoints", title_justify="left")
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading in ("fault", "engines") else "right")
        for result in outcome.results:
            if result.fault.replay is replay:
                table.add_row(*cells(result), style="red" if result.broken() else "")
        console.print(table)
    for trouble in outcome.troubles:
        console.print(trouble, style="red", markup=False)
    held = "all bars held" if outcome.held else "NOT all bars held"
    console.print(f"{held}, after {outcome.seconds:.0f} s; logs and details in {folder}/")


if __name__ == "__main__":
    sys.exit(main())
