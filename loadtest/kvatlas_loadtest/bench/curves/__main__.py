"""`python -m kvatlas_loadtest.bench.curves`: what grows with what, and what does not.

Each curve is measured in a process of its own, in bounded time (all of them: within four minutes), and read off its two
ends: a reading that says NOT is a claim that did not hold. Tables on the terminal, all figures in build/curves.json.
`KVATLAS_BENCH_TOKENIZER` names the tokenizer of the router's curve.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from kvatlas_loadtest.bench.curves.curve import SECTION, Curve, markdown
from kvatlas_loadtest.bench.rows import Options
from kvatlas_loadtest.sections import inserted

CURVES = {
    "lookup_blocks": "index:lookup_by_blocks",
    "lookup_engines": "index:lookup_by_engines",
    "ingest_engines": "index:ingest_by_engines",
    "router_tokens": "routing:router_by_tokens",
    "memory_entries": "index:memory_by_entries",
}
"""Name -> module and coroutine function."""
WITHIN_S = 180.0
DOCUMENT = Path("docs/performance.md")
EPILOG = """examples:
  all curves, and the page:          python -m kvatlas_loadtest.bench.curves --write-docs
  whether it works, in seconds:      python -m kvatlas_loadtest.bench.curves --quick
  two of them:                       python -m kvatlas_loadtest.bench.curves --only lookup_engines,router_tokens

Exit status: 0 measured and all readings hold, 1 some do not, 2 something could not be measured or asked for.
"""
EXIT_GROWS, EXIT_UNUSABLE = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kvatlas_loadtest.bench.curves",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", metavar="NAME,...", help=f"of {', '.join(CURVES)}")
    parser.add_argument("--json", type=Path, default=Path("build/curves.json"), metavar="FILE", help="(%(default)s)")
    parser.add_argument("--write-docs", action="store_true", help=f"put the tables into {DOCUMENT} (all curves only)")
    parser.add_argument("--quick", action="store_true", help="two points each, so small that they mean little")
    parser.add_argument("--measure", choices=list(CURVES), help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.measure:
        sys.stdout.buffer.write(msgspec.json.encode(_measure(asked.measure, quick=asked.quick)))
        return 0
    wanted = [name for name in asked.only.split(",") if name] or list(CURVES)
    if unknown := set(wanted) - set(CURVES):
        parser.error(f"nothing is called {', '.join(sorted(unknown))}; there is {', '.join(CURVES)}")
    if asked.write_docs and (asked.only or asked.quick):
        parser.error("--write-docs is for all curves in full")
    return _run(wanted, asked)


def _run(wanted: Sequence[str], asked: argparse.Namespace) -> int:
    console, curves = Console(stderr=True, highlight=False), list[Curve]()
    out = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    began = time.monotonic()
    for name in wanted:
        try:
            with console.status(f"{name} ..."):
                curves.append(_in_a_process(name, quick=asked.quick))
        except (subprocess.TimeoutExpired, msgspec.DecodeError) as error:
            console.print(f"{name}: {error}", style="red", markup=False)
            continue
        _show(out, curves[-1])
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    seconds = time.monotonic() - began
    facts = (
        f"`python -m kvatlas_loadtest.bench.curves`: {seconds:.0f} s on {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}; load at its end {load}."
    )
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps([curve.as_json() for curve in curves], indent=1) + "\n")
    out.print(f"{seconds:.0f} s, load {load}; figures in {asked.json}")
    if len(curves) < len(wanted):
        return EXIT_UNUSABLE
    if asked.write_docs:
        DOCUMENT.write_text(inserted(DOCUMENT.read_text(), SECTION, markdown(curves, facts)))
    return 0 if all(curve.holds for curve in curves) else EXIT_GROWS


def _in_a_process(name: str, *, quick: bool) -> Curve:
    """Raises `TimeoutExpired`, `msgspec.DecodeError` with what it said instead."""
    command = [sys.executable, "-m", "kvatlas_loadtest.bench.curves", "--measure", name, *["--quick"] * quick]
    ended = subprocess.run(command, capture_output=True, timeout=WITHIN_S, check=False)
    try:
        return msgspec.json.decode(ended.stdout, type=Curve)
    except msgspec.DecodeError:
        raise msgspec.DecodeError(f"its process said nothing: {ended.stderr.decode()[-800:]}") from None


def _measure(name: str, *, quick: bool) -> Curve:
    module, function = CURVES[name].split(":")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvatlas-curves-") as folder:
        measure = getattr(importlib.import_module(f"kvatlas_loadtest.bench.curves.{module}"), function)
        curve: Curve = asyncio.run(measure(Options(Path(folder), quick)))
    curve.seconds = time.monotonic() - began
    return curve


def _show(console: Console, curve: Curve) -> None:
    table = Table()
    heading, *rows = curve.rows()
    for text in heading:
        table.add_column(text, justify="right")
    for cells in rows:
        table.add_row(*cells)
    console.print(curve.title, style="bold", markup=False)
    console.print(table)
    for text, held in (*(((curve.note, True),) if curve.note else ()), *curve.readings()):
        console.print(f"  {text}", style="" if held else "red", markup=False)


if __name__ == "__main__":
    sys.exit(main())
