"""Which core of gRPC processes run with."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = "import kvatlas_common, os; print(os.environ.get('GRPC_EXPERIMENTS', '')); import grpc"


@pytest.mark.parametrize(
    ("given", "used"), [(None, "-event_engine_client"), ("event_engine_client", "event_engine_client")]
)
def test_without_the_event_engine_unless_somebody_wants_something_else(given: str | None, used: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    environment |= {"GRPC_EXPERIMENTS": given} if given is not None else {}
    ran = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith(used)
    assert "Unknown experiment" not in ran.stderr, "the names are those of the version that is installed"
