"""`kvatlas lookup`: which engines hold this prompt's prefix, and why the router would choose the one it would choose.

A prompt is put to the router's `/debug/route`, which decides as it would for a real request and forwards nothing. A
block key (--key), and the fleet (--engines), are put to the indexer. The answer is printed as a table, or with --json
as the server gave it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvatlas_cli.asking import ADMIN, INDEXER, Json, Refused, fetch, the_indexer, the_router

UNKNOWN = "unknown"  # nothing can be said of the engine's cache; an engine that holds nothing has 0 blocks
PIPE_COLUMNS = 140  # a table that goes to a pipe is not folded to the 80 columns of a terminal nobody looks at


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("text", nargs="?", metavar="TEXT", help="the prompt of a completion")
    what.add_argument("--messages", metavar="FILE", help="a chat body, or its list of messages, as JSON; - for stdin")
    what.add_argument("--body", metavar="FILE", help="a request body as JSON; - for stdin")
    what.add_argument("--key", metavar="KEY", help="a block key, in decimal or 0x...: who holds it")
    what.add_argument("--engines", action="store_true", help="the fleet as the indexer knows it")
    parser.add_argument("--model", metavar="NAME", help="model or adapter; may be left out where only one is served")
    parser.add_argument("--path", metavar="PATH", help="the API a --body is for, such as /v1/responses")
    parser.add_argument("--admin", default=ADMIN, metavar="URL", help="the router's admin port (default: %(default)s)")
    parser.add_argument("--indexer", default=INDEXER, metavar="URL", help="the indexer's REST (default: %(default)s)")
    parser.add_argument("--timeout-s", type=float, default=10.0, metavar="S", help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the server's JSON")


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0 with an answer, 1 if the server gave none, 2 if the question cannot be used."""
    try:
        question = None if arguments.key or arguments.engines else question_of(arguments, sys.stdin)
    except ValueError as error:
        print(f"kvatlas lookup: {error}", file=sys.stderr)
        return 2
    try:
        answer = _ask(arguments, question)
    except Refused as error:
        print(f"kvatlas lookup: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(answer))
        return 0
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=PIPE_COLUMNS)
    try:
        show = _show_route if question is not None else _show_engines if arguments.engines else _show_holders
        show(console, answer)
    except (KeyError, TypeError, AttributeError) as error:
        print(f"kvatlas lookup: the answer is of another version of KV Atlas ({error!r}); try --json", file=sys.stderr)
        return 1
    return 0


def question_of(arguments: argparse.Namespace, stdin: Any) -> bytes:
    """The request body to ask about. Raises `ValueError` that names the file and what is wrong with it."""
    if arguments.text is not None:
        return json.dumps(_with_model({"prompt": arguments.text}, arguments.model)).encode()
    name = arguments.messages or arguments.body
    try:
        text = stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from None
    try:
        body = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if arguments.messages and isinstance(body, list):
        body = {"messages": body}
    if not isinstance(body, dict):
        raise ValueError(f"{name} is not a request body: a JSON object is wanted")
    if arguments.messages and "messages" not in body:
        raise ValueError(f'{name} has no "messages"; for any other request body use --body')
    return json.dumps(_with_model(body, arguments.model)).encode()


def _with_model(body: dict[str, Any], model: str | None) -> dict[str, Any]:
    return body if model is None else {**body, "model": model}


def _ask(arguments: argparse.Namespace, question: bytes | None) -> Json:
    """Raises `Refused`."""
    if question is not None:
        router = the_router(arguments.admin)
        path = "/debug/route" + (f"?path={quote(arguments.path, safe='')}" if arguments.path else "")
        return fetch(router, path, arguments.timeout_s, question)
    indexer = the_indexer(arguments.indexer)
    path = "/v1/engines"
    if arguments.key:
        path = f"/v1/blocks/{quote(arguments.key, safe='')}"
        path += f"?model={quote(arguments.model, safe='')}" if arguments.model else ""
    return fetch(indexer, path, arguments.timeout_s)


def _show_route(console: Console, answer: Json) -> None:
    table = Table(box=None, header_style="bold")
    for name in ("", "engine"):
        table.add_column(name)
    for name in (
        "blocks",
        "cached tokens",
        "media",
        "exact",
        "to compute",
        "queued",
        "in flight",
        "TTFT ms",
        "cost ms",
    ):
        table.add_column(name, justify="left" if name in ("media", "exact") else "right")
    table.add_column("state")
    for engine in answer["engines"]:
        known = engine["cached_tokens"] is not None
        chosen = engine["engine"] == answer["engine"]
        table.add_row(
            "->" if chosen else "",
            escape(engine["engine"]),
            str(engine["matched_blocks"] or 0) if known else UNKNOWN,
            str(engine["cached_tokens"]) if known else UNKNOWN,
            _media(engine["media"]),
            _exact(engine) if known else "",
            *(str(engine[name]) for name in ("tokens_to_compute", "queued_tokens")),
            str(engine["pending"] + engine["decoding"]),
            *(f"{engine[name]:.0f}" for name in ("ttft_ms", "cost_ms")),
            escape(f"{engine['health']}, {engine['sync']}" + (", suspect" if engine["standing"] == "suspect" else "")),
            style="bold" if chosen else "",
        )
    console.print(table)
    tokens, where = answer["prompt_tokens"], answer["tokenised"]
    prompt = f"{tokens} prompt tokens, tokenised {where}" if tokens is not None else "the prompt was not tokenised"
    blocks = max((len(keys) for keys in answer["keys"].values()), default=0)
    console.print(escape(f"\nmodel {answer['model']}: {prompt}, {blocks} whole blocks"))
    console.print(escape(f"choice: {answer['engine']}, {answer['reason']}"))
    if answer["failure"]:
        console.print(escape(f"because: {answer['failure']}"))


def _exact(engine: Json) -> str:
    doubtful = engine["doubtful"] or 0
    said = "no" if engine["exact"] is False else "yes"
    return said + (f" ({doubtful} doubtful)" if doubtful else "")


def _show_holders(console: Console, answer: Json) -> None:
    if not answer["holders"]:
        console.print(escape(f"no engine that serves {answer['model']} holds block {answer['key']}"))
        return
    table = Table(box=None, header_style="bold")
    for name in ("engine", "group", "medium", "copies", "doubtful"):
        table.add_column(name, justify="right" if name in ("group", "copies") else "left")
    for holder in answer["holders"]:
        table.add_row(
            escape(holder["engine"]),
            str(holder["group"]),
            str(holder["medium"]),
            str(holder["copies"]),
            "yes" if holder["doubtful"] else "",
        )
    console.print(table)


def _show_engines(console: Console, answer: Json) -> None:
    if not answer["engines"]:
        console.print(
            "the indexer knows no engine: name them with --engine, or let them publish to --zmq-listen (kvatlas up -h)"
        )
        return
    table = Table(box=None, header_style="bold")
    for name in ("engine", "health", "sync", "models", "profile", "blocks held", "running", "waiting"):
        table.add_column(name, justify="right" if name in ("running", "waiting") else "left", overflow="fold")
    for engine in answer["engines"]:
        sync = str(engine["sync"]) + (f": {engine['inexact_reason']}" if engine["inexact_reason"] else "")
        profile = engine["profile"] or UNKNOWN
        profile += "" if engine["profile_verified"] or not engine["profile"] else " (not verified)"
        cells = (engine["id"], engine["health"], sync, _names(engine["models"]), profile, _media(engine["blocks"]))
        load = engine["load"]
        table.add_row(*(escape(str(cell)) for cell in cells), str(load["running"]), str(load["waiting"]))
    console.print(table)


def _names(names: Sequence[str], shown_max: int = 4) -> str:
    more = len(names) - shown_max
    return (", ".join(names[:shown_max]) + (f" and {more} more" if more > 0 else "")) or UNKNOWN


def _media(media: Mapping[str, int] | None) -> str:
    return ", ".join(f"{medium} {blocks}" for medium, blocks in (media or {}).items() if blocks)
