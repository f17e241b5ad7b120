"""What one run comes to: small enough to keep, whatever the size of the run. Pure.

A load in stages is measured as the published table was: the first stage is a warm-up and is left out of all times,
tokens and shares, and output tokens per second are the mean over the stages, each from its first request to its last
answer.

| figure | how |
|---|---|
| times | of requests that got a first token, however they ended; the others are counted as failed or shed |
| ITL | between tokens: measured piece by piece on the wire, the mean of each request in virtual time |
| output tokens/s | of all answers, whole or not, by the time until the last one ended |
| cached share | cached of all prompt tokens |
| of the oracle's | cached of what one infinite cache of all would have served; the warm-up included |
| load of an engine | requests it has (waiting or running), averaged over time; an engine nobody asked counts |
| queue | requests that wait for their first token at an engine, averaged over engines and time |
| piled up | share of the samples in which an engine has a queue and over 1.5 times the mean load beside an idle one |
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import floor

from kvatlas_loadtest.loads.outcomes import Outcome, Run, Sample
from kvatlas_loadtest.percentiles import percentile

QUANTILES = tuple(n / 100 for n in range(1, 101))
TIMELINE_POINTS = 120
PILED_LOAD = 1.5
SHED = ("status 429", "shed")
"""Errors that say: not now. A server that protects itself is not one that failed."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Of times in seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    longest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None of nothing."""
        ordered = sorted(values)
        if not ordered:
            return None
        p50, p90, p95, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.95, 0.99))
        return cls(len(ordered), sum(ordered) / len(ordered), p50, p90, p95, p99, ordered[-1])


@dataclass(frozen=True, slots=True)
class EngineShare:
    """What one engine had of a run. `load`: requests it had at a time, on average."""

    requests: int
    load: float
    computed_tokens: int  # of prompts, not found in its cache
    output_tokens: int


@dataclass(frozen=True, slots=True)
class QueuePoint:
    """The engines around a moment: `waiting` and `running` per engine, and the longest queue of any."""

    at_s: float
    waiting: float
    running: float
    longest: int


@dataclass(frozen=True, slots=True)
class RatePoint:
    """A stage, in which `per_s` requests came a second. Runs are laid beside each other by `step`."""

    step: int
    per_s: float
    ttft: Spread | None


@dataclass(frozen=True, slots=True)
class Figures:
    policy: str
    workload: str
    seed: int
    settings: dict[str, float | int | str]
    requests: int
    shed: int
    errors: dict[str, int]  # the others that did not come whole, by kind
    duration_s: float
    output_tokens_per_s: float
    ttft: Spread | None
    ttft_quantiles: tuple[float, ...]  # by `QUANTILES`; empty of nothing
    itl: Spread | None
    cached_share: float
    oracle_share: float
    of_oracle: float | None  # None where there was nothing to find
    engines: dict[str, EngineShare]
    queue_mean: float
    piled_up: float
    queue: tuple[QueuePoint, ...]
    rates: tuple[RatePoint, ...]  # of a load in stages

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    @property
    def imbalance(self) -> float | None:
        """Load of the most loaded engine by the mean; None where nothing was."""
        loads = [engine.load for engine in self.engines.values()]
        total = sum(loads)
        return max(loads) * len(loads) / total if total else None


def figures(run: Run, *, gaps_s: Sequence[float] | None = None) -> Figures:
    """`gaps_s`: between tokens, where each of them was measured."""
    stages = _stages(run.outcomes)
    measured = [outcome for stage in (stages[1:] or stages) for outcome in stage]
    begun = [o for o in measured if o.ttft_s is not None]
    errors = Counter(o.error for o in measured if o.error)
    times = sorted(o.ttft_s for o in begun if o.ttft_s is not None)
    oracle = run.oracle_cached_tokens
    return Figures(
        policy=run.policy,
        workload=run.workload,
        seed=run.seed,
        settings=run.settings,
        requests=len(measured),
        shed=sum(count for error, count in errors.items() if _shed(error)),
        errors={error: count for error, count in sorted(errors.items()) if not _shed(error)},
        duration_s=run.duration_s,
        output_tokens_per_s=_mean([_output_tokens_per_s(stage) for stage in (stages[1:] or stages)]),
        ttft=Spread.of(times),
        ttft_quantiles=tuple(percentile(times, share) for share in QUANTILES) if times else (),
        itl=Spread.of(gaps_s if gaps_s is not None else [o.itl_s for o in begun if o.itl_s is not None]),
        cached_share=_share(sum(o.cached_tokens for o in begun), sum(o.prompt_tokens for o in begun)),
        oracle_share=_share(oracle, sum(o.prompt_tokens for o in run.outcomes)),
        of_oracle=sum(o.cached_tokens for o in run.outcomes) / oracle if oracle else None,
        engines=_engines(run),
        queue_mean=_mean([s.waiting for s in run.samples]),
        piled_up=_piled_up(run.samples),
        queue=_timeline(run.samples),
        rates=tuple(map(_rate_of_stage, range(1, len(stages)), stages[1:])),
    )


def queues(outcomes: Sequence[Outcome], every_s: float) -> tuple[Sample, ...]:
    """Samples as a client can know them: a request waits until its first token, and then runs."""
    known = [(o, o.engine or "", o.finished_s) for o in outcomes if o.finished_s is not None]
    engines = sorted({engine for _, engine, _ in known})
    ends = max((finished for _, _, finished in known), default=0.0)
    times = [n * every_s for n in range(int(ends / every_s) + 1)]
    counts: dict[tuple[int, str], list[int]] = defaultdict(lambda: [0, 0])
    for outcome, engine, finished in known:
        first = finished if outcome.first_token_s is None else outcome.first_token_s
        for n in range(max(-floor(-outcome.sent_s / every_s), 0), floor(finished / every_s) + 1):
            counts[n, engine][n * every_s >= first] += 1
    return tuple(
        Sample(at_s, engine, running=counts[n, engine][1], waiting=counts[n, engine][0], kv_usage=0.0)
        for n, at_s in enumerate(times)
        for engine in engines
    )


def _stages(outcomes: Sequence[Outcome]) -> list[list[Outcome]]:
    stages: dict[int, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        stages[outcome.stage].append(outcome)
    return [stages[number] for number in sorted(stages)]


def _output_tokens_per_s(stage: Sequence[Outcome]) -> float:
    lasted = max((o.finished_s for o in stage if o.finished_s is not None), default=0.0) - min(o.sent_s for o in stage)
    return sum(o.output_tokens for o in stage) / lasted if lasted > 0 else 0.0


def _shed(error: str) -> bool:
    return error.startswith(SHED)


def _engines(run: Run) -> dict[str, EngineShare]:
    """Every engine that was seen, in samples or in outcomes."""
    names = {s.engine for s in run.samples} | {o.engine for o in run.outcomes if o.engine}
    by_engine: dict[str, list[Outcome]] = {name: [] for name in sorted(names)}
    for outcome in run.outcomes:
        if outcome.engine:
            by_engine[outcome.engine].append(outcome)
    span = run.duration_s or 1.0
    return {
        name: EngineShare(
            requests=len(those),
            load=sum(o.finished_s - o.sent_s for o in those if o.finished_s is not None) / span,
            computed_tokens=sum(o.prompt_tokens - o.cached_tokens for o in those),
            output_tokens=sum(o.output_tokens for o in those),
        )
        for name, those in by_engine.items()
    }


def _moments(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples of the same moment together, in order of time."""
    ordered = sorted(samples, key=lambda s: s.at_s)
    return [list(those) for _, those in groupby(ordered, key=lambda s: s.at_s)]


def _piled_up(samples: Sequence[Sample]) -> float:
    moments = _moments(samples)
    return sum(map(_piled, moments)) / len(moments) if moments else 0.0


def _piled(moment: Sequence[Sample]) -> bool:
    loads = [s.running + s.waiting for s in moment]
    bar = PILED_LOAD * sum(loads) / len(loads)
    return min(loads) == 0 and any(s.waiting > 0 and s.running + s.waiting > bar for s in moment)


def _timeline(samples: Sequence[Sample]) -> tuple[QueuePoint, ...]:
    """At most `TIMELINE_POINTS`, each of the samples around its moment."""
    if not samples:
        return ()
    begin, end = min(s.at_s for s in samples), max(s.at_s for s in samples)
    step = (end - begin) / TIMELINE_POINTS or 1.0
    bins: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        bins[min(int((sample.at_s - begin) / step), TIMELINE_POINTS - 1)].append(sample)
    return tuple(
        QueuePoint(
            at_s=begin + (number + 0.5) * step,
            waiting=_mean([s.waiting for s in those]),
            running=_mean([s.running for s in those]),
            longest=max(s.waiting for s in those),
        )
        for number, those in sorted(bins.items())
    )


def _rate_of_stage(number: int, stage: Sequence[Outcome]) -> RatePoint:
    per_s = _per_s([o.sent_s for o in stage])
    return RatePoint(number, per_s, Spread.of(o.ttft_s for o in stage if o.ttft_s is not None))


def _per_s(times: Sequence[float]) -> float:
    span = max(times) - min(times)
    return (len(times) - 1) / span if span else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
