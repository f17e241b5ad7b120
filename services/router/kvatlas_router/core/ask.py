"""A request, as far as choosing an engine for it is concerned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvatlas_common.words import EngineId
from kvatlas_router.core.prompt import Keys


@dataclass(frozen=True, slots=True)
class Ask:
    """`prompt_tokens` known or estimated. `keys`: hash profile name -> uint64[n], of what may be served from a cache.

    `session` names the conversation, `prefix` is how the prompt begins: empty, there is none. `home`: the engine that
    keeps what the request refers to. `streams`: the first byte of its answer is its first token.
    """

    model: str
    prompt_tokens: int
    keys: Mapping[str, Keys] = field(default_factory=dict)
    session: bytes = b""
    prefix: bytes = b""
    home: EngineId | None = None
    streams: bool = True
