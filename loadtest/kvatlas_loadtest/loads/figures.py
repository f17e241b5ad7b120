"""A run in a few numbers.

Where a load has stages, they are measured as the published table was: the first is a warm-up and is left out, output
tokens per second are the mean over the stages, each from its first request to its last answer, and times to the first
token are over all requests.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from kvatlas_loadtest.loads.outcomes import Outcome, Run


@dataclass(frozen=True, slots=True)
class Figures:
    """Times in seconds, NaN where nothing was answered. `cached_share`: of all prompt tokens, 0..1.

    `of_oracle`: cached tokens over what a clairvoyant cache would have served, the warm-up included. `balance`: prompt
    and output tokens of the busiest engine over the mean.
    """

    policy: str
    workload: str
    seeds: int
    requests: int
    errors: int
    output_tokens_per_s: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    itl_mean_s: float
    cached_share: float
    of_oracle: float
    balance: float


def figures(run: Run) -> Figures:
    first = min((o.stage for o in run.outcomes), default=0)
    staged = any(o.stage > first for o in run.outcomes)
    measured = [o for o in run.outcomes if not staged or o.stage > first]
    whole = [o for o in measured if not o.error]
    times = sorted(o.ttft_s for o in whole if o.ttft_s is not None)
    prompt_tokens = sum(o.prompt_tokens for o in whole)
    work: dict[str, int] = defaultdict(int)
    for outcome in whole:
        work[outcome.engine or "?"] += outcome.prompt_tokens - outcome.cached_tokens + outcome.output_tokens
    engines = int(run.settings.get("engines", len(work)) or 1)
    return Figures(
        policy=run.policy,
        workload=run.workload,
        seeds=1,
        requests=len(measured),
        errors=len(measured) - len(whole),
        output_tokens_per_s=_throughput(measured),
        ttft_mean_s=fmean(times) if times else math.nan,
        ttft_p50_s=percentile(times, 0.5),
        ttft_p90_s=percentile(times, 0.9),
        ttft_p99_s=percentile(times, 0.99),
        itl_mean_s=_mean(o.itl_s for o in whole),
        cached_share=sum(o.cached_tokens for o in whole) / prompt_tokens if prompt_tokens else 0.0,
        of_oracle=sum(o.cached_tokens for o in run.outcomes) / run.oracle_cached_tokens
        if run.oracle_cached_tokens
        else 1.0,
        balance=max(work.values(), default=0) / (sum(work.values()) / engines) if work else math.nan,
    )


def medians(of_seeds: Sequence[Figures]) -> Figures:
    """One line for the runs of one policy on one load with several seeds: the median of each figure."""

    def middle(name: str) -> float:
        return float(median(getattr(each, name) for each in of_seeds))

    return Figures(
        policy=of_seeds[0].policy,
        workload=of_seeds[0].workload,
        seeds=len(of_seeds),
        requests=sum(each.requests for each in of_seeds),
        errors=sum(each.errors for each in of_seeds),
        **{name: middle(name) for name in _MEASURED},
    )


_MEASURED = (
    "output_tokens_per_s",
    "ttft_mean_s",
    "ttft_p50_s",
    "ttft_p90_s",
    "ttft_p99_s",
    "itl_mean_s",
    "cached_share",
    "of_oracle",
    "balance",
)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, by nearest rank; NaN of none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def _throughput(outcomes: Sequence[Outcome]) -> float:
    stages: dict[int, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        stages[outcome.stage].append(outcome)
    return _mean(map(_stage_throughput, stages.values()))


def _stage_throughput(outcomes: Sequence[Outcome]) -> float | None:
    ended = [o.finished_s for o in outcomes if o.finished_s is not None]
    lasted = max(ended, default=0.0) - min(o.sent_s for o in outcomes)
    return sum(o.output_tokens for o in outcomes) / lasted if lasted > 0 else None


def _mean(values: Iterable[float | None]) -> float:
    given = [value for value in values if value is not None]
    return fmean(given) if given else math.nan
