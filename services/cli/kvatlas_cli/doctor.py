"""`kvatlas doctor`: what is wrong with a live set-up, why, and the exact change to make: a flag, a variable, a value.

It asks the indexers (GET /v1/findings) and the routers (GET /debug/findings) what they have found, and looks itself at
the engines named with --engine: health, version, cache settings, data-parallel ranks, whether the event and the replay
port answer as such, and whether their tokens are those of the model's files (chat template, tokenizer). Nothing is
changed anywhere.

The same findings are in the services' logs, on /metrics (kvatlas_indexer_findings, kvatlas_router_findings, by code)
and on the indexer's page, without anyone asking.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape

from kvatlas_cli.asking import ADMIN, INDEXER, Json, Refused, Server, fetch, the_indexer, the_router
from kvatlas_cli.doctor_engines import Looked, look_at
from kvatlas_common.engines.specs import EngineSpec, parse_engine
from kvatlas_common.findings import Code, Finding, Found, Severity

EPILOG = """examples:
  both services on this machine, on their usual ports:
    kvatlas doctor
  a service elsewhere, and an engine looked at from here, with the ports the indexer dials:
    kvatlas doctor --indexer http://10.0.0.2:8081 --admin http://10.0.0.3:8082 \\
      --engine 10.0.0.5:8000,events=5557,replay=5558
  engines alone, before there is any service ('' asks none):
    kvatlas doctor --indexer '' --admin '' --engine 10.0.0.5:8000 --engine 10.0.0.6:8000 --model-files Qwen/Qwen3-32B

Findings come the worst first:
  error     requests fail, or find nothing in a cache that could serve them
  warning   it works, with less than it could have
  advice    nothing is wrong now, but something will be, or cannot be seen

Exit status: 0 nothing is wrong (there may be advice), 1 errors or warnings, 2 somebody could not be asked, so that more
may be wrong than is shown; what is wrong is shown all the same. With shared indexers ask each (--indexer again): each
tells of the engines it owns.
"""
ENGINE_CHECKS = (
    "engines answer; their versions, caches and ranks",
    "event ports and replays answer, where they are named",
    "algorithm and block size are those of the other engines",
    "tokens are those of the model's files, or of the other engines",
)
ENGINES_SHOWN = 8
COLORS = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.ADVICE: "cyan"}


@dataclass(slots=True)
class Report:
    """`asked`: who answered; `not_asked`: who did not, and why; `checked`: what was looked at."""

    found: dict[tuple[Code, str], Found] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    not_asked: dict[str, str] = field(default_factory=dict)
    checked: list[str] = field(default_factory=list)

    def add(self, found: Iterable[Found]) -> None:
        for one in found:
            self.found.setdefault(one.key, one)

    @property
    def findings(self) -> list[Found]:
        """The worst first."""
        return sorted(self.found.values(), key=lambda one: (one.finding.severity, *one.key))

    @property
    def status(self) -> int:
        if self.not_asked:
            return 2
        return int(any(one.finding.severity is not Severity.ADVICE for one in self.found.values()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--indexer", action="append", metavar="URL", help=f"an indexer's REST (default: {INDEXER}); '': none")
    add("--admin", action="append", metavar="URL", help=f"a router's admin port (default: {ADMIN}); '': none")
    add(
        "--engine",
        action="append",
        default=[],
        metavar="URL",
        help="an engine to look at itself, as the indexer is told of it: 10.0.0.5:8000,events=5557,replay=5558,ranks=2",
    )
    add("--model-files", metavar="PATH", help="the model's tokenizer files (default: where the engines say they are)")
    add("--timeout-s", type=float, default=10.0, metavar="S", help="for each answer (default: %(default)s)")
    add("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    try:
        specs = [parse_engine(text, environ=os.environ) for text in arguments.engine]
    except ValueError as error:
        print(f"kvatlas doctor: --engine: {error}", file=sys.stderr)
        return 2
    report, known = Report(), set[str]()
    indexers = [the_indexer(url) for url in arguments.indexer or [INDEXER] if url]
    routers = [the_router(url) for url in arguments.admin or [ADMIN] if url]
    if not (indexers or routers or specs):
        print("kvatlas doctor: nobody is to be asked: name an --indexer, an --admin or an --engine", file=sys.stderr)
        return 2
    for indexer in indexers:
        _ask(report, indexer, "/v1/findings", arguments.timeout_s)
        known |= _engines(report, indexer, arguments.timeout_s)
    for router in routers:
        _ask(report, router, "/debug/findings", arguments.timeout_s)
    if specs:
        looking = look_at(specs, files=arguments.model_files, timeout_s=arguments.timeout_s, environ=os.environ)
        _add_engines(report, asyncio.run(looking), known if indexers and not report.not_asked else None)
    if arguments.json:
        print(json.dumps(as_json(report)))
    else:
        width = None if sys.stdout.isatty() else 140
        show(Console(highlight=False, width=width), report)
    return report.status


def _ask(report: Report, server: Server, path: str, timeout_s: float) -> None:
    name = f"{server.port.partition(chr(39))[0]} {server.base}"
    try:
        answer = fetch(server, path, timeout_s)
        report.add([Found.of_json(said) for said in answer["findings"]])
        report.checked += [str(said) for said in answer["checked"]]
        report.asked.append(name)
    except Refused as error:
        report.not_asked[name] = str(error)
    except (KeyError, TypeError, ValueError) as error:
        report.not_asked[name] = f"the answer is of another version of KV Atlas ({error!r})"


def _engines(report: Report, indexer: Server, timeout_s: float) -> set[str]:
    """Addresses that the indexer knows."""
    try:
        answer: Json = fetch(indexer, "/v1/engines", timeout_s)
        return {str(engine["id"]).partition("/")[0] for engine in answer["engines"]}
    except (Refused, KeyError, TypeError):
        return set()  # that it cannot be asked has been said


def _add_engines(report: Report, looked: Sequence[Looked], known: set[str] | None) -> None:
    """`known`: addresses the indexers know; None: nobody can say."""
    report.checked += ENGINE_CHECKS
    for one in looked:
        name = str(one.spec.id)
        report.asked.append(f"engine {one.spec.url}")
        report.add(Found(name, finding, 0.0) for finding in one.findings)
        if known is not None and one.up and one.spec.address not in known:
            report.add([Found(name, _not_indexed(one.spec), 0.0)])


def _not_indexed(spec: EngineSpec) -> Finding:
    return Finding(
        Code.NOT_INDEXED,
        "no indexer that was asked knows it: no request is routed there by what it holds",
        "it is not listed, and publishes no events there under this address",
        f"write --engine {spec.address},events=5557,replay=5558 for the indexer, or have it publish with the topic "
        f"kv@{spec.address}@<model>",
    )


def as_json(report: Report) -> dict[str, Any]:
    return {
        "findings": [one.as_json() for one in report.findings],
        "asked": report.asked,
        "not_asked": report.not_asked,
        "checked": report.checked,
        "status": report.status,
    }


def show(console: Console, report: Report) -> None:
    for finding, about in _grouped(report.findings):
        color = COLORS[finding.severity]
        what = f"[{color}]{finding.severity.word:8}[/] [bold]{finding.code}[/]"
        console.print(f"{what}  {escape(_names(about))}", soft_wrap=True)
        for label, text in (("wrong", finding.wrong), ("cause", finding.cause), ("change", finding.change)):
            if text:
                console.print(f"  {label:7} {escape(text)}", soft_wrap=True)
        console.print()
    for name, why in report.not_asked.items():
        console.print(escape(f"not asked: {name}: {why}"), soft_wrap=True)
    asked = ", ".join(report.asked) or "nobody"
    if report.found:
        count = len(report.found)
        console.print(escape(f"{count} finding{'s' if count > 1 else ''}; asked: {asked}"), soft_wrap=True)
        return
    console.print(escape(f"nothing is wrong; asked: {asked}" if report.asked else "nothing is known"), soft_wrap=True)
    for check in dict.fromkeys(report.checked):
        console.print(escape(f"  checked: {check}"), soft_wrap=True)


def _grouped(findings: Iterable[Found]) -> list[tuple[Finding, list[str]]]:
    """What is the same for several engines is said once."""
    groups: dict[Finding, list[str]] = {}
    for one in findings:
        groups.setdefault(one.finding, []).append(one.about)
    return list(groups.items())


def _names(about: Sequence[str]) -> str:
    named = [name for name in about if name]
    more = len(named) - ENGINES_SHOWN
    return ", ".join(named[:ENGINES_SHOWN]) + (f" and {more} more" if more > 0 else "")
