"""A bounded set of prompts, each once in every round."""

from __future__ import annotations

import json
from itertools import islice

from kvatlas_loadtest.chaos.load import Shape
from kvatlas_loadtest.soak.load import asked

SHAPE = Shape(contexts=3, context_words=5)


def test_each_prompt_is_asked_once_in_every_round_in_another_order() -> None:
    texts = [json.dumps(body) for body in islice(asked(SHAPE, 1, 20), 60)]
    first, second, third = texts[:20], texts[20:40], texts[40:]
    assert len(set(first)) == 20
    assert set(first) == set(second) == set(third)
    assert first != second != third


def test_without_a_bound_every_prompt_is_new() -> None:
    texts = [json.dumps(body) for body in islice(asked(SHAPE, 1, 0), 60)]
    assert len(set(texts)) == 60
