"""The best setting of each baseline, so that it is not its defaults that lose. Pure.

A deployment has one configuration, so the best is the one with the lowest geometric mean of P90 TTFT over all
workloads. It stands beside the default as `NAME tuned`; the other settings tried are left out of the comparison. Where
the default is the best, there is nothing to add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kvatlas_loadtest.loads.comparison import TTFT_P90, Comparison
from kvatlas_loadtest.loads.figures import Figures


def tuned(runs: Sequence[Figures], grids: Mapping[str, Sequence[str]]) -> tuple[list[Figures], dict[str, str]]:
    """The runs to compare, and which setting each `NAME tuned` is. `grids`: settings by policy, the default first.

    A grid that was not run whole is left alone.
    """
    ran = {run.policy for run in runs}
    compared, chosen = list(runs), dict[str, str]()
    for policy, (default, *others) in grids.items():
        if not others or not ran.issuperset((default, *others)):
            continue
        best = Comparison(runs).best_overall(TTFT_P90, (default, *others))
        found = best[0] if best is not None else default
        name = f"{policy} tuned"
        compared = [
            replace(run, policy=name) if run.policy == found != default else run
            for run in compared
            if run.policy not in others or run.policy == found
        ]
        chosen[policy] = f"{name} is {found}" if found != default else "its defaults"
    return compared, chosen
