"""`run`: one workload in real time against a server, and the report."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shlex
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvatlas_loadtest.client import ENGINE_HEADER
from kvatlas_loadtest.loads import oracle
from kvatlas_loadtest.loads.arrivals import Arrival, checked
from kvatlas_loadtest.loads.document import Document, surroundings
from kvatlas_loadtest.loads.figures import SHED, figures, queues
from kvatlas_loadtest.loads.naming import BlockNames
from kvatlas_loadtest.loads.outcomes import Outcome, Run
from kvatlas_loadtest.loads.presets import PROFILE
from kvatlas_loadtest.loads.publish import publish
from kvatlas_loadtest.loads.real_time import CONNECTIONS_MAX, TIMEOUT_S, Player, Target
from kvatlas_loadtest.loads.rendering import Rendering
from kvatlas_loadtest.loads.report import REFERENCE
from kvatlas_loadtest.loads.scaling import scaled
from kvatlas_loadtest.loads.workloads import WORKLOADS, workload

EPILOG = """example, a tenth of the prompts' length and half the rate of a small deployment:
  python -m kvatlas_loadtest.loads run --url http://127.0.0.1:8080 --model tiny --workload hot-prefix --scale 0.1 \\
    --slower 2 --tokens 0.1 --html build/run.html

Ctrl-C ends the load and reports what was answered so far."""


def add_to(commands: Any) -> None:
    """`commands`: what `ArgumentParser.add_subparsers` returns."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "run",
        help="play a load to a server, in real time",
        description="Sends a workload to an OpenAI-compatible server, at its own times whatever the server does, and "
        "measures what a user would.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_execute)
    add = parser.add_argument
    add("--url", required=True, help="of an OpenAI-compatible server, without a path")
    add("--model", required=True, help="as the server calls it")
    add("--workload", default=REFERENCE, metavar="NAME", help=f"{', '.join(WORKLOADS)} or trace:FILE (%(default)s)")
    add("--scale", type=float, default=0.05, metavar="X", help="of the workload's length (default: %(default)s)")
    add("--slower", type=float, default=1.0, metavar="X", help="times are stretched, the rate sinks (default: 1)")
    add("--tokens", type=float, default=1.0, metavar="X", help="of the length of prompts and answers (default: 1)")
    add("--seed", type=int, default=1, help="(default: 1)")
    add("--completions", action="store_true", help="ask /v1/completions instead of /v1/chat/completions")
    add("--ignore-eos", action="store_true", help="have answers of full length (vLLM, SGLang)")
    add("--header", type=_header, action="append", default=[], metavar="NAME:VALUE", help="sent along; repeatable")
    add("--engine-header", default=ENGINE_HEADER, metavar="NAME", help="names the engine (default: %(default)s)")
    add("--timeout", type=float, default=TIMEOUT_S, metavar="SECONDS", help="(default: %(default)g)")
    add("--connections", type=int, default=CONNECTIONS_MAX, metavar="N", help="at most (default: %(default)s)")
    add("--block-size", type=int, default=16, metavar="TOKENS", help="of the engines, for the oracle (default: 16)")
    add("--label", metavar="NAME", help="what the report calls it (default: the URL)")
    add("--json", type=Path, metavar="FILE", help="write what was measured; `report` lays such files side by side")
    add("--html", type=Path, metavar="FILE", help="write the page")


def _execute(args: argparse.Namespace, console: Console) -> int:
    arrivals = scaled(workload(args.workload, args.seed, args.scale), slower=args.slower, tokens=args.tokens)
    checked(arrivals)
    extra = {"ignore_eos": True} if args.ignore_eos else {}
    target = Target(
        args.url.rstrip("/"),
        Rendering(args.model, chat=not args.completions, extra=extra),
        headers=dict(args.header),
        engine_header=args.engine_header,
        timeout_s=args.timeout,
        connections_max=args.connections,
    )
    with _Shown(len(arrivals)) as shown, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        player = Player(target, arrivals, shown.answered)
        broken_off = runner.run(_interruptible(player))
    document = _document(args, player, arrivals)
    if args.json is not None:
        document.save(args.json)
    publish(document, console, rows_to=None, page_to=args.html)
    found = document.figures[0]
    told = f"{found.requests} of {len(arrivals)} requests in {found.duration_s:.1f} s"
    print(told + (", broken off" if broken_off else ""))
    for error, times in found.errors.items():
        print(f"  {times} x {error}")
    return 0


def _document(args: argparse.Namespace, player: Player, arrivals: list[Arrival]) -> Document:
    outcomes = tuple(sorted(player.outcomes, key=lambda outcome: outcome.arrival))
    ends = max((o.finished_s for o in outcomes if o.finished_s is not None), default=0.0)
    run = Run(
        policy=args.label or args.url,
        workload=args.workload,
        seed=args.seed,
        outcomes=outcomes,
        samples=queues(outcomes, every_s=max(ends / 240, 0.05)),
        oracle_cached_tokens=_oracle(arrivals, {o.arrival for o in outcomes}, args.block_size),
        settings={"scale": args.scale, "slower": args.slower, "tokens": args.tokens},
    )
    reasons = Counter(o.reason for o in outcomes if o.reason)
    facts = {
        "command": shlex.join(["python", "-m", "kvatlas_loadtest.loads", *_secretless(sys.argv[1:])]),
        "load": f"{args.workload}, {len(arrivals)} requests, seed {args.seed}",
        "lateness": f"the client sent no request more than {player.late_max_s * 1000:.0f} ms after it was due",
        "oracle": f"counts the load's own text in blocks of {args.block_size} tokens, and not what templates add",
        "chosen by": ", ".join(f"{reason} {times}" for reason, times in reasons.most_common()) or "not told",
        **surroundings(),
    }
    return Document((figures(run, gaps_s=player.gaps_s),), facts=facts)


def _oracle(arrivals: list[Arrival], answered: set[int], block_size: int) -> int:
    """Of those that were answered. It knows the load's own text only, not what a chat template adds."""
    profile = replace(PROFILE, block_size=block_size)
    names = BlockNames(profile, arrivals)
    those = sorted(answered)
    outputs = [arrivals[index].output_tokens for index in those]
    return oracle.cached_tokens([names.of(index) for index in those], outputs, block_size)


def _secretless(argv: list[str]) -> list[str]:
    """Headers may hold keys."""
    return [
        f"{text.partition(':')[0]}:..." if before == "--header" else text
        for before, text in zip(["", *argv], argv, strict=False)
        if not text.startswith("--header=")
    ]


async def _interruptible(player: Player) -> bool:
    """Whether SIGINT or SIGTERM ended it early."""
    playing = asyncio.create_task(player.play())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, playing.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await playing
    return playing.cancelled()


class _Shown(contextlib.AbstractContextManager["_Shown"]):
    """How far it is, and how it goes."""

    def __init__(self, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("answered", total=total)
        self._failed = self._shed = 0

    def __enter__(self) -> _Shown:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def answered(self, outcome: Outcome) -> None:
        shed = outcome.error.startswith(SHED)
        self._shed += shed
        self._failed += bool(outcome.error) and not shed
        text = f"answered ({self._failed} failed, {self._shed} shed)" if self._failed or self._shed else "answered"
        self._progress.update(self._task, advance=1, description=text)


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not (name and colon):
        raise argparse.ArgumentTypeError(f"{name!r} is not NAME:VALUE")
    return name.strip(), value.strip()
