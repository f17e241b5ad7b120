"""The reference benchmark as it was published: 8 engines, 150 customers with 6,000-token contexts and 5 users each,
1,200-token questions, 1,000 tokens out, 3 to 60 requests a second in steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Published:
    """`queue_mean`: requests waiting, per engine."""

    output_tokens_per_s: float
    ttft_mean_s: float
    ttft_p90_s: float
    queue_mean: float


PUBLISHED: Mapping[str, Published] = {
    "precise": Published(8730, 0.298, 0.542, 0.1),
    "estimate": Published(6944, 13.3, 31.1, 8.1),
    "random": Published(4429, 47.0, 92.6, 27.3),
}
