"""Figures by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvatlas_loadtest.loads.figures import EngineShare, Spread, figures, queues
from kvatlas_loadtest.loads.outcomes import Outcome, Run, Sample


def outcome(sent: float, first: float | None, finished: float, engine: str | None = "a", **more: object) -> Outcome:
    known = {"arrival": 0, "prompt_tokens": 100, "cached_tokens": 60, "output_tokens": 11, **more}
    return Outcome(sent_s=sent, first_token_s=first, finished_s=finished, engine=engine, **known)  # type: ignore[arg-type]


def run(*outcomes: Outcome, samples: tuple[Sample, ...] = (), oracle: int = 0) -> Run:
    return Run("precise", "reference", 3, outcomes, samples, oracle)


def test_times_tokens_and_shares() -> None:
    found = figures(
        run(
            outcome(0.0, 0.2, 1.2),
            outcome(1.0, 1.4, 3.4, "b", cached_tokens=0),
            outcome(2.0, 2.6, 5.0, error="cut", output_tokens=5),
            outcome(2.0, None, 2.1, None, error="status 429", prompt_tokens=0, cached_tokens=0, output_tokens=0),
            outcome(2.0, None, 2.1, None, error="timeout", prompt_tokens=0, cached_tokens=0, output_tokens=0),
            oracle=160,
        )
    )
    assert (found.policy, found.workload, found.seed) == ("precise", "reference", 3)
    assert (found.requests, found.shed, found.failed, found.errors) == (5, 1, 2, {"cut": 1, "timeout": 1})
    assert found.ttft is not None
    assert found.itl is not None
    assert (found.ttft.count, found.ttft.mean) == pytest.approx((3, 0.4))
    assert (found.ttft.p50, found.ttft.p90, found.ttft.longest) == pytest.approx((0.4, 0.6, 0.6))
    assert (found.itl.p50, found.itl.longest) == pytest.approx((0.2, 0.6))  # 0.1, 0.2, 0.6
    assert (found.duration_s, found.output_tokens_per_s) == (5.0, (11 + 11 + 5) / 5)
    assert (found.cached_share, found.oracle_share, found.of_oracle) == (0.4, 160 / 300, 0.75)
    assert (len(found.ttft_quantiles), found.ttft_quantiles[-1]) == pytest.approx((100, 0.6))


def test_gaps_that_were_measured_are_what_counts() -> None:
    found = figures(run(outcome(0.0, 0.2, 1.2)), gaps_s=[0.01, 0.03])
    assert found.itl == Spread(2, 0.02, 0.01, 0.03, 0.03, 0.03, 0.03)


def test_nothing_came() -> None:
    found = figures(run(outcome(0.0, None, 1.0, None, error="status 503", output_tokens=0)))
    assert (found.ttft, found.itl, found.ttft_quantiles, found.imbalance, found.of_oracle) == (
        None,
        None,
        (),
        None,
        None,
    )
    assert (found.output_tokens_per_s, found.failed) == (0.0, 1)


def test_the_share_of_each_engine_and_of_one_nobody_asked() -> None:
    samples = tuple(Sample(1.0, engine, 0, 0, 0.0) for engine in "abc")
    found = figures(run(outcome(0.0, 1.0, 4.0), outcome(2.0, 3.0, 4.0), outcome(1.0, 2.0, 4.0, "b"), samples=samples))
    assert found.engines == {
        "a": EngineShare(requests=2, load=6 / 4, computed_tokens=80, output_tokens=22),
        "b": EngineShare(requests=1, load=3 / 4, computed_tokens=40, output_tokens=11),
        "c": EngineShare(requests=0, load=0.0, computed_tokens=0, output_tokens=0),
    }
    assert found.imbalance == pytest.approx(1.5 / (2.25 / 3))


def test_piled_up_is_a_queue_beside_an_idle_engine() -> None:
    def moment(at: float, *loads: tuple[int, int]) -> list[Sample]:
        return [Sample(at, str(n), running, waiting, 0.0) for n, (running, waiting) in enumerate(loads)]

    samples = [
        *moment(0, (8, 1), (0, 0)),  # piled up
        *moment(1, (9, 0), (0, 0)),  # no queue
        *moment(2, (8, 1), (1, 0)),  # nobody idle
        *moment(3, (0, 0), (0, 0)),
    ]
    found = figures(run(samples=tuple(samples)))
    assert (found.piled_up, found.queue_mean) == (0.25, 2 / 8)


def test_queues_over_time_are_means_around_a_moment() -> None:
    samples = tuple(Sample(at * 0.1, e, 2, waiting, 0.0) for at in range(1200) for e, waiting in (("a", at), ("b", 0)))
    points = figures(run(samples=samples)).queue
    assert len(points) == 120
    first = points[0]
    assert (first.at_s, first.waiting, first.running, first.longest) == pytest.approx((119.9 / 240, 2.25, 2.0, 9))
    assert points[-1].longest == 1199


def test_what_a_client_knows_of_queues() -> None:
    samples = queues([outcome(0.5, 2.0, 3.0), outcome(0.0, 1.0, 1.0, "b"), outcome(1.0, None, 2.0)], every_s=1.0)
    seen = {(s.at_s, s.engine): (s.waiting, s.running) for s in samples}
    assert seen == {
        (0.0, "a"): (0, 0), (0.0, "b"): (1, 0), (1.0, "a"): (2, 0), (1.0, "b"): (0, 1),
        (2.0, "a"): (0, 2), (2.0, "b"): (0, 0), (3.0, "a"): (0, 1), (3.0, "b"): (0, 0),
    }  # fmt: skip


def test_a_load_in_stages_is_measured_without_its_warm_up() -> None:
    warm_up = [replace(outcome(n, n + 5.0, 9.0), arrival=n) for n in range(5)]
    first = [replace(outcome(9 + n / 2, 9.1 + n / 2, 13.0), arrival=5 + n, stage=1) for n in range(5)]
    second = [replace(outcome(20 + n / 4, 20.3 + n / 4, 28.0), arrival=10 + n, stage=2) for n in range(5)]
    found = figures(run(*second, *warm_up, *first, oracle=1200))
    assert found.ttft is not None
    assert (found.requests, found.ttft.count, found.ttft.longest) == pytest.approx((10, 10, 0.3))
    assert found.output_tokens_per_s == pytest.approx((55 / 4 + 55 / 8) / 2)
    assert (found.cached_share, found.of_oracle) == (0.6, 15 * 60 / 1200)
    counts = [(p.step, p.per_s, p.ttft.count if p.ttft else 0) for p in found.rates]
    assert counts == [(1, 2.0, 5), (2, 4.0, 5)]
