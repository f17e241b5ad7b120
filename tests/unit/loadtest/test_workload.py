from __future__ import annotations

import math

import pytest

from kvatlas_loadtest.client import Answer
from kvatlas_loadtest.workload import LoadReport, Workload, percentile


def answer(ttft_s: float, cached: int = 0, engine: str = "", error: str = "") -> Answer:
    return Answer(ttft_s, ttft_s + 1, 100, cached, 10, engine, "text", error)


def test_everything_follows_from_the_seed() -> None:
    one, same, other = (list(Workload(seed=seed).bodies()) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_prompts_share_their_customers_context_and_nothing_else() -> None:
    workload = Workload(customers=3, users=2, questions=2, context_words=50, question_words=5)
    bodies = list(workload.bodies())
    assert len(bodies) == len(workload) == 12
    contexts = [body["messages"][0]["content"] for body in bodies]
    assert sorted(contexts.count(context) for context in set(contexts)) == [4, 4, 4]
    assert contexts != sorted(contexts)  # shuffled
    assert len({body["messages"][1]["content"] for body in bodies}) == 12
    assert {len(context.split()) for context in contexts} == {50}


def test_the_report() -> None:
    answers = [answer(0.1, 50, "a:1"), answer(0.2, 100, "a:1"), answer(0.3, 0, "b:1"), answer(9.0, error="status 503")]
    report = LoadReport.of(answers, duration_s=2.0)
    assert (report.requests, report.errors, report.per_engine) == (4, {"status 503": 1}, {"a:1": 2, "b:1": 1})
    assert (report.ttft_p50_s, report.ttft_p90_s, report.cached_share) == (0.2, 0.3, 0.5)
    assert report.output_tokens_per_s == 15.0


def test_a_report_of_nothing() -> None:
    report = LoadReport.of([answer(1.0, error="cut")], duration_s=1.0)
    assert math.isnan(report.ttft_p50_s)
    assert (report.cached_share, report.errors) == (0.0, {"cut": 1})


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.1, 1), (0.11, 2), (0.5, 5), (0.9, 9), (1.0, 10)])
def test_percentiles(share: float, expected: int) -> None:
    assert percentile(range(1, 11), share) == expected
