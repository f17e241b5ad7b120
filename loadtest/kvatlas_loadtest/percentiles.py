"""The one definition of a percentile that every report here uses."""

from __future__ import annotations

from collections.abc import Sequence


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that `share` (0..1) of the values do not exceed; NaN of none. `ordered` ascends."""
    if not ordered:
        return float("nan")
    return ordered[max(-int(-share * len(ordered) // 1) - 1, 0)]
