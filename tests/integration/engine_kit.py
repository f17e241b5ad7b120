"""Simulated engines of tests. Those of one process share what turns text into tokens: making it takes half a second."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from kvatlas_loadtest.engine import EngineConfig, SimulatedEngine
from kvatlas_loadtest.prompting import Prompter
from kvatlas_loadtest.vocabulary import Vocabulary


@functools.lru_cache(maxsize=4)
def shared(model_path: Path) -> tuple[Prompter, Vocabulary]:
    return Prompter.load(model_path), Vocabulary.load(model_path)


def simulated_engine(config: EngineConfig, **more: Any) -> SimulatedEngine:
    """Not started."""
    return SimulatedEngine(config, *shared(config.model_path), **more)
