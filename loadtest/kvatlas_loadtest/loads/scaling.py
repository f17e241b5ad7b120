"""The same load for a smaller fleet: slower, or of shorter prompts and answers. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from kvatlas_loadtest.loads.arrivals import Arrival, Segment


def scaled(arrivals: Iterable[Arrival], *, slower: float = 1.0, tokens: float = 1.0) -> list[Arrival]:
    """Times are `slower` times as long; segments and answers are `tokens` times as long, and at least one token."""
    return [
        replace(
            arrival,
            at_s=arrival.at_s * slower,
            think_s=arrival.think_s * slower,
            prompt=tuple(
                replace(part, tokens=_length(part.tokens, tokens)) if isinstance(part, Segment) else part
                for part in arrival.prompt
            ),
            output_tokens=_length(arrival.output_tokens, tokens),
        )
        for arrival in arrivals
    ]


def _length(tokens: int, times: float) -> int:
    return max(round(tokens * times), 1)
