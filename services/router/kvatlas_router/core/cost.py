"""What a request would cost on an engine, in milliseconds: its own time to first token, and what it costs the others.

Its own: the prompts queued ahead, its own uncached tokens at the engine's rate, cached tokens brought from slower
media, and the steps of the requests that decode beside it. Engines compute prompts in the order in which they came, so
a new request delays nobody's first token but those of requests still to come; what it costs the others is

- `others_ms`: every request that decodes waits while a prompt is computed, and every step is longer by one more
  decoding request from then on. Both are felt between tokens, not before the first, and weigh less: a second of theirs
  is worth `DECODER` or `CROWD` of a second of ours. This is what makes a hot prefix spread before it hurts: the busier
  its engine, the cheaper it is to compute the prefix once more elsewhere, after which there are two engines for it;
- a share of the computing itself, `SPACE`: what is computed anew is kept anew, and pushes something out of the cache
  that somebody may come back for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvatlas_common.words import Medium
from kvatlas_router.core.rates import Speed

DECODER = 0.02
CROWD = 0.01
SPACE = 0.3


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
        return self.ttft_ms + self.others_ms

    def __str__(self) -> str:
        named = zip(self._fields, self, strict=True)
        return " ".join(f"{name.removesuffix('_ms')}={value:.0f}ms" for name, value in named)


def cost_of(
    speed: Speed,
    *,
    to_compute: int,
    queued_tokens: int = 0,
    pending: int = 0,
    decoding: int = 0,
    late_s: float = 0.0,
    transferred: Sequence[tuple[Medium, int]] = (),
    answer_tokens: float = 0.0,
) -> Cost:
    """`transferred`: cached tokens by medium. `answer_tokens`: how long answers are, on average."""
    own_s = to_compute * speed.token_s
    transfer_s = sum(speed.transfer_s(medium) * tokens for medium, tokens in transferred)
    step_s = speed.step_s + decoding * speed.decode_s
    others_s = (
        DECODER * own_s * decoding + CROWD * answer_tokens * speed.decode_s * 2 * (decoding + pending) + SPACE * own_s
    )
    return Cost(
        queue_ms=1000 * (speed.prefill_s(queued_tokens, decoding) + late_s),
        compute_ms=1000 * (own_s + speed.overhead_s),
        transfer_ms=1000 * transfer_s,
        decode_ms=1000 * step_s * (0.5 + to_compute / 2048),
        others_ms=1000 * others_s,
    )
