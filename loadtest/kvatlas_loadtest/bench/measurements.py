"""All there is to measure, each in a process of its own: `python -m kvatlas_loadtest.bench.measurements NAME`.

One that fails loses its own rows alone, and says in them why. What it needs is imported when it is run.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from kvatlas_loadtest.bench import dynamo
from kvatlas_loadtest.bench.rows import Options, Row, failed


@dataclass(frozen=True, slots=True)
class Measurement:
    """`measure`: module and coroutine function. `rows`: those with a budget, which it must bring; it may bring others.
    `within_s`: how long it may take. `beside`: rows with a budget that it must bring where NVIDIA Dynamo is (`dynamo`).
    """

    name: str
    measure: str
    rows: tuple[str, ...]
    within_s: float = 90.0
    beside: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All it can be asked for by."""
        return self.name, *self.rows, *self.beside

    @property
    def owed(self) -> tuple[str, ...]:
        """The rows with a budget that it must bring here."""
        return self.rows + (self.beside if dynamo.python() else ())

    async def run(self, options: Options) -> list[Row]:
        """Never raises for what goes wrong: its rows say it."""
        module, function = self.measure.split(":")
        try:
            async with asyncio.timeout(self.within_s):
                measure = getattr(importlib.import_module(f"kvatlas_loadtest.bench.{module}"), function)
                rows: list[Row] = await measure(options)
        except Exception as error:  # whatever it is: the other measurements go on
            return failed(self.owed, f"{type(error).__name__}: {error}"[:500])
        missing = set(self.owed) - {row["name"] for row in rows}
        return rows + failed(sorted(missing), "it was not measured")


MEASUREMENTS = (
    Measurement("match", "lookups:in_process_rows", ("match_memory_ms",)),
    Measurement(
        "grpc_memory",
        "beside:lookup_rows",
        ("grpc_match_memory_p50_ms",),
        beside=("grpc_match_memory_of_dynamo", "grpc_match_tokens_of_dynamo"),
    ),
    Measurement("grpc_fleet", "beside:fleet_rows", ()),
    Measurement("grpc_redis", "lookups:redis_rows", ("grpc_match_redis_p50_ms",)),
    Measurement("wide", "lookups:wide_rows", ("match_redis_wide_ms",)),
    Measurement(
        "ingest_memory",
        "beside:ingest_rows",
        ("ingest_memory_blocks_per_s",),
        within_s=150.0,
        beside=("ingest_memory_of_dynamo",),
    ),
    Measurement("ingest_redis", "ingest:redis_rows", ("ingest_redis_blocks_per_s",)),
    Measurement("memory", "memory:rows", ("bytes_per_holder_memory",)),
    Measurement("redis_store", "redis_rows:rows", ("bytes_per_holder_redis",), within_s=120.0),
    Measurement("visible_memory", "visible:memory_rows", ("visible_memory_p99_ms",)),
    Measurement("visible_redis", "visible:redis_rows", ("visible_redis_p99_ms",)),
    Measurement("hash", "hashes:rows", ("hash_ms",)),
    Measurement("router", "routing:rows", ("router_added_p50_ms", "router_added_p99_ms", "router_cpu_ms_per_request")),
    Measurement("choosing", "choosing:rows", ("choose_100_engines_ms",)),
    Measurement("sharing", "sharing:rows", ()),
    Measurement("idle", "idle:rows", ("idle_cores_100_engines",)),
)


def chosen(only: Sequence[str]) -> list[Measurement]:
    """By name or by a row they bring; all, if nothing is asked for. Raises `ValueError`."""
    unknown = [name for name in only if not any(name in m.names for m in MEASUREMENTS)]
    if unknown:
        known = ", ".join(name for m in MEASUREMENTS for name in m.names)
        raise ValueError(f"nothing is called {', '.join(unknown)}; there is {known}")
    return [m for m in MEASUREMENTS if not only or set(m.names) & set(only)]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the rows of one measurement as JSON."""
    parser = argparse.ArgumentParser(prog="python -m kvatlas_loadtest.bench.measurements")
    parser.add_argument("name", choices=[m.name for m in MEASUREMENTS])
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args(argv)
    (measurement,) = chosen([asked.name])
    with (
        tempfile.TemporaryDirectory(prefix="kvatlas-bench-") as folder,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,  # as what asks has in a router
    ):
        rows = runner.run(measurement.run(Options(Path(folder), asked.quick)))
    json.dump(rows, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
