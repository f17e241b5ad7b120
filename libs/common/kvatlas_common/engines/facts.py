"""What an engine says about itself, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from kvatlas_common.engines.pages import CacheConfig
from kvatlas_common.fleet import Adapter, Health
from kvatlas_common.words import EngineId


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What one engine (one rank) says about itself, but for its load.

    `error`: what is wrong with it, or with the asking; "" is nothing. `process_start_s` (seconds since the
    epoch) changes when the engine restarts. `version`: of vLLM. `ranks_seen`: data-parallel ranks its metrics tell of.
    """

    id: EngineId
    health: Health = Health.UNKNOWN
    models: frozenset[str] = frozenset()
    adapters: tuple[Adapter, ...] = ()
    root: str | None = None
    max_model_len: int | None = None
    process_start_s: float | None = None
    cache: CacheConfig | None = None
    error: str = ""
    version: str | None = None
    ranks_seen: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """What an engine has computed since its process began: prompt tokens its cache did not hold, requests finished.

    None is not said.
    """

    computed_tokens: int | None = None
    finished: int | None = None
