"""`kvatlas top`: engines, what they hold and what they do, and how requests fare, as it changes.

It asks an indexer (GET /v1/engines, /v1/findings) and a router (GET /metrics of its admin port) every second. What is
shown of requests is what happened between the last two looks. With --json one look a line, for scripts; `--looks 1`
ends after the first, and shows what there has been since the services started.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from kvatlas_cli.asking import ADMIN, INDEXER, Json, Refused, Server, fetch, fetch_text, the_indexer, the_router

EPILOG = """examples:
  both services on this machine:
    kvatlas top
  a shard and a router elsewhere, every five seconds:
    kvatlas top --indexer http://10.0.0.2:8081 --admin http://10.0.0.3:8082 --interval-s 5
  the engines that hold most, once:
    kvatlas top --json --looks 1 | jq '.engines | sort_by(-.blocks.gpu) | .[:3]'
"""
COUNTED = {
    "requests": "kvatlas_router_requests_total",
    "retries": "kvatlas_router_retries_total",
    "cuts": "kvatlas_router_cuts_total",
    "fail_opens": "kvatlas_router_fail_open_total",
    "shed": "kvatlas_router_shed_total",
    "prompt_tokens": "kvatlas_router_prompt_tokens_total",
    "cached_tokens": "kvatlas_router_actual_cached_tokens_total",
    "first_bytes": "kvatlas_router_first_byte_seconds_count",
    "first_byte_s": "kvatlas_router_first_byte_seconds_sum",
}
IN_FLIGHT = "kvatlas_router_in_flight"
TROUBLES = ("retries", "cuts", "fail_opens", "shed")
BAD = {"down": "red", "unknown": "yellow", "inexact": "yellow", "syncing": "cyan"}


@dataclass(frozen=True, slots=True)
class Look:
    """What the services said at `at_s`, in seconds of any one clock. `errors`: who did not answer, and why."""

    at_s: float
    engines: Sequence[Json] = ()
    findings: Sequence[Json] = ()
    counted: Mapping[str, float] | None = None
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of one router, between two looks. None: there was nothing to tell it by."""

    requests_per_s: float | None
    in_flight: int
    first_byte_ms: float | None
    cached_share: float | None
    troubles: Mapping[str, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--indexer", default=INDEXER, metavar="URL", help="the indexer's REST (default: %(default)s); '': none")
    add("--admin", default=ADMIN, metavar="URL", help="the router's admin port (default: %(default)s); '': none")
    add("--interval-s", type=float, default=1.0, metavar="S", help="between two looks (default: %(default)s)")
    add("--looks", type=int, default=0, metavar="N", help="end after so many (default: never)")
    add("--timeout-s", type=float, default=5.0, metavar="S", help="for each answer (default: %(default)s)")
    add("--json", action="store_true", help="print each look as a line of JSON")


def run(arguments: argparse.Namespace) -> int:
    """Exit status 1 if nobody answered the last look, 2 if the question cannot be used."""
    if arguments.interval_s <= 0 or arguments.looks < 0 or not (arguments.indexer or arguments.admin):
        why = "--interval-s is above 0, --looks not below 0, and somebody is asked: --indexer or --admin"
        print(f"kvatlas top: {why}", file=sys.stderr)
        return 2
    indexer = the_indexer(arguments.indexer) if arguments.indexer else None
    router = the_router(arguments.admin) if arguments.admin else None
    looks = _looks(indexer, router, arguments)
    before, last = None, Look(0.0)
    if arguments.json:
        for before, last in looks:
            print(json.dumps(as_json(before, last)), flush=True)
    elif not sys.stdout.isatty():
        console = Console(highlight=False, width=140)
        for before, last in looks:
            console.print(shown(before, last))
    else:
        with Live(Console(highlight=False).render_str("asking ..."), auto_refresh=False, screen=True) as live:
            for before, last in looks:
                live.update(shown(before, last), refresh=True)
        Console(highlight=False).print(shown(before, last))  # what is left on the terminal
    return int(not last.engines and last.counted is None)


def _looks(
    indexer: Server | None, router: Server | None, arguments: argparse.Namespace
) -> Iterator[tuple[Look | None, Look]]:
    """(the look before, this look) until there have been enough, or Ctrl-C."""
    before: Look | None = None
    due, left = time.monotonic(), arguments.looks
    try:
        while True:
            now = look(indexer, router, arguments.timeout_s)
            yield before, now
            left -= 1
            if left == 0:
                return
            before, due = now, max(due + arguments.interval_s, time.monotonic())
            time.sleep(max(due - time.monotonic(), 0.0))
    except KeyboardInterrupt:
        return


def look(indexer: Server | None, router: Server | None, timeout_s: float) -> Look:
    engines: Sequence[Json] = ()
    findings: Sequence[Json] = ()
    counted, errors = None, list[str]()
    try:
        if indexer is not None:
            engines = fetch(indexer, "/v1/engines", timeout_s)["engines"]
            findings = fetch(indexer, "/v1/findings", timeout_s)["findings"]
    except Refused as error:
        errors.append(str(error))
    try:
        if router is not None:
            counted = counters(fetch_text(router, "/metrics", timeout_s))
            findings = [*findings, *fetch(router, "/debug/findings", timeout_s)["findings"]]
    except Refused as error:
        errors.append(str(error))
    return Look(time.monotonic(), engines, findings, counted, tuple(errors))


def counters(page: str) -> dict[str, float]:
    """What is shown of a router's metrics, each summed over its labels."""
    wanted = {name: key for key, name in COUNTED.items()} | {IN_FLIGHT: "in_flight"}
    found = dict.fromkeys(wanted.values(), 0.0)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name in wanted:
                found[wanted[sample.name]] += sample.value
    return found


def traffic(before: Look | None, now: Look) -> Traffic | None:
    """None: no router was asked, or it did not answer. Without a look before: since the router started."""
    if now.counted is None:
        return None
    past = before.counted if before is not None else None
    started_again = past is not None and now.counted["requests"] < past["requests"]
    past = None if started_again else past
    new = {key: now.counted[key] - (past[key] if past else 0.0) for key in COUNTED}
    seconds = now.at_s - before.at_s if past and before else 0.0
    return Traffic(
        requests_per_s=new["requests"] / seconds if seconds > 0 else None,
        in_flight=round(now.counted["in_flight"]),
        first_byte_ms=1e3 * new["first_byte_s"] / new["first_bytes"] if new["first_bytes"] else None,
        cached_share=new["cached_tokens"] / new["prompt_tokens"] if new["prompt_tokens"] else None,
        troubles={key: round(new[key]) for key in TROUBLES},
    )


def as_json(before: Look | None, now: Look) -> dict[str, Any]:
    router = traffic(before, now)
    return {
        "engines": list(now.engines),
        "router": asdict(router) if router else None,
        "findings": list(now.findings),
        "errors": list(now.errors),
    }


def shown(before: Look | None, now: Look) -> RenderableType:
    parts: list[RenderableType] = [_router_line(traffic(before, now))]
    if now.findings:
        codes = sorted({f"{found['code']}" for found in now.findings})
        parts.append(f"[yellow]{escape(', '.join(codes))}[/]: kvatlas doctor tells the cause and the cure")
    parts += [f"[red]{escape(error)}[/]" for error in now.errors]
    parts.append(_engine_table(now.engines, {engine["id"]: engine for engine in before.engines} if before else {}))
    return Group(*parts)


def _router_line(router: Traffic | None) -> str:
    if router is None:
        return "router: not asked"
    said = [f"{router.in_flight} in flight"]
    if router.requests_per_s is not None:
        said.append(f"{router.requests_per_s:.1f} requests/s")
    if router.first_byte_ms is not None:
        said.append(f"first byte after {router.first_byte_ms:.0f} ms on average")
    if router.cached_share is not None:
        said.append(f"{router.cached_share:.1%} of prompt tokens cached")
    said += [f"[yellow]{count} {name.replace('_', '-')}[/]" for name, count in router.troubles.items() if count]
    return "router: " + ", ".join(said)


def _engine_table(engines: Sequence[Json], before: Mapping[str, Json]) -> Table:
    table = Table(box=None, header_style="bold")
    for name in ("engine", "health", "index"):
        table.add_column(name, overflow="fold")
    for name in ("running", "waiting", "of other routers", "KV used", "blocks held", "new"):
        table.add_column(name, justify="right")
    for engine in engines:
        load, held = engine["load"], _held(engine)
        flying = load["in_flight"]
        past = _held(before[engine["id"]]) if engine["id"] in before else None
        table.add_row(
            escape(engine["id"]),
            _colored(engine["health"]),
            _colored(engine["sync"]),
            str(load["running"]),
            str(load["waiting"]),
            str(flying["prefilling"] + flying["decoding"]),
            f"{load['kv_usage']:.0%}" if load["scraped_at"] else "?",
            "?" if held is None else f"{held:,}",
            f"{held - past:+,}" if held is not None and past is not None and held != past else "",
        )
    return table


def _held(engine: Json) -> int | None:
    """Distinct blocks on all media; None: not known."""
    return None if engine["blocks"] is None else sum(engine["blocks"].values())


def _colored(word: str) -> str:
    color = BAD.get(word)
    return f"[{color}]{escape(word)}[/]" if color else escape(word)
