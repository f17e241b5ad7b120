"""What the index is told at its start, and what it asks of the network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from kvatlas_common.words import EngineId
from kvatlas_indexer.core.engine import Bounds
from kvatlas_indexer.core.expected import Expected
from kvatlas_indexer.core.held import Limits


@dataclass(frozen=True, slots=True)
class Rules:
    """What the index is told at its start."""

    expected: Expected = field(default_factory=Expected)
    may_reproduce: bool = True
    engine_port: int = 8000
    engine_lease_s: float = 15.0
    forget_after_s: float = 600.0  # how long a dead engine's blocks are kept, should it come back unharmed
    limits: Limits = field(default_factory=Limits)
    bounds: Bounds = field(default_factory=Bounds)


@dataclass(frozen=True, slots=True)
class Replay:
    """Ask `endpoint` for the messages of `engine` from `first_seq` on, after `delay_s`."""

    engine: EngineId
    endpoint: str
    first_seq: int
    delay_s: float


@dataclass(frozen=True, slots=True)
class StopReplay:
    engine: EngineId


Command: TypeAlias = Replay | StopReplay
