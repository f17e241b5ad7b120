"""What the load test must show, as rows with budgets. Pure.

Rows that hold figures to the published ones have a budget only where the reference workload was run whole; else they
are told. A row whose runs are missing is left out. A *variant* of a policy (`precise@4-routers`) is the same policy
under other circumstances; it is compared with other variants, never ranked among the policies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvatlas_loadtest.bench.rows import Row, at_least, at_most, only_told
from kvatlas_loadtest.loads.comparison import (
    CACHED,
    IMBALANCE,
    OF_ORACLE,
    OUTPUT,
    PILED_UP,
    TTFT_MEAN,
    TTFT_P90,
    Comparison,
    Measure,
)
from kvatlas_loadtest.loads.figures import Figures
from kvatlas_loadtest.loads.published import PUBLISHED
from kvatlas_loadtest.loads.report import REFERENCE

PRECISE, RANDOM, LEAST_LOAD = "precise", "random", "least-load"
HOT_PREFIX, ALL_UNIQUE = "hot-prefix", "all-unique"
PERFECT, STALE, DEAF = "precise@perfect", "precise@4-routers", "precise@4-routers-late"
CALIBRATED_WITHIN = 0.25
TIMES_RANDOM = 170.0
OF_ORACLE_MIN = 0.98
WORST_MAX = 1.15
STALE_MAX = 1.10
IMBALANCE_MAX = 1.5
EVEN = 1.005
"""Policies whose figures over all workloads differ by less are even: a few seeds do not tell them apart."""


def is_variant(policy: str) -> bool:
    return "@" in policy


def check(runs: Sequence[Figures], *, whole: bool) -> list[Row]:
    """`whole`: the reference workload in its published size."""
    policies = Comparison([run for run in runs if not is_variant(run.policy)])
    return [
        *_calibration(policies, whole),
        *_reference(policies),
        *_overall(policies),
        *_balance(policies),
        *_knowledge(Comparison(runs)),
        *_beside_published(policies),
    ]


def _calibration(policies: Comparison, whole: bool) -> Iterator[Row]:
    """How far random routing on the reference workload is from its published row: the engines are calibrated by it."""
    for measure in (OUTPUT, TTFT_MEAN, TTFT_P90):
        published: float = getattr(PUBLISHED[RANDOM], measure.name)
        found = policies.median(RANDOM, REFERENCE, measure)
        if found is None:
            continue
        name, off = f"calibration_random_{measure.name}_off", abs(found.value / published - 1)
        yield at_most(name, off, "share", CALIBRATED_WITHIN) if whole else only_told(name, off, "share")


def _reference(policies: Comparison) -> Iterator[Row]:
    ours, random = (policies.median(p, REFERENCE, TTFT_P90) for p in (PRECISE, RANDOM))
    if ours is not None and random is not None:
        row = at_least("reference_p90_times_better_than_random", random.value / ours.value, "times", TIMES_RANDOM)
        yield _beside(row, "P90 TTFT of random, s", random.value)
    yield from _against_best(policies, REFERENCE, TTFT_P90, "reference_p90_of_best_baseline", 1.0)
    found = policies.median(PRECISE, REFERENCE, OF_ORACLE)
    if found is not None:
        yield at_least("reference_cached_of_oracle", found.value, "share", OF_ORACLE_MIN)


def _overall(policies: Comparison) -> Iterator[Row]:
    """Against the best baseline, whichever that is for the measure."""
    baselines = [policy for policy in policies.policies if policy != PRECISE]
    for measure in (TTFT_P90, TTFT_MEAN):
        ours, best = policies.overall(PRECISE, measure), policies.best_overall(measure, baselines)
        if ours is not None and best is not None:
            row = at_most(f"overall_{measure.name}_of_best_baseline", ours / best[1], "ratio", EVEN)
            yield _beside(row, f"{best[0]}, s", best[1])
    for measure in (TTFT_P90, TTFT_MEAN):
        ratios = {w: ratio for w in policies.workloads if (ratio := _of_best(policies, w, measure)) is not None}
        if ratios:
            worst, (times, name, value) = max(ratios.items(), key=lambda item: item[1][0])
            row = at_most(f"worst_workload_{measure.name}_of_best_baseline", times, "ratio", WORST_MAX)
            yield _beside(row, f"{name} on {worst}, s", value)


def _balance(policies: Comparison) -> Iterator[Row]:
    found = policies.median(PRECISE, HOT_PREFIX, IMBALANCE)
    if found is not None:
        yield at_most("hot_prefix_load_max_over_mean", found.value, "ratio", IMBALANCE_MAX)
    piled = policies.median(PRECISE, HOT_PREFIX, PILED_UP)
    if piled is not None:
        yield only_told("hot_prefix_piled_up_beside_idle", piled.value, "share")
    for measure in (TTFT_P90, TTFT_MEAN):
        ours, theirs = (policies.median(policy, ALL_UNIQUE, measure) for policy in (PRECISE, LEAST_LOAD))
        if ours is not None and theirs is not None:
            row = at_most(f"all_unique_{measure.name}_of_least_load", ours.value / theirs.value, "ratio", 1.0)
            yield _beside(row, "least-load, s", theirs.value)


def _knowledge(runs: Comparison) -> Iterator[Row]:
    """Several routers with old load, beside one that knows everything; told, too, is what it would cost if
    they heard of each other's requests no sooner.
    """
    for workload in runs.workloads:
        for measure in (TTFT_P90, TTFT_MEAN):
            stale, deaf, perfect = (runs.median(policy, workload, measure) for policy in (STALE, DEAF, PERFECT))
            name = f"{_plain(workload)}_4_routers_{measure.name}_of_perfect"
            if stale is not None and perfect is not None:
                row = at_most(name, stale.value / perfect.value, "ratio", STALE_MAX)
                yield _beside(row, "one router, perfect knowledge, s", perfect.value)
            if deaf is not None and perfect is not None:
                yield only_told(f"{name}_if_late", deaf.value / perfect.value, "ratio")


def _beside_published(policies: Comparison) -> Iterator[Row]:
    for policy, published in PUBLISHED.items():
        for measure in (OUTPUT, TTFT_MEAN, TTFT_P90):
            found = policies.median(policy, REFERENCE, measure)
            if found is not None:
                value: float = getattr(published, measure.name)
                row = only_told(f"reference_{policy}_{measure.name}", found.value, measure.unit)
                yield _beside(row, "published", value)
        cached = policies.median(policy, REFERENCE, CACHED)
        if cached is not None:
            yield only_told(f"reference_{policy}_cached_share", cached.value, "share")


def _against_best(policies: Comparison, workload: str, measure: Measure, name: str, budget: float) -> Iterator[Row]:
    found = _of_best(policies, workload, measure)
    if found is not None:
        ratio, best, value = found
        yield _beside(at_most(name, ratio, "ratio", budget), f"{best}, s", value)


def _of_best(policies: Comparison, workload: str, measure: Measure) -> tuple[float, str, float] | None:
    """Ours by the best baseline's, whose that is, and its figure."""
    ours = policies.median(PRECISE, workload, measure)
    best = policies.best(workload, measure, [policy for policy in policies.policies if policy != PRECISE])
    return None if ours is None or best is None else (ours.value / best[1], *best)


def _plain(name: str) -> str:
    return name.replace("-", "_")


def _beside(row: Row, peer: str, value: float) -> Row:
    return Row(
        name=row["name"], value=row["value"], unit=row["unit"], budget=row["budget"], within=row["within"],
        peer=peer, peer_value=value,
    )  # fmt: skip
