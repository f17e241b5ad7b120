"""Costs: their parts, what makes them rise, and that what is reckoned for all engines at once is their sum."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas_common.words import Medium
from kvatlas_router.core.cost import FULL, Ahead, Figures, Quote
from kvatlas_router.core.rates import PRIOR, Speed

aheads = st.builds(
    Ahead,
    queued_tokens=st.integers(0, 50_000),
    pending=st.integers(0, 50),
    decoding=st.integers(0, 300),
    late_s=st.floats(0, 100),
    kv_usage=st.floats(0, 1),
    kv_tokens=st.sampled_from([0, 10_000, 300_000]),
)
transfers = st.lists(st.tuples(st.sampled_from([Medium.CPU, Medium.STORAGE, Medium.REMOTE]), st.integers(0, 9000)))


class Engine(NamedTuple):
    """One, and what a request would be to it."""

    quote: Quote
    to_compute: int
    voided: float
    moved: list[tuple[Medium, int]]


engines = st.builds(
    Engine,
    st.builds(
        Quote,
        st.just(Speed(token_s=0.0002)),
        aheads,
        st.floats(0, 2000),
        busy=st.floats(0, 1),
        share=st.sampled_from([0.1, 0.5, 1.0]),
    ),
    st.integers(0, 100_000),
    st.one_of(st.just(0.0), st.floats(0, 10_000)),
    transfers,
)


def total_ms(quote: Quote, to_compute: int) -> float:
    return quote.cost(to_compute).total_ms


@given(st.lists(engines, max_size=9))
def test_the_costs_of_all_engines_at_once_are_the_sums_of_the_costs_of_each(fleet: list[Engine]) -> None:
    costs = [each.quote.cost(each.to_compute, each.moved, each.voided) for each in fleet]
    totals = Figures.of(each.quote.figures for each in fleet).totals_ms(
        to_compute=np.array([each.to_compute for each in fleet], float),
        voided=np.array([each.voided for each in fleet], float),
        moved_s=np.array([each.quote.moved_s(each.moved) for each in fleet], float),
    )
    expected = [cost.total_ms / each.quote.share for cost, each in zip(costs, fleet, strict=True)]
    assert totals.tolist() == pytest.approx(expected, rel=1e-9)
    for cost in costs:
        assert cost.total_ms == pytest.approx(cost.ttft_ms + cost.others_ms)
        assert min(cost) >= 0


@given(aheads, st.integers(0, 50_000), st.integers(1, 50_000))
def test_more_to_compute_never_costs_less(ahead: Ahead, tokens: int, more: int) -> None:
    quote = Quote(PRIOR, ahead, 300.0)
    assert total_ms(quote, tokens + more) > total_ms(quote, tokens)


@pytest.mark.parametrize(
    "busier",
    [
        Ahead(queued_tokens=5000, pending=1),
        Ahead(decoding=50),
        Ahead(late_s=0.5),
        Ahead(kv_usage=0.9, kv_tokens=300_000),
    ],
)
def test_whatever_is_ahead_costs(busier: Ahead) -> None:
    idle = Ahead(kv_tokens=busier.kv_tokens)
    assert total_ms(Quote(PRIOR, busier, 300.0), 1000) > total_ms(Quote(PRIOR, idle, 300.0), 1000)


def test_the_price_of_room_rises_without_bound_and_a_full_cache_is_waited_for() -> None:
    def others(usage: float) -> float:
        return Quote(PRIOR, Ahead(kv_usage=usage, kv_tokens=1_000_000), 100.0).cost(1000).others_ms

    assert others(0.95) - others(0.9) > 4 * (others(0.5) - others(0.45))
    full = Quote(PRIOR, Ahead(kv_usage=FULL, kv_tokens=10_000), 1000.0)
    assert full.cost(2000).queue_ms > full.cost(1000).queue_ms > 0


def test_a_cost_names_its_terms() -> None:
    assert str(Quote(PRIOR, Ahead(queued_tokens=10_000)).cost(1000)) == (
        "queue=1059ms compute=120ms transfer=0ms decode=12ms others=30ms"
    )
