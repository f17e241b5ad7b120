"""`kvatlas record`: captures what an engine publishes and answers, so that `kvatlas audit` can hold the index to it.

Requests come from a file (--requests), from a built-in workload (--generate N), or from clients that ask this command
instead of the engine (--listen HOST:PORT). They are sent one at a time, each when all events of the last one have come.
While it is recorded nobody else may use the engine. A capture holds whole prompts: treat it as you treat them.
Ctrl-C ends a recording; what was recorded until then is whole.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from kvatlas_cli.record_answers import Answer, Request
from kvatlas_cli.record_engine import RecordedEngine, RecordFailed
from kvatlas_cli.record_events import EventLog, Heard
from kvatlas_cli.record_files import CaptureExists, CaptureWriter
from kvatlas_cli.record_proxy import RecordingProxy
from kvatlas_cli.record_session import Clocks, Recorder, Tally
from kvatlas_cli.record_workload import EngineTraits, from_file, generate
from kvatlas_common.engines.asking import open_session
from kvatlas_common.engines.specs import EngineSpec, parse_engine
from kvatlas_indexer.adapters.addresses import AddressUnavailable
from kvatlas_indexer.adapters.replay_client import ReplayClient
from kvatlas_indexer.adapters.zmq_sockets import new_context
from kvatlas_indexer.adapters.zmq_source import ZmqSource, ZmqSourceOptions


@dataclass(frozen=True, slots=True)
class Plan:
    """A recording, as the command line asks for it; exactly one of `requests`, `generate` and `listen`."""

    folder: Path
    engine: EngineSpec
    zmq_listen: str | None
    topic: str
    requests: tuple[Request, ...] | None
    generate: int | None
    listen: tuple[str, int] | None
    seed: int
    reset: bool
    timeout_s: float


@dataclass(slots=True)
class Screen:
    """What the person at the terminal sees. `warnings`: all that was warned of, in order."""

    console: Console
    progress: Progress
    warnings: list[str] = field(default_factory=list)

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            self.console.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a recording came to. `failure`: why it ended before its time, or empty."""

    tally: Tally
    heard: Heard
    warnings: list[str]
    failure: str

    @property
    def auditable(self) -> bool:
        return self.tally.comparable > 0

    def as_json(self) -> dict[str, Any]:
        tally, heard = self.tally, self.heard
        return {
            "requests": tally.requests,
            "comparable": tally.comparable,
            "cached_tokens": tally.cached_tokens,
            "prompt_tokens": tally.prompt_tokens,
            "not_comparable": dict(tally.left_out),
            "failed": {str(status): count for status, count in tally.failed.items()},
            "unsettled": tally.unsettled,
            "messages": heard.count,
            "lost": heard.lost,
            "restarts": heard.restarts,
            "malformed": heard.malformed,
            "foreign": heard.foreign,
            "warnings": self.warnings,
            "failure": self.failure,
        }

    def sentences(self) -> Iterator[str]:
        tally, heard = self.tally, self.heard
        yield (
            f"{tally.requests} requests, {tally.comparable} of them comparable: {tally.cached_tokens} of "
            f"{tally.prompt_tokens} prompt tokens from the cache; {heard.count} event messages"
        )
        for why, count in tally.left_out.items():
            yield f"not comparable, {count}: {why}"
        for status, count in tally.failed.items():
            yield f"not recorded, {count}: the engine answered {status}"
        if heard.lost or heard.restarts:
            yield f"the capture has holes: {heard.lost} messages lost, {heard.restarts} times the count went back"
        if tally.unsettled:
            yield f"after {tally.unsettled} requests fewer blocks were stored than computed: events may have come late"
        if tally.retokenised:
            yield f"{tally.retokenised} prompts differ from the engine's /tokenize; what it computed was recorded"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new folder for the capture")
    parser.add_argument(
        "--engine", required=True, metavar="URL",
        help="http://host:port of the engine; options may follow: ,ranks=2,api-key-env=NAME",
    )  # fmt: skip
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--requests", type=Path, metavar="FILE", help='JSON lines {"path": ..., "body": {...}}')
    source.add_argument("--generate", type=int, metavar="N", help="N requests of a built-in workload")
    source.add_argument("--listen", metavar="HOST:PORT", help="record what clients ask here; passed on to the engine")
    events = parser.add_mutually_exclusive_group(required=True)
    events.add_argument("--events", metavar="ENDPOINT", help="tcp://host:port the engine publishes at (it binds)")
    events.add_argument(
        "--zmq-listen", metavar="ENDPOINT", help="tcp://address:port for an engine that connects to its indexer"
    )
    parser.add_argument("--replay", metavar="ENDPOINT", help="the engine's replay_endpoint: fetches what came before")
    parser.add_argument(
        "--topic", default="", help="only messages whose topic begins so, where several engines publish"
    )
    parser.add_argument("--reset", action="store_true", help="empty the engine's cache first (/reset_prefix_cache)")
    parser.add_argument("--seed", type=int, default=0, help="of the built-in workload (default: 0)")
    parser.add_argument("--timeout-s", type=float, default=600.0, metavar="S", help="of one request (default: 600)")
    parser.add_argument("--json", action="store_true", help="print what was recorded as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0 with something to audit, 1 without or when the engine failed, 2 for arguments of no use."""
    try:
        plan = plan_of(arguments)
    except (ValueError, OSError) as error:
        print(f"kvatlas record: {error}", file=sys.stderr)
        return 2
    console = Console(stderr=True, highlight=False)
    screen = Screen(console, _progress(console))
    try:
        with CaptureWriter(plan.folder) as files, screen.progress:
            summary = asyncio.run(_record(plan, files, screen))
    except CaptureExists as error:
        print(f"kvatlas record: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"kvatlas record: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(summary.as_json()))
    _conclude(console, plan, summary)
    return 0 if summary.auditable and not summary.failure else 1


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Raises `ValueError` or `OSError` that names the argument."""
    written = arguments.engine
    for name in ("events", "replay"):
        if (endpoint := getattr(arguments, name)) is not None:
            written += f",{name}={endpoint}"
    engine = parse_engine(written, environ=os.environ)
    if arguments.generate is not None and arguments.generate < 1:
        raise ValueError("--generate: at least 1 request")
    return Plan(
        folder=arguments.folder,
        engine=engine,
        zmq_listen=arguments.zmq_listen,
        topic=arguments.topic,
        requests=tuple(from_file(arguments.requests, engine.ranks)) if arguments.requests else None,
        generate=arguments.generate,
        listen=_host_port(arguments.listen) if arguments.listen else None,
        seed=arguments.seed,
        reset=arguments.reset,
        timeout_s=arguments.timeout_s,
    )


def _host_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not (colon and port.isdecimal() and int(port) < 65536):
        raise ValueError(f"--listen {text!r} is not HOST:PORT")
    return host.strip("[]") or "127.0.0.1", int(port)


async def _record(plan: Plan, files: CaptureWriter, screen: Screen) -> Summary:
    """Whatever ends the recording, all that came until then is in the files."""
    clocks = Clocks(time.time, random.Random())
    log = EventLog(files.message, clocks.now)
    async with open_session() as session:
        engine = RecordedEngine(session, plan.engine, plan.timeout_s)
        recorder = Recorder(engine, log, files, clocks=clocks, warn=screen.warn)
        failure = await _until_asked(_run(plan, recorder, session, log, screen))
        await recorder.end()
    return Summary(recorder.tally, log.heard, screen.warnings, failure)


async def _until_asked(work: Coroutine[None, None, None]) -> str:
    """Runs until it is done, or SIGINT or SIGTERM. What it failed of, or an empty string."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return ""
    except (RecordFailed, AddressUnavailable) as error:
        return str(error)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    return ""


async def _run(plan: Plan, recorder: Recorder, session: aiohttp.ClientSession, log: EventLog, screen: Screen) -> None:
    context = new_context()
    source = ZmqSource(context, list, log.on_message, ZmqSourceOptions(topic_prefix=plan.topic))
    waiting = screen.progress.add_task("waiting for the engine's events", total=None, figures="")
    try:
        _subscribe(plan, source)
        replay = ReplayClient(context) if plan.engine.replay else None
        traits = await recorder.begin(replay, reset=plan.reset)
        screen.progress.remove_task(waiting)
        if plan.listen is not None:
            await _serve(plan, plan.listen, recorder, session, screen)
        else:
            await _send(plan, traits, recorder, screen)
    finally:
        source.close()
        context.term()


def _subscribe(plan: Plan, source: ZmqSource[list[bytes]]) -> None:
    if plan.zmq_listen is not None:
        try:
            source.listen((plan.zmq_listen,), plan.engine.ranks)
        except ValueError as error:
            raise RecordFailed(f"--zmq-listen: {error}") from None
        return
    endpoints = {engine: plan.engine.events_endpoint(engine.rank) or "" for engine in plan.engine.ids}
    for why in source.set_dialled(endpoints).values():
        raise RecordFailed(f"--events: {why}")


async def _send(plan: Plan, traits: EngineTraits, recorder: Recorder, screen: Screen) -> None:
    """Requests of our own; a generated conversation goes on from the engine's answers."""
    total = plan.generate if plan.requests is None else len(plan.requests)
    task = screen.progress.add_task("recording", total=total, figures="")
    shown = _shown(screen, task, recorder)
    if plan.requests is not None:
        for request in plan.requests:
            await recorder.ask(request)
            shown()
        return
    source = generate(plan.generate or 0, traits, plan.seed)
    answer: Answer | None = None
    with contextlib.suppress(StopIteration):
        while True:
            request = next(source) if answer is None else source.send(answer)
            answer = await recorder.ask(request)
            shown()


async def _serve(
    plan: Plan, at: tuple[str, int], recorder: Recorder, session: aiohttp.ClientSession, screen: Screen
) -> None:
    task = screen.progress.add_task("recording", total=None, figures="")
    proxy = RecordingProxy(session, plan.engine.url, recorder, _shown(screen, task, recorder), plan.timeout_s)
    try:
        runner, url = await proxy.serve(*at)
    except OSError as error:
        raise RecordFailed(f"cannot listen on --listen {at[0]}:{at[1]}: {error}") from None
    try:
        screen.console.print(f"recording what is asked of {url} (Ctrl-C ends it)")
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        console=console,
    )


def _shown(screen: Screen, task: TaskID, recorder: Recorder) -> Callable[[], None]:
    def show() -> None:
        tally, heard = recorder.tally, recorder.log.heard
        share = tally.cached_tokens / tally.prompt_tokens if tally.prompt_tokens else 0.0
        failed = f", {sum(tally.failed.values())} failed" if tally.failed else ""
        figures = f"{heard.count} events, {share:.0%} cached{failed}"
        screen.progress.update(task, completed=tally.requests + sum(tally.failed.values()), figures=figures)

    return show


def _conclude(console: Console, plan: Plan, summary: Summary) -> None:
    if summary.tally.requests or not summary.failure:
        for line in summary.sentences():
            console.print(escape(line), soft_wrap=True)
    if summary.failure:
        console.print(f"[red]kvatlas record:[/] {escape(summary.failure)}", soft_wrap=True)
    if summary.auditable:
        console.print(f"hold the index to it: kvatlas audit {escape(str(plan.folder))}", soft_wrap=True)
    elif not summary.failure:
        console.print("[red]nothing was recorded that can be audited[/]")
