from __future__ import annotations

from typing import Any

import pytest

from kvatlas_loadtest.loads.comparison import CACHED, OF_ORACLE, OUTPUT, TTFT_MEAN, TTFT_P90, Comparison, Median
from tests.unit.loadtest.loads.report_kit import near, told


def test_a_cell_is_the_median_over_seeds_with_the_least_and_the_most() -> None:
    runs = [told("precise", seed=seed, ttft_s=ttft) for seed, ttft in ((1, 0.4), (2, 0.1), (3, 0.2))]
    comparison = Comparison(runs)
    assert comparison.median("precise", "reference", TTFT_P90) == Median(0.2, 0.1, 0.4, 3)
    assert comparison.median("precise", "bursts", TTFT_P90) is None
    assert comparison.median("random", "reference", TTFT_P90) is None
    assert comparison.seeds == [1, 2, 3]


def test_over_all_workloads_it_is_the_geometric_mean() -> None:
    comparison = Comparison([told("a", "x", ttft_s=1.0), told("a", "y", ttft_s=4.0), told("b", "x", ttft_s=0.1)])
    assert comparison.overall("a", TTFT_MEAN) == near(2.0)
    assert comparison.overall("b", TTFT_MEAN) is None  # not run on all of them
    assert comparison.best_overall(TTFT_MEAN) == ("a", near(2.0))


def test_less_is_better_or_more_is() -> None:
    runs = [told("a", ttft_s=1.0, output_tokens_per_s=5.0), told("b", ttft_s=2.0, output_tokens_per_s=9.0)]
    comparison = Comparison(runs)
    assert comparison.best("reference", TTFT_P90) == ("a", 1.0)
    assert comparison.best("reference", OUTPUT) == ("b", 9.0)
    assert comparison.best("reference", TTFT_P90, ["b"]) == ("b", 2.0)
    assert comparison.best("reference", TTFT_P90, []) is None


@pytest.mark.parametrize("more", [{"errors": {"cut": 2}}, {"shed": 2}, {"errors": {"cut": 1}, "shed": 1}])
def test_who_fails_many_is_the_best_of_nobody(more: dict[str, Any]) -> None:
    comparison = Comparison([told("fails", ttft_s=0.1, **more), told("works", ttft_s=1.0)])
    assert comparison.best("reference", TTFT_P90) == ("works", 1.0)
    assert comparison.best_overall(TTFT_P90) == ("works", near(1.0))
    assert Comparison([told("one", errors={"cut": 1})]).best("reference", CACHED) == ("one", 0.5)


def test_where_there_is_nothing_to_find_nobody_finds_most() -> None:
    comparison = Comparison([told("a", of_oracle=None)])
    assert comparison.median("a", "reference", OF_ORACLE) is None
    assert comparison.best("reference", OF_ORACLE) is None
