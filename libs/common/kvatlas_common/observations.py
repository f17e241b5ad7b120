"""What became of a request, as a router tells every indexer shard.

Three facts in order, tied together by the request's id: where it was sent and what was predicted, when its first token
came, and how it ended. They carry sizes and keys, never a prompt's text or tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from kvatlas_common.words import EngineId


class Outcome(StrEnum):
    """How a request ended, seen from the router."""

    OK = "ok"
    ERROR = "error"  # the engine answered with an error, or never answered
    CUT = "cut"  # the engine died after the response had begun
    CANCELLED = "cancelled"  # the client went away


@dataclass(frozen=True, slots=True)
class Routed:
    """The request was sent to `engine`. `keys`: hash profile name -> the prompt's uint64 block keys, in order.

    `again`: it was in flight when the router began to report to this shard, which may have been told before.
    `to_compute`: prompt tokens the engine is expected to compute, which leaves out what is on its way into its cache;
    None: all that was not predicted. `silent_s`: when the first token of an answer that does not stream is expected; 0:
    it streams.
    """

    request_id: str
    engine: EngineId
    model: str
    prompt_tokens: int
    predicted_cached_tokens: int
    keys: Mapping[str, Sequence[int]]
    again: bool = False
    to_compute: int | None = None
    silent_s: float = 0.0


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The first byte of the answer came after `ttft_s` seconds."""

    request_id: str
    engine: EngineId
    model: str
    ttft_s: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The request ended. `cached_tokens` as the engine reported it, None when it did not say.

    `comparable` tells whether it may be held against the prediction: one prompt, n = 1, caching on.
    """

    request_id: str
    engine: EngineId
    model: str
    cached_tokens: int | None
    completion_tokens: int
    comparable: bool
    outcome: Outcome


Observation = Routed | FirstToken | Finished
