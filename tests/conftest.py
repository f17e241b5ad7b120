"""What all tests share: the option that refreshes transcripts, and processes that begin without compiling us again.

And no test is timed by Hypothesis: the suite runs on busy machines, where 200 ms say nothing of an example.
"""

from __future__ import annotations

import gc
import os
import sys

import pytest
from hypothesis import HealthCheck, settings

# Thousands of tests in one process leave much that lives: to walk all of it again and again is a third of their time.
gc.freeze()
gc.set_threshold(50_000, 20, 50)

settings.register_profile("busy-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy-machine")

# Where the environment forbids to keep compiled modules, each of a hundred processes would compile all of ours.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite", action="store_true", help="write the transcripts in tests/scenarios anew; read them before commit"
    )
