"""`python -m kvatlas_loadtest.bench`: every budget measured, beside a peer where there is one.

A table on the terminal, and the rows as JSON. Exit status 0 when all was measured, within its budget or not; 1 when
something could not be; 2 for options that make no sense.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvatlas_loadtest.bench.measurements import MEASUREMENTS, Measurement, chosen
from kvatlas_loadtest.bench.rows import Row, failed

ENDS_WITHIN_S = 30.0
"""After its time a measurement ends by itself, and says so; one that does not is killed."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvatlas_loadtest.bench", description=__doc__)
    parser.add_argument("--only", default="", help=f"of {', '.join(m.name for m in MEASUREMENTS)}, or names of rows")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"), help="where the rows go (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="so small that the figures mean little: does it all work?")
    asked = parser.parse_args(argv)
    try:
        measurements = chosen([name for name in asked.only.split(",") if name])
    except ValueError as error:
        parser.error(str(error))
    console, rows = Console(stderr=True), list[Row]()
    began = time.monotonic()
    for measurement in measurements:
        with console.status(f"{measurement.name} ..."):
            rows += _measured(measurement, quick=asked.quick)
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else 160).print(_table(rows))
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"{os.cpu_count()} cores, load {load}, {time.monotonic() - began:.0f} s; rows in {asked.json}")
    return int(any("error" in row for row in rows))


def _measured(measurement: Measurement, *, quick: bool) -> list[Row]:
    """In a process of its own."""
    command = [sys.executable, "-m", "kvatlas_loadtest.bench.measurements", measurement.name]
    try:
        ended = subprocess.run(
            command + ["--quick"] * quick,
            capture_output=True,
            timeout=measurement.within_s + ENDS_WITHIN_S,
            check=False,
            text=True,
        )
        rows: list[Row] = json.loads(ended.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        said = ended.stderr[-400:] if isinstance(error, ValueError) else str(error)
        return failed(measurement.owed, f"its process said nothing: {said}")
    return rows


def _table(rows: Sequence[Row]) -> Table:
    table = Table(caption="without a budget: what explains the row above it", caption_justify="left")
    for column in ("", "value", "budget", "within", "peer", "times"):
        table.add_column(column, justify="right" if column in {"value", "budget", "times"} else "left", no_wrap=True)
    table.add_column("unit", overflow="fold")
    for row in rows:
        peer, value = row["peer_value"], row["value"]
        table.add_row(
            row["name"],
            _figure(value),
            _figure(row["budget"]),
            {True: "yes", False: "[red]no", None: ""}[row["within"]],
            f"{_figure(peer)}  {row['peer']}" if row["peer"] else "",
            f"{value / peer:.2f}" if value is not None and peer else "",
            f"[red]{row['error']}" if "error" in row else row["unit"],
        )
    return table


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
