"""What must hold, on figures made up for it."""

from __future__ import annotations

from kvatlas_loadtest.bench.rows import Row
from kvatlas_loadtest.loads.checks import PERFECT, STALE, check
from kvatlas_loadtest.loads.figures import EngineShare, Figures
from tests.unit.loadtest.loads.report_kit import near, told


def rows(runs: list[Figures], *, whole: bool = False) -> dict[str, Row]:
    return {row["name"]: row for row in check(runs, whole=whole)}


def test_nothing_was_run() -> None:
    assert rows([]) == {}


def test_the_calibration_is_held_only_where_the_reference_is_whole() -> None:
    runs = [told("random", ttft_s=50.0, output_tokens_per_s=4429 * 1.3)]
    row = rows(runs)["calibration_random_output_tokens_per_s_off"]
    assert (row["value"], row["budget"], row["within"]) == (near(0.3), None, None)
    row = rows(runs, whole=True)["calibration_random_output_tokens_per_s_off"]
    assert (row["budget"], row["within"]) == (0.25, False)
    assert rows(runs, whole=True)["calibration_random_ttft_mean_s_off"]["within"] is True


def test_precise_beside_random_and_beside_the_best_of_the_others() -> None:
    found = rows([told("precise", ttft_s=0.5), told("random", ttft_s=90.0), told("smg", ttft_s=0.4)])
    row = found["reference_p90_times_better_than_random"]
    assert (row["value"], row["budget"], row["within"]) == (near(180), 170, True)
    row = found["reference_p90_of_best_baseline"]
    assert (row["value"], row["within"], row["peer"], row["peer_value"]) == (near(1.25), False, "smg, s", 0.4)
    row = found["reference_precise_ttft_p90_s"]
    assert (row["value"], row["within"], row["peer"], row["peer_value"]) == (0.5, None, "published", 0.542)


def test_over_all_workloads_and_on_the_worst_of_them() -> None:
    times = {"precise": (0.5, 1.2), "smg": (1.0, 1.0), "dynamo": (2.0, 1.1)}
    runs = [told(p, w, ttft_s=t) for p, both in times.items() for w, t in zip(("x", "y"), both, strict=True)]
    found = rows(runs)
    row = found["overall_ttft_mean_s_of_best_baseline"]
    assert (row["value"], row["within"], row["peer"]) == (near(0.6**0.5), True, "smg, s")
    row = found["worst_workload_ttft_p90_s_of_best_baseline"]
    assert (row["value"], row["within"], row["peer"]) == (near(1.2), False, "smg on y, s")


def test_balance_on_a_hot_prefix_and_load_where_nothing_is_shared() -> None:
    even = {"a": EngineShare(5, 2.0, 1, 1), "b": EngineShare(5, 1.0, 1, 1), "c": EngineShare(5, 3.0, 1, 1)}
    runs = [
        told("precise", "hot-prefix", engines=even),
        told("precise", "all-unique", ttft_s=1.0),
        told("least-load", "all-unique", ttft_s=0.8),
    ]
    found = rows(runs)
    assert (found["hot_prefix_load_max_over_mean"]["value"], found["hot_prefix_load_max_over_mean"]["within"]) == (
        1.5,
        True,
    )
    assert found["all_unique_ttft_p90_s_of_least_load"]["within"] is False


def test_late_knowledge_is_compared_with_perfect_and_ranked_nowhere() -> None:
    runs = [told(PERFECT, ttft_s=0.1), told(STALE, ttft_s=0.12), told("precise", ttft_s=0.5), told("smg", ttft_s=1.0)]
    found = rows(runs)
    row = found["reference_4_routers_ttft_p90_s_of_perfect"]
    assert (row["value"], row["budget"], row["within"]) == (near(1.2), 1.1, False)
    assert found["reference_p90_of_best_baseline"]["peer"] == "smg, s"
