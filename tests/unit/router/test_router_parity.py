"""What counts as a difference between local tokens and an engine's."""

from __future__ import annotations

import json

from kvatlas_common.prompts import Unrenderable, understand
from kvatlas_router.core.parity import SAMPLES, difference


def test_every_sample_is_a_tokenize_request() -> None:
    for sample in SAMPLES:
        assert not isinstance(understand("/tokenize", {"model": "m", **sample}), Unrenderable)
        json.dumps(sample)


def test_equal_tokens_and_equal_refusals_agree() -> None:
    assert difference(1, [1, 2], [1, 2]) is None
    assert difference(1, None, None) is None


def test_a_difference_says_where() -> None:
    assert difference(2, [1, 2, 3], [1, 9, 3]) == "sample 2: 3 tokens here, 3 at the engine, the first difference at 1"
    assert difference(2, [1, 2, 3], [1, 2]) == "sample 2: 3 tokens here, 2 at the engine, the first difference at 2"
    assert difference(3, None, [1]) == "sample 3: refused here, tokenised by the other"
    assert difference(3, [1], None) == "sample 3: refused by the engine, tokenised by the other"
