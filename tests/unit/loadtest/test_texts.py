from __future__ import annotations

import math

import pytest

from kvatlas_loadtest.percentiles import percentile
from kvatlas_loadtest.texts import text


def test_a_text_follows_from_its_seed_and_a_shorter_one_is_its_beginning() -> None:
    assert text(7, 300) == text(7, 300) != text(8, 300)
    assert text(7, 300).startswith(text(7, 40) + " ")
    assert len(text(7, 300).split()) == 300


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.1, 1), (0.11, 2), (0.5, 5), (0.9, 9), (1.0, 10)])
def test_percentiles(share: float, expected: int) -> None:
    assert percentile(range(1, 11), share) == expected


def test_a_percentile_of_nothing() -> None:
    assert math.isnan(percentile([], 0.5))
