"""One request of a simulated load on its way: from its arrival to an engine, perhaps to another, to its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvatlas_common.words import EngineId
from kvatlas_loadtest.baselines.rules import Asked
from kvatlas_loadtest.loads.arrivals import Arrival
from kvatlas_loadtest.loads.naming import Named
from kvatlas_loadtest.loads.routing import Decision, Sent
from kvatlas_loadtest.sequences import EngineRequest


@dataclass(slots=True, eq=False)
class Flight:
    """One request on its way."""

    index: int
    router: int
    sent_s: float
    named: Named
    asked: Asked
    decision: Decision | None = None
    left: list[EngineId] = field(default_factory=list)  # engines still to be tried, best first
    engine: EngineId | None = None
    request: EngineRequest | None = None
    uncached: int = 0
    ticket: Sent | None = None
    first_s: float | None = None
    told: bool = False  # its router knows of the first token
    retries: int = -1

    @property
    def blocks(self) -> int:
        return -(-self.asked.prompt_tokens // self.asked.block_size)

    def new_request(self, arrival: Arrival) -> EngineRequest:
        """As an engine is given it. Tokens are zeros but those of the first block, whose hash can be verified."""
        root, tokens = self.named.root, self.named.prompt_tokens
        return EngineRequest(
            str(self.index),
            [*root, *[0] * (tokens - len(root))],
            arrival.output_tokens,
            _Chain(self.named.keys, self.asked.block_size),
            _token,
            first_extra_keys=(arrival.salt,) if arrival.salt else None,
        )


class _Chain:
    """Hands out the names of a prompt and its answer."""

    __slots__ = ("_at", "_keys", "_size")

    def __init__(self, keys: Sequence[int], size: int) -> None:
        self._keys, self._size, self._at = keys, size, 0

    def extend(self, token_ids: Sequence[int]) -> Sequence[int]:
        first = self._at
        self._at += len(token_ids) // self._size
        return self._keys[first : self._at]


_token = (0).__mul__  # every answer is zeros: nobody reads them, and a million times nothing should cost little
