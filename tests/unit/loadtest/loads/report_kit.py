"""Figures that say what a test wants them to."""

from __future__ import annotations

from typing import Any

import pytest

from kvatlas_loadtest.loads.figures import EngineShare, Figures, QueuePoint, RatePoint, Spread, figures
from kvatlas_loadtest.loads.outcomes import Run


def told(policy: str, workload: str = "reference", seed: int = 1, ttft_s: float = 1.0, **more: object) -> Figures:
    """All times are `ttft_s`."""
    spread = Spread(100, ttft_s, ttft_s, ttft_s, ttft_s, ttft_s, ttft_s)
    nothing = figures(Run(policy, workload, seed, (), (), 0))
    said = {
        "requests": 100,
        "ttft": spread,
        "ttft_quantiles": tuple(ttft_s * n / 100 for n in range(1, 101)),
        "itl": spread,
        "output_tokens_per_s": 1000.0,
        "cached_share": 0.5,
        "oracle_share": 0.8,
        "of_oracle": 0.99,
        "engines": {"a": EngineShare(50, 1.0, 1, 1), "b": EngineShare(50, 3.0, 1, 1)},
        "queue": (QueuePoint(0.0, 0.0, 1.0, 0), QueuePoint(1.0, 2.0, 1.0, 5)),
        "rates": tuple(RatePoint(n, float(n), spread) for n in range(1, 5)),
        **more,
    }
    values = {name: said.get(name, getattr(nothing, name)) for name in Figures.__slots__}
    return Figures(**values)  # type: ignore[arg-type]


def near(value: float) -> Any:
    """For a figure among others in a tuple."""
    return pytest.approx(value)
