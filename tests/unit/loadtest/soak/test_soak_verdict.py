"""A leak is a rise after the warm-up that is more than allowed and more than noise."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_loadtest.soak.samples import Sample
from kvatlas_loadtest.soak.verdict import Fit, Verdict, keys_most, measured, verdicts


def samples(memory: Callable[[float], float] = lambda at: 100.0, **others: Callable[[float], float]) -> list[Sample]:
    """Ten minutes, every three seconds."""
    found = []
    for step in range(200):
        at = step * 3.0
        told = {name: value(at) for name, value in others.items()}
        files = int(told.pop("files", 20))
        found.append(Sample(at, memory(at), files, files // 2, int(told.pop("threads", 5)), **told))
    return found


def of(its: Sequence[Sample]) -> dict[str, Verdict]:
    return {verdict.what: verdict for verdict in verdicts({"router-0": its})}


@given(
    level=st.floats(-1e3, 1e3),
    slope=st.floats(-10, 10),
    times=st.lists(st.integers(0, 10_000), min_size=3, max_size=40, unique=True).map(sorted),
)
def test_a_line_is_found_again(level: float, slope: float, times: list[int]) -> None:
    begun, lasted = times[0], times[-1] - times[0]
    fit = Fit.of([(t, level + slope * (t - begun)) for t in times])
    assert math.isclose(fit.level, level, rel_tol=1e-6, abs_tol=1e-4)
    assert math.isclose(fit.rise, slope * lasted, rel_tol=1e-6, abs_tol=1e-4)
    assert fit.error < 1e-3


def test_noise_makes_a_rise_uncertain_but_not_a_leak() -> None:
    chance = random.Random(1)
    fit = of(samples(tasks=lambda at: 30 + chance.gauss(0, 6)))["tasks"]
    assert 0.5 < fit.fit.error < 3
    assert not fit.leaks


@pytest.mark.parametrize("points", [[], [(0.0, 1.0), (1.0, 1.0)], [(0.0, 1.0), (0.0, 1.0), (0.0, 2.0)]])
def test_there_is_no_line_through_too_little(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="no line"):
        Fit.of(points)


def test_the_first_fifth_is_warm_up() -> None:
    its = samples()
    assert [its[0].at, measured(its)[0].at, measured(its)[-1].at] == [0.0, 120.0, 597.0]
    warm = of(samples(lambda at: min(50 + at, 170)))["memory"]
    assert warm.fit.rise == pytest.approx(0, abs=1e-6)
    assert measured([]) == []


@pytest.mark.parametrize(
    ("memory", "leaks"),
    [
        (lambda at: 100 + at * 4 / 480, False),  # 4 MB: less than 5
        (lambda at: 100 + at * 6 / 480, True),
        (lambda at: 1000 + at * 18 / 480, False),  # less than 2 %
        (lambda at: 1000 + at * 23 / 480, True),
        (lambda at: 500 - at, False),
    ],
)
def test_memory_may_grow_by_two_per_cent_or_five_megabytes(memory: Callable[[float], float], leaks: bool) -> None:
    assert of(samples(memory))["memory"].leaks is leaks


def test_files_threads_and_tasks_must_not_rise() -> None:
    flat = of(samples(files=lambda at: 20, threads=lambda at: 10, tasks=lambda at: 30))
    assert [verdict.what for verdict in flat.values() if verdict.leaks] == []

    def doubled(level: float) -> Callable[[float], float]:
        return lambda at: level * (1 + at / 600)

    leaking = of(samples(files=doubled(20), threads=doubled(10), tasks=doubled(30)))
    assert {what for what, verdict in leaking.items() if verdict.leaks} == {"files", "sockets", "threads", "tasks"}


def test_what_a_process_does_not_tell_is_not_judged() -> None:
    assert set(of(samples())) == {"memory", "files", "sockets", "threads"}


def test_a_row_says_what_it_rose_by_and_what_was_allowed() -> None:
    row = of(samples(lambda at: 100 + at * 6 / 477))["memory"].row
    assert (row["name"], row["value"], row["budget"], row["within"]) == ("soak_router_0_memory", 6.0, 5.0, False)
    assert row["unit"].startswith("MB risen in 477 s from 101.5")


def test_the_keys_of_all_shards_are_counted_together() -> None:
    shards = {
        "shard-0": samples(keys=lambda at: 600 + (at == 300) * 40),
        "shard-1": samples(keys=lambda at: 500),
        "router-0": samples(),
    }
    assert keys_most(shards) == 1140
    assert keys_most({"router-0": samples()}) == 0
