"""How gRPC's core waits for the network: by the thread that takes its events, or by threads of an event engine.

The engine is the default in Python from gRPC 1.80 on, and still called an experiment. A lookup then wakes two threads
more, which is a sixth to a third of its time (docs/performance.md). Later versions may not know these names any more
and would complain of them, so only versions that they were tried with are given them.
Source: grpc 1.85 `src/core/lib/experiments/experiments.yaml`; `GRPC_EXPERIMENTS` is read when `grpc` is imported.
"""

from __future__ import annotations

import os
from importlib import metadata

VARIABLE = "GRPC_EXPERIMENTS"
WITHOUT_ENGINE = "-event_engine_client,-event_engine_listener,-event_engine_for_all_other_endpoints"
TRIED = ((1, 80), (1, 85))  # first and last


def settle() -> None:
    """Sets the variable, unless somebody has, for this process and those it starts."""
    if TRIED[0] <= _version() <= TRIED[1]:
        os.environ.setdefault(VARIABLE, WITHOUT_ENGINE)


def _version() -> tuple[int, int]:
    major, minor, *_ = metadata.version("grpcio").split(".")
    return int(major), int(minor)
