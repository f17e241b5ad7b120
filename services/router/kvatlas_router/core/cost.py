"""What a request would cost on an engine, in milliseconds: its own time to first token, and what it costs the others.

Its own: the prompts queued ahead, its own uncached tokens at the engine's rate, cached tokens brought from slower
media, the steps of the requests that decode beside it, and, where the KV cache is full, the time until there is room.

Engines compute prompts in the order in which they came, so a new request delays nobody's first token but those of
requests still to come. What it costs the others, `others_ms`, is felt in four ways, each weighed by `Weights`:

- every request that decodes waits while a prompt is computed (`decoder`), and from then on every step is longer by one
  more decoding request, for them as for the new one (`crowd`);
- the fuller the KV cache, the less there is for whoever comes next; the price rises without bound as room runs out
  (`squeeze_s`). All this makes a hot prefix spread before it hurts: the busier its engine, the cheaper it is to compute
  the prefix once more elsewhere, after which there are two engines for it;
- what is computed anew is kept anew, and pushes something out that somebody may come back for (`space`);
- whoever comes while the prompt is computed waits for it, and so on until the engine has nothing to compute: the busier
  the fleet, the longer that takes, by 1 / (1 - busy) as in any queue (`congestion`).

And no prefix is worth a crowd: where an engine has more than `BOUND` times the mean of requests in flight, what it has
cached counts for less, and from half as much again for nothing (after consistent hashing with bounded loads).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Any, NamedTuple

import numpy as np

from kvatlas_common.words import Medium
from kvatlas_router.core.rates import CHUNK_TOKENS, Speed

BOUND = 1.1
VOID = 0.3
BOUND_SLACK = 4  # requests: too few to be a load
BUSY_MAX = 0.8
FULL = 0.98  # of the KV cache: from here on a request waits for room


@dataclass(frozen=True, slots=True)
class Weights:
    """What a second of the others' is worth, against a second to the first token. Fitted on simulated fleets."""

    decoder: float = 0.02
    squeeze_s: float = 0.02
    space: float = 0.3
    congestion: float = 1.0
    crowd: float = 0.02


WEIGHTS = Weights()

Floats = np.ndarray[Any, np.dtype[np.float64]]
Transferred = Sequence[tuple[Medium, int]]
"""Cached tokens by the slower medium they are on."""


class Cost(NamedTuple):
    """All in milliseconds."""

    queue_ms: float
    compute_ms: float
    transfer_ms: float
    decode_ms: float
    others_ms: float

    @property
    def ttft_ms(self) -> float:
        """Expected time to first token."""
        return self.queue_ms + self.compute_ms + self.transfer_ms + self.decode_ms

    @property
    def total_ms(self) -> float:
        return self.queue_ms + self.compute_ms + self.transfer_ms + self.decode_ms + self.others_ms

    def __str__(self) -> str:
        named = zip(self._fields, self, strict=True)
        return " ".join(f"{name.removesuffix('_ms')}={value:.0f}ms" for name, value in named)


class Ahead(NamedTuple):
    """What is at an engine already.

    `pending` requests have no first token yet, `queued_tokens` are what their prompts have still to compute; `late_s`,
    how much longer than expected the oldest takes. `kv_usage` 0..1 of `kv_tokens`; 0 tokens: the size is not known.
    """

    queued_tokens: int = 0
    pending: int = 0
    decoding: int = 0
    late_s: float = 0.0
    kv_usage: float = 0.0
    kv_tokens: int = 0

    @property
    def in_flight(self) -> int:
        return self.pending + self.decoding


NOTHING = Ahead()


_FIGURES = Struct("8d")


class Quote:
    """What any request would cost on an engine as it stands: all that does not depend on the request, worked out once.

    But for the room in the KV cache, a cost is a straight line over the tokens to compute. `answer_tokens`: how long
    answers are, on average. `busy`: the share of the fleet's engines that are computing prompts, 0..1. `share`: what
    the engine takes of its part of the load. `figures`: all this as numbers, see `Figures`.
    """

    __slots__ = ("_answer_s", "_crowd_s", "_full", "_kv_tokens", "_own_others", "_queue_s", "_speed", "_squeeze_s",
                 "_step_s", "_voided_s", "figures", "share")  # fmt: skip

    def __init__(
        self,
        speed: Speed,
        ahead: Ahead = NOTHING,
        answer_tokens: float = 0.0,
        weights: Weights = WEIGHTS,
        busy: float = 0.0,
        *,
        share: float = 1.0,
    ) -> None:
        queued, pending, decoding, late_s, kv_usage, kv_tokens = ahead
        in_flight, busy, token_s = pending + decoding, min(busy, BUSY_MAX), speed.token_s
        self.share = share
        self._speed = speed
        self._step_s = step_s = speed.step_s + decoding * speed.decode_s
        self._queue_s = queue_s = late_s + speed.prefill_s(queued, decoding)
        self._answer_s = answer_s = answer_tokens * step_s
        self._own_others = others = weights.decoder * decoding + weights.space + weights.congestion * busy / (1 - busy)
        self._voided_s = voided_s = token_s * (1 + others)
        self._crowd_s = crowd_s = weights.crowd * answer_tokens * speed.decode_s * 2 * in_flight
        self._squeeze_s = squeeze_s = weights.squeeze_s
        self._kv_tokens = kv_tokens
        wanted = queued + (pending + 1) * answer_tokens / 2
        self._full = full = kv_usage + wanted / kv_tokens if kv_tokens else 0.0
        self.figures = _FIGURES.pack(
            queue_s + speed.overhead_s + step_s / 2 + crowd_s,
            voided_s + step_s / CHUNK_TOKENS,
            full,
            1 / kv_tokens if kv_tokens else 0.0,
            answer_s,
            squeeze_s,
            voided_s,
            1000 / share,
        )

    def cost(self, to_compute: int, transferred: Transferred = (), voided: float = 0.0) -> Cost:
        """Of a request that would have so many tokens computed, and so many brought from slower media.

        `voided`: tokens by which the engine is too crowded, see `Bound`.
        """
        wait_s, squeeze_s = self._room(to_compute) if self._kv_tokens else (0.0, 0.0)
        own_s = to_compute * self._speed.token_s
        return Cost(
            queue_ms=1000 * (self._queue_s + wait_s),
            compute_ms=1000 * (own_s + self._speed.overhead_s),
            transfer_ms=1000 * self.moved_s(transferred),
            decode_ms=1000 * self._step_s * (0.5 + to_compute / CHUNK_TOKENS),
            others_ms=1000 * (self._crowd_s + self._own_others * own_s + squeeze_s + voided * self._voided_s),
        )

    def _room(self, to_compute: int) -> tuple[float, float]:
        """How long to wait for room in the KV cache, and the price of what is taken of it."""
        full = self._full + to_compute / self._kv_tokens
        if full <= FULL:
            return 0.0, self._squeeze_s * full / (1 - full)
        # All that is in use becomes free within the time an answer takes.
        return (full - FULL) * self._answer_s, self._squeeze_s * FULL / (1 - FULL)

    def moved_s(self, transferred: Transferred) -> float:
        return sum(self._speed.transfer_s(medium) * tokens for medium, tokens in transferred)


class Figures:
    """Of the quotes of many engines at once, a row for each: every array has an element for each."""

    def __init__(self, rows: Floats) -> None:
        self._rows = rows

    @classmethod
    def of(cls, packed: Iterable[bytes]) -> Figures:
        """`packed`: `Quote.figures` of each."""
        return cls(np.frombuffer(b"".join(packed)).reshape(-1, _FIGURES.size // 8))

    def totals_ms(self, to_compute: Floats, voided: Floats | None, moved_s: Floats | None) -> Floats:
        """`Quote.cost(...).total_ms` over the share. None: 0 for all."""
        flat_s, slope_s, full, per_kv_token, answer_s, squeeze_s, voided_s, ms = self._rows.T
        full = full + per_kv_token * to_compute
        used = np.minimum(full, FULL)
        total_s: Floats = flat_s + slope_s * to_compute + squeeze_s * used / (1 - used) + answer_s * (full - used)
        if voided is not None:
            total_s += voided_s * voided
        if moved_s is not None:
            total_s += moved_s
        total_s *= ms
        return total_s


class Bound(NamedTuple):
    """How many requests in flight an engine may have, and by how many more no prefix counts there any longer."""

    requests: float
    void: float

    @classmethod
    def of(cls, in_flight: Sequence[int]) -> Bound:
        """`in_flight`: of every engine of the fleet."""
        mean = sum(in_flight) / max(len(in_flight), 1) + BOUND_SLACK
        return cls(mean * BOUND, mean * VOID)

    def crowding(self, in_flight: int) -> float:
        """By how much an engine is over it: 0 up to it, 1 where no prefix counts."""
        return max(in_flight - self.requests, 0.0) / self.void
